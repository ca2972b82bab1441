//! What a VM may hold. Only a value; who keeps it and who acts on it are elsewhere.

/// What a VM may hold, and how it stands among the others. Can be changed while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The most pool bytes that it may hold.
    pub limit_bytes: u64,
    /// The pool bytes that global pressure leaves it.
    pub reserve_bytes: u64,
    /// Its share under global pressure; twice as much keeps pages twice as long.
    pub weight: u32,
    /// Whether its pages may go to the writeback file.
    pub writeback: bool,
}

impl Limits {
    /// What a VM is given when nothing is said: all it wants, and no favours.
    pub const NONE: Self = Self { limit_bytes: u64::MAX, reserve_bytes: 0, weight: 100, writeback: true };
}
