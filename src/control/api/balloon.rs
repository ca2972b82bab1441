//! What is shown of a VM's balloon.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::balloon::Word;

/// A VM's balloon, as of the controller's last tick.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct BalloonStatus {
    /// Who decides: `off`, `observe`, `auto` or `fixed`.
    pub mode: String,
    /// Whether the VMM answers.
    pub reachable: bool,
    /// What the guest was booted with, if the VMM answers.
    pub configured_bytes: Option<u64>,
    /// What the guest has, if the VMM answers.
    pub actual_bytes: Option<u64>,
    /// What the guest could use without swapping, if it says so.
    pub available_bytes: Option<u64>,
    /// What it should have; what it would have, in the mode `observe`, in which its VMM is told nothing.
    pub target_bytes: u64,
    /// Why, or why the VMM doesn't answer, in a word that stays the same in later versions.
    pub state: Word,
    /// The same in a sentence, with its numbers.
    pub reason: String,
    /// Pages that are being read back from the writeback file, because it was given memory, and are still to come.
    pub reading_back_pages: u64,
    /// What came back of its working set in a minute, smoothed, in millionths.
    pub promotion_ppm: u64,
    /// Time that it spent waiting for loads, smoothed, in millionths.
    pub stall_ppm: u64,
    /// Of what it pushes out lately, the part that goes to another swap than ours, a zram or another disk, in millionths,
    /// as far as that is worth speaking of; if it says what it swaps.
    pub other_swap_ppm: Option<u64>,
}
