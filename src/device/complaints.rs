//! Complaints: what fails at a guest's or a VMM's doing is told, but a guest can do most of it as often as it likes.
//! So each reason is counted per VM, and the log grows with the logarithm of that.

use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

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
}

const KINDS: usize = 8;

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
    fn a_chain_names_every_cause() {
        let cause = std::io::Error::other("no such device");
        let err = crate::store::vm::StoreError::NoMemory(cause);
        assert_eq!(Chain(&err).to_string(), "the state directory has no memory left: no such device");
    }
}
