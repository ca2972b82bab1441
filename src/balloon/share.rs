//! What several VMs make of one host. Each has its wish; where the host is short of memory, or the wishes are more than its
//! budget, memory is taken from the VM that suffers least, and what there is to be given is rationed by weight. So it flows
//! from an idle VM to a busy one, and no VM goes below its least. All of them together push out no more in a tick than the
//! store takes ([`pace`](super::pace)).

use std::cmp::Reverse;

use super::Mode;
use super::bounds::Bounds;
use super::decision::{Decision, Reason};
use super::pace::pace;
use super::policy;
use super::snapshot::{Host, Pressure, Snapshot, Vmm};
use super::state::State;
use super::wish::Wish;

/// The most that is taken from a VM for the host in one tick, in parts of what it has.
const TAKEN_PART: u64 = 8;
/// What is taken of all guests' memory together in a tick while the host is short of it, in parts.
const MODERATE_PART: u64 = 100;
const SEVERE_PART: u64 = 20;

/// Decides for all VMs of the host, and keeps in `states` what the next tick needs. States go with snapshots by their order.
pub fn decide_all(host: &Host, snapshots: &[Snapshot], states: &mut [State]) -> Vec<Decision> {
    let wishes = snapshots.iter().zip(states.iter_mut());
    let mut wishes: Vec<Wish> = wishes.map(|(snapshot, state)| policy::wish(host, snapshot, state)).collect();
    let mut guests: Vec<Guest<'_>> = snapshots.iter().zip(&mut wishes).filter_map(Guest::of).collect();
    let unasked = snapshots.iter().zip(states.iter()).map(|(snapshot, state)| unasked_bytes(snapshot, state));
    let unasked_bytes = unasked.fold(0, u64::saturating_add);
    let budget_bytes = host.budget_bytes.unwrap_or(u64::MAX).saturating_sub(unasked_bytes);
    let driven = || guests.iter().filter(|guest| guest.is_driven());
    let weights = driven().map(|guest| u64::from(guest.snapshot.weight)).sum::<u64>().max(1);
    let fixed_bytes = sum(&guests, |guest| if guest.is_driven() { 0 } else { guest.claimed_bytes() });
    let shared_bytes = budget_bytes.saturating_sub(fixed_bytes);
    for guest in &mut guests {
        let share = u128::from(shared_bytes) * u128::from(guest.snapshot.weight) / u128::from(weights);
        guest.share_bytes = u64::try_from(share).unwrap_or(u64::MAX);
    }
    take(host, &mut guests, budget_bytes);
    pace(host, &mut guests);
    ration(&mut guests, budget_bytes);
    for ((snapshot, wish), state) in snapshots.iter().zip(&wishes).zip(states) {
        if snapshot.mode != Mode::Off && matches!(snapshot.vmm, Vmm::Answers(_)) {
            state.settle(wish, snapshot.mode);
        }
    }
    wishes.into_iter().map(|wish| wish.decision).collect()
}

/// What a VM that can't be asked has of the budget: what it had when it was seen last, or was told to have, if that is more.
/// One that is only observed has no part in it, as when it answers.
fn unasked_bytes(snapshot: &Snapshot, state: &State) -> u64 {
    let counts =
        matches!(snapshot.mode, Mode::Auto | Mode::Fixed(_)) && matches!(snapshot.vmm, Vmm::Silent(_));
    let seen_bytes = state.look.map_or(0, |look| look.actual_bytes);
    if counts { state.target_bytes.unwrap_or(0).max(seen_bytes) } else { 0 }
}

/// A VM whose memory is the host's to count.
pub(super) struct Guest<'a> {
    snapshot: &'a Snapshot,
    pub(super) bounds: Bounds,
    pub(super) actual_bytes: u64,
    /// Its share by weight of what the budget has for those that are driven, in bytes.
    share_bytes: u64,
    pub(super) wish: &'a mut Wish,
}

impl<'a> Guest<'a> {
    fn of((snapshot, wish): (&'a Snapshot, &'a mut Wish)) -> Option<Self> {
        let Vmm::Answers(memory) = &snapshot.vmm else { return None };
        let bounds = Bounds::of(snapshot, memory);
        let actual_bytes = memory.actual_bytes;
        wish.decision.apply.then_some(Self { snapshot, bounds, actual_bytes, share_bytes: 0, wish })
    }

    /// Whether its target may be another than its wish: the operator's word is not argued with.
    pub(super) fn is_driven(&self) -> bool {
        self.snapshot.mode == Mode::Auto
    }

    fn target_bytes(&self) -> u64 {
        self.wish.decision.target_bytes
    }

    /// What it has or will have, whichever is more: what is asked back is there once the guest has given it.
    fn claimed_bytes(&self) -> u64 {
        self.target_bytes().max(self.actual_bytes)
    }

    /// What it has, or its least, if that is more, or what it is to have lest something is killed, up to its share: nobody gives
    /// way to others in that.
    fn floor_bytes(&self) -> u64 {
        self.actual_bytes.max(self.bounds.min_bytes).max(self.rescued_bytes())
    }

    /// What one whose pages have nowhere to go is to have, as far as that is its share, in bytes.
    fn rescued_bytes(&self) -> u64 {
        if self.wish.is_rescued { self.target_bytes().min(self.share_bytes) } else { 0 }
    }

