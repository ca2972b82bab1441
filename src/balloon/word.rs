//! What is going on with a VM's balloon in one word out of a fixed list: for metrics, and for whoever counts or draws what the
//! policy decides. The numbers, and what to do, stand in the sentence beside it, which comes from the same [`Reason`].

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::decision::{Distress, Hold, Reason};

/// A word for each [`Reason`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Word {
    /// Nobody asked for more.
    #[default]
    Off,
    /// The operator said how much.
    Fixed,
    /// There is nothing yet to compare with.
    Starting,
    /// Memory that nobody uses is taken.
    SqueezingFree,
    /// The guest's coldest pages leave.
    Squeezing,
    /// Memory is taken because the host needs it.
    SqueezingForHost,
    /// Held: at the least that the VM may have.
    MinReached,
    /// Held: as much comes back as may.
    EnoughBack,
    /// Held: it hurt a while ago.
    BackingOff,
    /// Held: the guest is on its way.
    Underway,
    /// Held: it begins to use more.
    Growing,
    /// Held: what it said of itself is too old.
    StatsOld,
    /// Held: what comes back has room.
    Refilling,
    /// Held: stores wait for room.
    PoolBusy,
    /// Held: others are squeezed first.
    OthersFirst,
    /// Held: the pool or its limit is nearly full.
    PoolFull,
    /// Held: its disk is nearly full.
    DiskFull,
    /// Held: its pages hardly shrink.
    HardlyShrinks,
    /// Held: what it pushes out goes to another swap of its own.
    OtherSwap,
    /// Held: it was found not to swap.
    NotSwapping,
    /// Relaxed: the guest killed a process.
    RelaxedOomKill,
    /// Relaxed: much came back at once.
    RelaxedStorm,
    /// Relaxed: more comes back than may.
    RelaxedPain,
    /// Relaxed: the guest took memory back.
    RelaxedTookBack,
    /// Relaxed: the guest needs more.
    RelaxedGrowing,
    /// Relaxed: stores failed.
    RelaxedStoresFailed,
    /// Relaxed: it has nothing to spare, and no room to push anything out.
    RelaxedCornered,
    /// Relaxed: it pushes nothing out.
    RelaxedNotSwapping,
    /// Relaxed: it says nothing of itself any more.
    RelaxedUnheard,
    /// Relaxed, by less than it wanted.
    Rationed,
    /// The VMM is gone.
    VmmGone,
    /// The VMM's socket may not be connected to.
    VmmForbidden,
    /// The VMM doesn't answer in time.
    VmmLate,
    /// The guest doesn't run.
    Paused,
    /// The guest is migrating.
    Migrating,
    /// The VM has no balloon.
    NoBalloon,
    /// The VMM refused.
    VmmRefused,
    /// The VMM's answer makes no sense.
    VmmNonsense,
    /// The VM is quarantined: its VMM is not asked.
    Quarantined,
}

impl fmt::Display for Word {
    /// The same as in JSON.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl Reason {
    /// Its word.
    #[must_use]
    pub fn word(&self) -> Word {
        match self {
            Self::Off => Word::Off,
            Self::Fixed => Word::Fixed,
            Self::Gone(_) => Word::VmmGone,
            Self::Silent(silence) => silence.word,
            Self::First => Word::Starting,
            Self::TookFree(_) => Word::SqueezingFree,
            Self::Squeezed(_) => Word::Squeezing,
            Self::TookForHost(_) => Word::SqueezingForHost,
            Self::Held(hold) => hold.word(),
            Self::Relaxed(_, distress) => distress.word(),
            Self::Rationed(_) => Word::Rationed,
        }
    }
}

impl Hold {
    fn word(self) -> Word {
        match self {
            Self::AtMinimum => Word::MinReached,
            Self::Enough => Word::EnoughBack,
            Self::BackOff(_) => Word::BackingOff,
            Self::Underway => Word::Underway,
            Self::Growing(_) => Word::Growing,
            Self::StatsOld => Word::StatsOld,
            Self::Refilling(_) => Word::Refilling,
            Self::PoolBusy => Word::PoolBusy,
            Self::OthersFirst => Word::OthersFirst,
            Self::NotSwapping => Word::NotSwapping,
            Self::PoolFull => Word::PoolFull,
            Self::DiskFull => Word::DiskFull,
            Self::HardlyShrinks => Word::HardlyShrinks,
            Self::OtherSwap(_) => Word::OtherSwap,
        }
    }
}

impl Distress {
    fn word(self) -> Word {
        match self {
            Self::OomKill => Word::RelaxedOomKill,
            Self::RefaultStorm(_) => Word::RelaxedStorm,
            Self::TooMuchBack(_) => Word::RelaxedPain,
            Self::TookBack(_) => Word::RelaxedTookBack,
            Self::Growing(_) => Word::RelaxedGrowing,
            Self::StoresFailed(_) => Word::RelaxedStoresFailed,
            Self::Cornered => Word::RelaxedCornered,
            Self::NotSwapping => Word::RelaxedNotSwapping,
            Self::Unheard => Word::RelaxedUnheard,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use utoipa::PartialSchema;

    #[test]
    fn words_are_the_same_in_json_and_fit_a_label() {
        for (word, text) in [(Word::MinReached, "min_reached"), (Word::RelaxedOomKill, "relaxed_oom_kill")] {
            assert_eq!(word.to_string(), text);
            assert_eq!(serde_json::to_value(word).unwrap(), text);
        }
    }

    #[test]
    fn an_operator_finds_every_word() {
        let schema = serde_json::to_value(Word::schema()).unwrap();
        let words = schema["enum"].as_array().unwrap();
        assert!(words.len() > 30, "{schema}");
        let text = include_str!("../../docs/operating.md");
        for word in words.iter().map(|word| word.as_str().unwrap()) {
            assert!(text.contains(&format!("`{word}`")), "docs/operating.md doesn't say what {word} is");
        }
    }
}
