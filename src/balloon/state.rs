//! What is kept of a VM from tick to tick, for the policy. A trace holds it, so whatever is new has a default.

use serde::{Deserialize, Serialize};

use super::Mode;
use super::signals::Look;
use super::wish::Wish;

/// How long a VM is left alone after it hurt, at first, in ticks.
pub(super) const BACK_OFF_TICKS: u64 = 12;

/// What is kept of a VM from tick to tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The last look, if there was one that can be compared with.
    pub look: Option<Look>,
    /// The last target, in bytes.
    pub target_bytes: Option<u64>,
    /// The target before that, in bytes: what a guest was still on its way to as it was told of the last.
    #[serde(default)]
    pub before_bytes: u64,
    /// Ticks since the last target was set.
    pub target_ticks: u64,
    /// Ticks since the last step down.
    pub step_ticks: u64,
    /// Until when it is left alone, by the boot-time clock in milliseconds.
    pub back_off_until_ms: u64,
    /// How long it will be left alone when it hurts next, in ticks.
    pub back_off_ticks: u64,
    /// The target at which it hurt, or at which pages went to another swap, in bytes; slowly forgotten.
    pub edge_bytes: u64,
    /// By how much it was squeezed since it pushed something out last, while it had nothing to spare, in bytes.
    pub dry_bytes: u64,
    /// Whether it was found not to swap: how many pages it had loaded then, as whoever switches its swap on reads the header.
    #[serde(default)]
    pub dry_loads: Option<u64>,
    /// Until when that holds at most, by the boot-time clock in milliseconds.
    #[serde(default)]
    pub dry_until_ms: u64,
    /// Until when the host takes only what it has to spare, by the boot-time clock in milliseconds: its pages had nowhere to
    /// go, and what uses memory then is killed next.
    #[serde(default)]
    pub spared_until_ms: u64,
}

impl State {
    /// How long what it was given last counts as given just now, however long it is left alone.
    pub(super) fn given_until_ms(&self, interval_ms: u64) -> u64 {
        let more_ticks = self.back_off_ticks.saturating_sub(BACK_OFF_TICKS);
        self.back_off_until_ms.saturating_sub(more_ticks.saturating_mul(interval_ms))
    }

    /// What the host has made of a wish is the target from now on.
    pub(super) fn settle(&mut self, wish: &Wish, mode: Mode) {
        let target_bytes = wish.decision.target_bytes;
        if mode == Mode::Auto {
            let taken_bytes = wish.begin_bytes().saturating_sub(target_bytes);
            self.dry_bytes = self.dry_bytes.saturating_add(taken_bytes.saturating_sub(wish.spare_bytes));
        }
        if self.target_bytes.is_some_and(|before| target_bytes < before) {
            self.step_ticks = 0;
        }
        if self.target_bytes != Some(target_bytes) {
            self.before_bytes = self.target_bytes.unwrap_or(wish.actual_bytes);
            self.target_bytes = Some(target_bytes);
            self.target_ticks = 0;
        }
    }
}
