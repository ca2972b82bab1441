//! What the policy decides, and why, in words for an operator.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::snapshot::Silence;
use crate::ids::Bytes;

/// What becomes of a VM's balloon at a tick.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Decision {
    /// The memory that the guest should have, in bytes.
    pub target_bytes: u64,
    /// Whether its VMM is told; else this is only shown.
    pub apply: bool,
    /// Why.
    pub reason: Reason,
}

/// Why a target is what it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// Nobody asked for more.
    Off,
    /// The operator said how much.
    Fixed,
    /// The VMM is gone, in its client's words.
    Gone(String),
    /// The VMM doesn't answer.
    Silent(Silence),
    /// There is nothing yet to compare with.
    First,
    /// Smaller by so many bytes, which the guest doesn't use.
    TookFree(u64),
    /// Smaller by so many bytes: its coldest pages leave.
    Squeezed(u64),
    /// Smaller by so many bytes: the host is short of memory or above its budget, and this VM suffers least.
    TookForHost(u64),
    /// As it was.
    Held(Hold),
    /// Larger by so many bytes.
    Relaxed(u64, Distress),
    /// Larger by so many bytes, and less than wanted: the budget has no more.
    Rationed(u64),
}

/// Why a target stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hold {
    /// It is the least that the VM may have.
    AtMinimum,
    /// As much comes back as may.
    Enough,
    /// For so many milliseconds more, after it hurt.
    BackOff(u64),
    /// The guest is on its way to it.
    Underway,
    /// It begins to use so many bytes in a tick.
    Growing(u64),
    /// What it said of itself is too old to go by.
    StatsOld,
    /// What comes back has room: it has so many bytes to spare.
    Refilling(u64),
    /// Stores wait for room: the pool doesn't take what would come.
    PoolBusy,
    /// Others are squeezed first: the store takes no more at once.
    OthersFirst,
    /// The pool or the VM's limit is nearly reached, and its pages can't go to a file.
    PoolFull,
    /// The disk is nearly full.
    DiskFull,
    /// The VM's pages hardly shrink: nothing would be gained.
    HardlyShrinks,
    /// Of what it pushes out so much goes to another swap than ours, in percent.
    OtherSwap(u64),
    /// It was found to push nothing out, and has not read its disk since.
    NotSwapping,
}

/// What hurt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distress {
    /// The guest killed a process for want of memory.
    OomKill,
    /// So many pages came back at once.
    RefaultStorm(u64),
    /// More than twice as much comes back as may, in percent of that.
    TooMuchBack(u64),
    /// The guest took so many bytes back by itself.
    TookBack(u64),
    /// The guest needs so many bytes more than it has, or pushes as many out without having been asked.
    Growing(u64),
    /// So many stores failed.
    StoresFailed(u64),
    /// It has next to nothing to spare, and no room to push anything out.
    Cornered,
    /// It has next to nothing to spare, and pushes nothing out: its swap is off, or full.
    NotSwapping,
    /// What it said of itself is too old to go by, and more comes back than may.
    Unheard,
}

impl Distress {
    /// Whether the guest's pages have nowhere to go: what uses memory is killed next.
    pub(super) fn has_nowhere_to_go(&self) -> bool {
        matches!(self, Self::OomKill | Self::StoresFailed(_) | Self::Cornered | Self::NotSwapping)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::Fixed => f.write_str("fixed by the operator"),
            Self::Gone(why) => f.write_str(why),
            Self::Silent(silence) => f.write_str(&silence.text),
            Self::First => f.write_str("held: nothing to compare with yet"),
            Self::TookFree(bytes) => write!(f, "squeezed by {}: memory that it has available", Bytes(*bytes)),
            Self::Squeezed(bytes) => write!(f, "squeezed by {}: little comes back", Bytes(*bytes)),
            Self::TookForHost(bytes) => {
                write!(f, "squeezed by {} for the host: it suffers least", Bytes(*bytes))
            }
            Self::Held(hold) => write!(f, "held: {hold}"),
            Self::Relaxed(bytes, distress) => write!(f, "relaxed by {}: {distress}", Bytes(*bytes)),
            Self::Rationed(bytes) => {
                write!(f, "relaxed by {} and no more: the budget has no more", Bytes(*bytes))
            }
        }
    }
}

impl fmt::Display for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AtMinimum => f.write_str("at its minimum"),
            Self::Enough => f.write_str("as much comes back as may"),
            Self::BackOff(ms) => write!(f, "it hurt; squeezed again in {} s", ms.div_ceil(1000)),
            Self::Underway => f.write_str("the guest is on its way"),
            Self::Growing(bytes) => write!(f, "it began to use {} more", Bytes(*bytes)),
            Self::StatsOld => f.write_str("what it said of itself is too old"),
            Self::Refilling(bytes) => {
                write!(f, "what comes back has room: it has {} to spare", Bytes(*bytes))
            }
            Self::PoolBusy => f.write_str("stores wait for room"),
            Self::OthersFirst => f.write_str("others are squeezed first: the store takes no more at once"),
            Self::PoolFull => f.write_str("the pool or its limit is nearly full"),
            Self::DiskFull => f.write_str("its disk is nearly full"),
            Self::HardlyShrinks => f.write_str("its pages hardly shrink"),
            Self::NotSwapping => f.write_str("it pushes nothing out: is its swap on?"),
            Self::OtherSwap(percent) => write!(
                f,
                "{percent} % of what it pushes out goes to another swap: is ours of the highest priority?"
            ),
        }
    }
}

impl fmt::Display for Distress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OomKill => f.write_str("the guest killed a process for want of memory"),
            Self::RefaultStorm(pages) => write!(f, "{pages} pages came back at once"),
            Self::TooMuchBack(percent) => write!(f, "{percent} % of what may come back does"),
            Self::TookBack(bytes) => write!(f, "the guest took {} back", Bytes(*bytes)),
            Self::Growing(bytes) => write!(f, "the guest needs {} more", Bytes(*bytes)),
            Self::StoresFailed(stores) => write!(f, "{stores} stores failed"),
            Self::Cornered => f.write_str("it has nothing to spare, and no room to push anything out"),
            Self::NotSwapping => f.write_str("it pushes nothing out: is its swap on?"),
            Self::Unheard => f.write_str("it says nothing of itself any more, and too much comes back"),
        }
    }
}