    /// What it is to have above that, in bytes.
    fn extra_bytes(&self) -> u64 {
        if self.is_driven() { self.target_bytes().saturating_sub(self.floor_bytes()) } else { 0 }
    }

    /// Who is taken from first has the least key. VMs that suffer no more than they may are alike in that; then it is who has
    /// most to spare, by weight. Those whose pages had nowhere to go come last.
    fn suffering(&self) -> (bool, u64, Reverse<u64>) {
        let spare_bytes = self.wish.available_bytes / u64::from(self.snapshot.weight.max(1));
        let pain_percent = if self.wish.suffers { self.wish.pain_percent } else { 100 };
        (self.wish.is_spared, pain_percent, Reverse(spare_bytes))
    }
}

/// What is to be taken for a host that is short of memory, in bytes.
fn pressed_bytes(host: &Host, guests: &[Guest<'_>]) -> u64 {
    let actual_bytes = sum(guests, |guest| guest.actual_bytes);
    match host.pressure {
        Pressure::None => 0,
        Pressure::Moderate => actual_bytes / MODERATE_PART,
        Pressure::Severe => actual_bytes / SEVERE_PART,
    }
}

fn sum<'a>(guests: &[Guest<'a>], of: impl Fn(&Guest<'a>) -> u64) -> u64 {
    guests.iter().map(of).fold(0, u64::saturating_add)
}

/// Takes what the host lacks from those who suffer least, and of each no more than it can give. One that suffers more than it
/// may keeps its share by weight of the budget: where all suffer, nothing is gained by taking from each in turn. What is given
/// to one whose pages have nowhere to go is not held back for a host that is short of memory, nor, up to its share, until others
/// have given it up: something in it would be killed meanwhile.
fn take(host: &Host, guests: &mut [Guest<'_>], budget_bytes: u64) {
    let over_bytes = sum(guests, Guest::target_bytes).saturating_sub(budget_bytes);
    let pressed_bytes = pressed_bytes(host, guests);
    guests.sort_by_key(Guest::suffering);
    let mut taken_bytes = 0u64;
    for guest in guests.iter_mut().filter(|guest| guest.is_driven()) {
        let (actual_bytes, wanted_bytes) = (guest.actual_bytes, guest.target_bytes());
        let mut least_bytes = (actual_bytes - actual_bytes / TAKEN_PART).max(guest.bounds.min_bytes);
        least_bytes = least_bytes.max(actual_bytes.saturating_sub(guest.wish.takeable_bytes));
        if guest.wish.suffers {
            least_bytes = least_bytes.max(guest.share_bytes.min(actual_bytes));
        }
        if wanted_bytes > actual_bytes {
            least_bytes = least_bytes.max(guest.rescued_bytes());
        }
        let lacking_bytes = if guest.wish.is_rescued { over_bytes } else { over_bytes.max(pressed_bytes) };
        let lacking_bytes = lacking_bytes.saturating_sub(taken_bytes);
        let step_bytes = wanted_bytes.saturating_sub(least_bytes).min(lacking_bytes);
        let to_bytes = guest.bounds.below(wanted_bytes, step_bytes);
        if to_bytes == wanted_bytes {
            continue;
        }
        taken_bytes = taken_bytes.saturating_add(wanted_bytes - to_bytes);
        guest.wish.decision.target_bytes = to_bytes;
        guest.wish.decision.reason = match to_bytes.checked_sub(actual_bytes) {
            Some(more_bytes) => Reason::Rationed(more_bytes),
            None => Reason::TookForHost(actual_bytes - to_bytes),
        };
    }
}

/// Gives out no more than the budget has left beside what all have already, and the least that each may have or must.
fn ration(guests: &mut [Guest<'_>], budget_bytes: u64) {
    let over_bytes = sum(guests, Guest::claimed_bytes).saturating_sub(budget_bytes);
    let wanted_bytes = sum(guests, Guest::extra_bytes);
    let mut left_bytes = wanted_bytes.saturating_sub(over_bytes);
    // Whoever wants less than its share leaves the rest to the others, so the smallest wishes come first.
    guests.sort_by_key(Guest::extra_bytes);
    let growing = guests.iter().filter(|guest| guest.extra_bytes() > 0);
    let mut weights: u64 = growing.map(|guest| u64::from(guest.snapshot.weight)).sum();
    for guest in guests.iter_mut().filter(|guest| guest.extra_bytes() > 0) {
        let weight = u64::from(guest.snapshot.weight);
        let share_bytes = u128::from(left_bytes) * u128::from(weight) / u128::from(weights.max(1));
        let wanted_bytes = guest.extra_bytes();
        let granted_bytes = wanted_bytes.min(u64::try_from(share_bytes).unwrap_or(u64::MAX));
        weights = weights.saturating_sub(weight);
        left_bytes -= granted_bytes;
        if granted_bytes < wanted_bytes {
            let target_bytes = guest.floor_bytes() + granted_bytes;
            guest.wish.decision.reason = Reason::Rationed(target_bytes - guest.actual_bytes);
            guest.wish.decision.target_bytes = target_bytes;
        }
    }
}
