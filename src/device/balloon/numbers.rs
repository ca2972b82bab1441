//! What a balloon has counted since the daemon started.

/// Counts of a balloon's. A guest that says nonsense makes them nonsense, within what its own memory is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Numbers {
    /// Pages that were given up.
    pub inflated_pages: u64,
    /// Pages that were given up again, without having been taken back.
    pub inflated_again_pages: u64,
    /// Pages that were taken back.
    pub deflated_pages: u64,
    /// Bytes that were reported as free.
    pub reported_bytes: u64,
    /// Bytes of those that were left alone, because the guest wants to find its poison in them.
    pub poisoned_bytes: u64,
    /// Bytes that were returned to the host: holes in the VMM's file. What was a hole before counts as well.
    pub punched_bytes: u64,
    /// Bytes that stay with the VMM: parts of huge pages, or in a file that can't have holes.
    pub kept_bytes: u64,
    /// Pages that are not in the guest's memory, or more than a driver may name at once.
    pub refused_pages: u64,
    /// Times that the guest said what of its memory is used.
    pub statistics: u64,
    /// Chains that make no sense.
    pub malformed: u64,
}

impl Numbers {
    /// These and those of a turn.
    #[must_use]
    pub fn and(self, turn: Self) -> Self {
        Self {
            inflated_pages: self.inflated_pages.saturating_add(turn.inflated_pages),
            inflated_again_pages: self.inflated_again_pages.saturating_add(turn.inflated_again_pages),
            deflated_pages: self.deflated_pages.saturating_add(turn.deflated_pages),
            reported_bytes: self.reported_bytes.saturating_add(turn.reported_bytes),
            poisoned_bytes: self.poisoned_bytes.saturating_add(turn.poisoned_bytes),
            punched_bytes: self.punched_bytes.saturating_add(turn.punched_bytes),
            kept_bytes: self.kept_bytes.saturating_add(turn.kept_bytes),
            refused_pages: self.refused_pages.saturating_add(turn.refused_pages),
            statistics: self.statistics.saturating_add(turn.statistics),
            malformed: self.malformed.saturating_add(turn.malformed),
        }
    }
}
