//! What the policy makes of one VM, before the host has its say.

use super::decision::{Decision, Reason};

/// A decision that the host may change, and what it has to know for that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wish {
    pub decision: Decision,
    /// How much it hurts, in percent of what may.
    pub pain_percent: u64,
    /// Whether it hurts more than it may, and still does.
    pub suffers: bool,
    /// Whether its pages had nowhere to go, and it is left alone for that: the host takes from others first.
    pub is_spared: bool,
    /// Whether they have nowhere to go now, and something in it is killed unless it is given memory.
    pub is_rescued: bool,
    /// The most that may be taken of what it has, in bytes, whatever the host lacks.
    pub takeable_bytes: u64,
    /// Memory that it doesn't use, in bytes, as far as it says so.
    pub available_bytes: u64,
    /// What of that nobody would miss, in bytes.
    pub spare_bytes: u64,
    /// The target from which this is a step, in bytes.
    pub from_bytes: u64,
    /// What it has, in bytes.
    pub actual_bytes: u64,
    /// Ticks since it was squeezed last.
    pub waited_ticks: u64,
    /// What it is still to push out for the target that it has, in bytes.
    pub underway_bytes: u64,
}

impl Wish {
    /// From where the guest goes to its target: what it was promised and doesn't have yet it needn't push out.
    pub(super) fn begin_bytes(&self) -> u64 {
        self.from_bytes.min(self.actual_bytes)
    }

    /// Of a VM that has no numbers to decide by.
    pub(super) fn without_numbers(target_bytes: u64, reason: Reason) -> Self {
        let decision = Decision { target_bytes, apply: false, reason };
        Self {
            decision,
            pain_percent: 0,
            suffers: false,
            is_spared: false,
            is_rescued: false,
            takeable_bytes: 0,
            available_bytes: 0,
            spare_bytes: 0,
            from_bytes: target_bytes,
            actual_bytes: target_bytes,
            waited_ticks: 0,
            underway_bytes: 0,
        }
    }
}
