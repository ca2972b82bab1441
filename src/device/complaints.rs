//! Complaints: what fails at a guest's or a VMM's doing is told, but a guest can do most of it as often as it likes.
//! So each reason is counted per VM, and the log grows with the logarithm of that. What is no failure but may be made to
//! happen as often as a VMM likes, its coming and going, is told so many times a minute.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// What may be complained of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// The writeback file did not give a page.
    Load,
    /// A page could not be stored.
    Store,
    /// A chain is no request, or lies outside the memory that is shared.
    Malformed,
    /// Guest memory that a request names is gone.
    Memory,
    /// A ring's indices or addresses make no sense.
    BrokenRing,
    /// A connection was refused, or ended by us.
    Connection,
    /// Kicks come, and nothing is on the ring.
    NotShared,
    /// A request was carried out at two crashes.
    Fatal,
    /// Pages were given up that the guest doesn't have.
    NoSuchPage,
    /// Pages that were given up can't be returned to the host.
    NotReturned,
}

const KINDS: usize = 10;

/// How often each was complained of.
#[derive(Debug, Default)]
pub struct Complaints([AtomicU64; KINDS]);

impl Complaints {
    /// Counts a complaint. True for the first, the second, the fourth and so on: then it is to be told.
    pub fn is_news(&self, complaint: Complaint) -> bool {
        let count = self.0.get(complaint as usize).map(|count| count.fetch_add(1, Ordering::Relaxed));
        count.is_some_and(|before| before.saturating_add(1).is_power_of_two())
    }
}

/// Lines about VMMs that come and go, a minute and VM: an operator reads each, a VMM gone wild fills no disk.
const COMINGS_PER_MINUTE: u32 = 60;

/// How often VMMs came and went of late.
#[derive(Debug, Default)]
pub struct Comings(Mutex<Option<(Instant, u32)>>);

impl Comings {
    /// Whether one more is to be told.
    pub fn is_told(&self) -> bool {
        let mut minute = self.0.lock();
        let (begun, told) = minute
            .filter(|(begun, _)| begun.elapsed() < Duration::from_secs(60))
            .unwrap_or((Instant::now(), 0));
        *minute = Some((begun, told.saturating_add(1)));
        told < COMINGS_PER_MINUTE
    }
}

/// An error and what caused it, on one line.
#[derive(Debug)]
pub struct Chain<'a>(pub &'a dyn Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(err) = cause {
            write!(f, ": {err}")?;
            cause = err.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_at_powers_of_two_and_apart_from_the_others() {
        let complaints = Complaints::default();
        let told = (1..=100).filter(|_| complaints.is_news(Complaint::Load)).count();
        assert_eq!(told, 7);
        assert!(complaints.is_news(Complaint::Connection));
    }

    #[test]
    fn comings_are_told_until_there_are_too_many() {
        let comings = Comings::default();
        let told = (0..1000).filter(|_| comings.is_told()).count();
        // And as many again if a minute ends meanwhile.
        assert!([60, 120].contains(&told), "{told}");
    }

    #[test]
    fn a_chain_names_every_cause() {
        let cause = std::io::Error::other("no such device");
        let err = crate::store::vm::StoreError::NoMemory(cause);
        assert_eq!(Chain(&err).to_string(), "the state directory has no memory left: no such device");
    }
}
