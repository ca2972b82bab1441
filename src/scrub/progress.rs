//! What a check was asked for, and how far it is.

use crate::ids::Slot;
use crate::store::accounting::Held;

/// The most bad pages that are listed; all are counted.
pub const BAD_SHOWN_MAX: usize = 100;

/// What is to be checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The only VM to look at; `None` for all.
    pub vm: Option<String>,
    /// Bytes of pages a second.
    pub rate_bytes: u64,
}

/// Whether a check is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is.
    Running,
    /// It looked at all there was.
    Done,
}

/// A page that can't be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadPage {
    /// Whose.
    pub vm: String,
    /// Where on its disk.
    pub slot: Slot,
    /// What a load would say.
    pub reason: String,
}

/// How far a check is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tells this check from the one before.
    pub number: u64,
    /// What was asked for.
    pub order: Order,
    /// Whether it goes on.
    pub state: State,
    /// Pages that were stored when it began.
    pub expected_pages: u64,
    /// Same-filled pages that were looked at.
    pub same_filled_pages: u64,
    /// Pages of the arena.
    pub arena_pages: u64,
    /// Pages of the writeback file.
    pub file_pages: u64,
    /// Pages that can't be loaded, wherever they are.
    pub bad_pages: u64,
    /// The first of them, at most [`BAD_SHOWN_MAX`].
    pub bad: Vec<BadPage>,
    /// Pages in a writeback file that is missing: they were not looked at.
    pub missing_pages: u64,
    /// VMs that are out of service.
    pub not_checked: Vec<String>,
}

impl Progress {
    /// A check that begins.
    pub(super) fn new(number: u64, order: Order, expected_pages: u64, not_checked: Vec<String>) -> Self {
        Self {
            number,
            order,
            state: State::Running,
            expected_pages,
            same_filled_pages: 0,
            arena_pages: 0,
            file_pages: 0,
            bad_pages: 0,
            bad: Vec::new(),
            missing_pages: 0,
            not_checked,
        }
    }
}

/// Pages that there are to look at.
pub(super) fn pages_of(held: &Held) -> u64 {
    held.stored_pages + held.lost_pages
}
