//! When a guest was given much memory at once, by whomever: what it will have is compared with what it would have had. The
//! policy, an operator, a guest that took its memory back and somebody else at the VMM's monitor are all alike in that.

use super::snapshot::Vmm;
use super::trace::Step;
use crate::page::PAGE_SIZE_U64;

/// So much at once is much, in parts of what the guest has then. Whatever hurts is answered by a sixteenth at least; a step
/// that the budget cut to less than half of that is not worth a burst.
const MUCH_PART: u64 = 32;

/// What happened to a guest's memory at a tick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing to speak of.
    Little,
    /// It was given room for so many pages.
    Given(u64),
    /// It has to give some up.
    Taken,
}

/// What is kept of a guest to see that.
#[derive(Clone, Copy, Debug, Default)]
pub struct Given {
    last: Option<Last>,
}

#[derive(Clone, Copy, Debug)]
struct Last {
    target_bytes: u64,
    /// What it had or was to have, whichever was more: what is asked back is its own until it has given it up.
    claimed_bytes: u64,
}

impl Given {
    /// Looks at what was decided. A VMM that is gone takes its guest with it; of one that says nothing nothing is known.
    pub fn note(&mut self, step: &Step) -> Change {
        let memory = match &step.snapshot.vmm {
            Vmm::Answers(memory) => memory,
            Vmm::Silent(_) => return Change::Little,
            Vmm::Gone(_) => {
                let was_there = self.last.take().is_some();
                return if was_there { Change::Taken } else { Change::Little };
            }
        };
        let decision = &step.decision;
        let target_bytes = if decision.apply { decision.target_bytes } else { memory.actual_bytes };
        let claimed_bytes = target_bytes.max(memory.actual_bytes);
        let Some(last) = self.last.replace(Last { target_bytes, claimed_bytes }) else {
            return Change::Little;
        };
        if target_bytes < last.target_bytes {
            return Change::Taken;
        }
        let given_bytes = claimed_bytes.saturating_sub(last.claimed_bytes);
        if given_bytes < (claimed_bytes / MUCH_PART).max(PAGE_SIZE_U64) {
            return Change::Little;
        }
        Change::Given(given_bytes / PAGE_SIZE_U64)
    }
}

#[cfg(test)]
mod tests {
    use super::super::vmm::GuestMemory;
    use super::super::{Decision, Reason, Silence, Snapshot, State, Word};
    use super::*;

    const MIB: u64 = 1 << 20;

    fn step(vmm: Vmm, target_mib: u64, apply: bool) -> Step {
        let snapshot = Snapshot::of_nothing(vmm);
        let decision = Decision { target_bytes: target_mib * MIB, apply, reason: Reason::Fixed };
        Step { snapshot, state: State::default(), decision }
    }

    fn has(mib: u64) -> Vmm {
        let (configured_bytes, actual_bytes) = (1024 * MIB, mib * MIB);
        Vmm::Answers(GuestMemory { configured_bytes, actual_bytes, guest: None })
    }

    fn given(mib: u64) -> Change {
        Change::Given(mib * MIB / PAGE_SIZE_U64)
    }

    #[test]
    fn what_a_guest_gets_at_once_is_given_whoever_gave_it() {
        use Change::{Little, Taken};
        let mut guest = Given::default();
        // What it has, what it should have, and what that comes to.
        let ticks = [
            (1024, 1024, Little),
            (1024, 512, Taken),
            (700, 512, Little),
            (512, 512, Little),
            // The policy's or an operator's word: at once, and no second time when the guest has it.
            (512, 768, given(256)),
            (768, 768, Little),
            (768, 775, Little),
            // It takes some back by itself, and is given as much again.
            (900, 1024, given(249)),
            (1024, 1000, Taken),
            // It was on its way there and never came: nothing was given.
            (1024, 1024, Little),
        ];
        for (n, (actual, target, change)) in ticks.into_iter().enumerate() {
            assert_eq!(guest.note(&step(has(actual), target, true)), change, "tick {n}");
        }
    }

    #[test]
    fn a_target_that_is_only_shown_gives_nothing_and_what_others_give_counts() {
        let mut guest = Given::default();
        assert_eq!(guest.note(&step(has(512), 512, false)), Change::Little);
        assert_eq!(guest.note(&step(has(512), 1024, false)), Change::Little);
        assert_eq!(guest.note(&step(has(1024), 512, false)), given(512));
    }

    #[test]
    fn another_guest_was_given_nothing_and_who_says_nothing_is_compared_with_later() {
        let mut guest = Given::default();
        guest.note(&step(has(512), 512, true));
        let silence = Silence { word: Word::Paused, text: "paused".to_owned() };
        assert_eq!(guest.note(&step(Vmm::Silent(silence), 1024, false)), Change::Little);
        assert_eq!(guest.note(&step(has(768), 768, true)), given(256));
        assert_eq!(guest.note(&step(Vmm::Gone("gone".to_owned()), 1024, false)), Change::Taken);
        assert_eq!(guest.note(&step(Vmm::Gone("gone".to_owned()), 1024, false)), Change::Little);
        assert_eq!(guest.note(&step(has(1024), 1024, true)), Change::Little);
    }
}
