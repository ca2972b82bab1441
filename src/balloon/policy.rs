//! One VM's target: a pure function of what was kept of the ticks before and of the snapshot. Squeezed slowly while little
//! comes back, held in between, relaxed at once and by a lot when it hurts; after that it is left alone for a while, twice as
//! long each time. What several VMs make of one host is [`share`](super::share)'s affair.

use super::Mode;
use super::bounds::Bounds;
use super::decision::{Decision, Distress, Hold, Reason};
use super::room::{self, Place};
use super::signals::{self, Signals};
use super::snapshot::{Host, Snapshot, Vmm};
use super::state::{BACK_OFF_TICKS, State};
use super::vmm::GuestMemory;
use super::wish::Wish;
use crate::page::PAGE_SIZE_U64;

/// A step into pages that are in use, in parts of what the guest has.
const COLD_STEP_PART: u64 = 64;
/// A step into memory that nobody uses: so much of what is above the headroom, and of what the guest has at most.
const FREE_STEP_PART: u64 = 4;
const FREE_STEP_MAX_PART: u64 = 8;
/// The headroom: memory that the guest could use at once, below which a step takes pages in use, in parts of what it has;
/// or what it lately grew by in two ticks, if that is more.
const HEADROOM_PART: u64 = 16;
const HEADROOM_BYTES_MIN: u64 = 8 << 20;
const HEADROOM_GROWTHS: u64 = 2;
/// Of what a guest has to spare the host leaves a sixteenth, or so many times what it grew by in the last tick, if that is
/// more: what it is given then may be there only a tick later.
const LEFT_GROWTHS: u64 = 4;
/// A step into pages in use that no guest is too large for, in bytes.
const COLD_STEP_BYTES_MAX: u64 = 256 << 20;
/// Of a guest that says nothing of itself, such a step takes this part.
const MUTE_PART: u64 = 4;
/// Lowering the most that a VM may have takes so much a tick, in parts of what it has.
const LOWERING_PART: u64 = 16;
/// What a guest begins to use in a tick before it counts as growing, and before that is distress, in parts of what it has.
const GROWING_PART: u64 = 64;
const GROWING_FAST_PART: u64 = 32;
/// The same of a guest that isn't known to swap, for there is nothing between its growth and a kill.
const GROWING_UNSWAPPED_PART: u64 = 256;
/// With less leeway than this, in parts of what it has and in bytes, a guest gives nothing that it uses; with less than such a
/// part of that it is cornered. Leeway is what it could begin to use before something is killed: what it has to spare, and room for its pages.
const LEEWAY_PART: u64 = 32;
const LEEWAY_BYTES_MIN: u64 = 16 << 20;
const LEEWAY_BYTES_MAX: u64 = 512 << 20;
const CORNERED_PART: u64 = 2;
/// A guest that is nearer to its target than this, in parts of it, has reached it.
const REACHED_PART: u64 = 128;
const REACHED_BYTES_MIN: u64 = 2 << 20;
/// Nearer than this, however large it is: a quarter of the largest step, so that it isn't told the next before it took one.
const REACHED_BYTES_MAX: u64 = 64 << 20;
/// A guest that hasn't reached its target after so many ticks won't.
const PATIENCE_TICKS: u64 = 12;
/// After a step, what is pushed out for so many ticks is its doing.
const STEP_TICKS: u64 = 2;
/// How much a guest in distress suffers at least, beside others: as one to which ten times as much comes back as may.
const DISTRESS_PERCENT: u64 = 1000;
/// What a guest is given at least where it hurts, in parts of what it has.
const RELAX_PART: u64 = 16;
/// Above this share of what may come back, memory is given back, in percent; below 100 some is taken.
const RELAX_PERCENT: u64 = 200;
/// Above this share it is given back also to a VM that was given some just now, in percent.
const RELAX_AGAIN_PERCENT: u64 = 1000;
/// Within a sixteenth of where it hurt last steps are a quarter of what they are elsewhere; that is forgotten by so many
/// parts a tick.
const EDGE_PART: u64 = 16;
const EDGE_STEPS: u64 = 4;
const EDGE_FORGOTTEN_PART: u64 = 1024;
/// How long a VM is left alone after it hurt again and again, in ticks.
const BACK_OFF_TICKS_MAX: u64 = 192;
/// After so many times that without pain it is as if it had never hurt.
const CALM_BACK_OFFS: u64 = 4;
/// What is taken of a guest that has nothing to spare and pushes nothing out until it is taken not to swap, in parts of what
/// it has: that was its cache, and next comes its life.
const DRY_PART: u64 = 16;
/// After so many ticks that is tried again, were it a mistake: a day of ticks of five seconds.
const DRY_TICKS: u64 = 17_280;
/// More than this of what it pushes out going elsewhere, in percent, is too much to go on with that.
const ELSEWHERE_PERCENT: u64 = 50;

/// What comes back within so many ticks as now has its room left to it.
const REFILL_TICKS: u64 = 12;

/// Wishes for one VM, and keeps in `state` what the next tick needs, but for the target: the host has its say first.
pub(super) fn wish(host: &Host, snapshot: &Snapshot, state: &mut State) -> Wish {
    let memory = match (&snapshot.mode, &snapshot.vmm) {
        (Mode::Off, _) => {
            *state = State::default();
            return Wish::without_numbers(snapshot.max_bytes, Reason::Off);
        }
        // A guest that comes after it is another.
        (_, Vmm::Gone(why)) => {
            *state = State::default();
            return Wish::without_numbers(snapshot.max_bytes, Reason::Gone(why.clone()));
        }
        // What it was told holds, and what was seen of it for some ticks.
        (_, Vmm::Silent(why)) => {
            let target_bytes = state.target_bytes.unwrap_or(snapshot.max_bytes);
            return Wish::without_numbers(target_bytes, Reason::Silent(why.clone()));
        }
        (_, Vmm::Answers(memory)) => memory,
    };
    let bounds = Bounds::of(snapshot, memory);
    let observed = snapshot.mode == Mode::Observe;
    let signals =
        state.look.and_then(|last| signals::next(&last, host.now_ms, host.interval_ms, memory, snapshot));
    // Nobody follows a target that is only shown, and who wasn't seen for long may be another: each is a step from what
    // there is.
    let last_bytes = state.target_bytes.filter(|_| !observed && signals.is_some());
    let from_bytes =
        last_bytes.unwrap_or(memory.actual_bytes).max(bounds.min_bytes).min(memory.configured_bytes);
    state.look =
        Some(signals.map_or_else(|| signals::first(host.now_ms, memory, snapshot), |signals| signals.look));
    state.target_ticks += 1;
    state.step_ticks += 1;
    state.edge_bytes -= state.edge_bytes / EDGE_FORGOTTEN_PART;

    let tick = signals.as_ref().map(|signals| Tick { host, snapshot, memory, signals, from_bytes, bounds });
    let (to_bytes, reason) = match (snapshot.mode, &tick) {
        (Mode::Fixed(bytes), _) => (bytes.min(memory.configured_bytes), Reason::Fixed),
        (_, None) => (from_bytes, Reason::First),
        (_, Some(tick)) => tick.decide(state),
    };
    // Of a guest that wasn't seen before nobody knows whether it can give anything.
    let takeable_bytes = tick.as_ref().map_or(0, |tick| tick.takeable_bytes(state));
    let spare_bytes = tick.as_ref().map_or(0, Tick::spare_bytes);
    let signals = signals.unwrap_or_default();
    let available_bytes = signals.available_bytes.unwrap_or(0);
    // One that will not give any more is waited for no longer.
    let is_waited_for = state.target_ticks <= PATIENCE_TICKS;
    let underway_bytes = memory.actual_bytes.saturating_sub(from_bytes).saturating_sub(available_bytes);
    let underway_bytes = if is_waited_for && underway_bytes > REACHED_BYTES_MIN { underway_bytes } else { 0 };
    // A guest that can't swap any more suffers, and nothing comes back to it.
    let is_spared = host.now_ms < state.spared_until_ms;
    let rescues = |distress: &Distress| tick.as_ref().is_some_and(|tick| tick.rescues(state, distress));
    let is_rescued = matches!(&reason, Reason::Relaxed(_, distress) if rescues(distress));
    let in_distress = is_spared || matches!(reason, Reason::Relaxed(..));
    Wish {
        decision: Decision { target_bytes: to_bytes, apply: !observed, reason },
        pain_percent: signals.pain_percent.max(if in_distress { DISTRESS_PERCENT } else { 0 }),
        suffers: in_distress || signals.pain_percent.min(signals.pain_now_percent) > 100,
        is_spared,
        is_rescued,
        takeable_bytes,
        available_bytes,
        spare_bytes,
        from_bytes,
        actual_bytes: memory.actual_bytes,
        waited_ticks: state.step_ticks,
        underway_bytes,
    }
}

/// One VM at one tick, with everything that a decision rests on.
struct Tick<'a> {
    host: &'a Host,
    snapshot: &'a Snapshot,
    memory: &'a GuestMemory,
    signals: &'a Signals,
    /// The target so far.
    from_bytes: u64,
    bounds: Bounds,
}

impl Tick<'_> {
    fn decide(&self, state: &mut State) -> (u64, Reason) {
        // What a kill has freed was no headroom before it.
        let has_headroom = self.signals.oom_kills == 0
            && self.signals.available_bytes.is_some_and(|bytes| bytes >= self.headroom_bytes());
        if self.pushes_out() || has_headroom {
            state.dry_bytes = 0;
        }
        let has_read = state.dry_loads.is_some_and(|loads| loads != self.snapshot.counters.loads);
        if self.pushes_out() || has_read || self.host.now_ms >= state.dry_until_ms {
            state.dry_loads = None;
        }
        // The operator's most is waited for no longer than until it has hurt, unless something was about to be killed.
        let is_lowered = self.from_bytes > self.bounds.max_bytes;
        let goes_on = is_lowered && self.host.now_ms < state.back_off_until_ms;
        let distress = self.distress(state).filter(|(_, distress)| !goes_on || distress.has_nowhere_to_go());
        if let Some((to_bytes, distress)) = distress {
            self.back_off(state, &distress);
            state.edge_bytes = self.from_bytes;
            // Where there is no more to be had it stays, and the reason is still worth knowing.
            let to_bytes = to_bytes.max(self.from_bytes);
            return (to_bytes, Reason::Relaxed(to_bytes - self.from_bytes, distress));
        }
        if let Some(to_bytes) = self.lower(state) {
            return (to_bytes, Reason::Squeezed(self.from_bytes - to_bytes));
        }
        if let Some(hold) = self.hold(state) {
            let given_up = hold == Hold::Underway && state.target_ticks > PATIENCE_TICKS;
            let bytes = if given_up { self.memory.actual_bytes } else { self.from_bytes };
            return (bytes.max(self.bounds.min_bytes), Reason::Held(hold));
        }
        self.squeeze(state)
    }

    /// A step to the most that it may have, where that was lowered and it can take one.
    fn lower(&self, state: &State) -> Option<u64> {
        let has_reached = self.memory.actual_bytes <= reached_bytes(self.from_bytes);
        let promised_bytes = self.from_bytes.saturating_sub(self.memory.actual_bytes);
        let step_bytes = promised_bytes.saturating_add(self.takeable_bytes(state));
        let step_bytes = step_bytes.min(self.from_bytes / LOWERING_PART);
        let to_bytes = self.bounds.below(self.from_bytes, step_bytes).max(self.bounds.max_bytes);
        (has_reached && to_bytes < self.from_bytes).then_some(to_bytes)
    }

    /// The most that may be taken of what it has, in bytes: where its pages have nowhere to go, or it was asked for enough to
    /// show whether it swaps and never did, only what it doesn't use; until it is known to swap, or to swap still, a small step
    /// more; and else so much that it keeps its leeway.
    fn takeable_bytes(&self, state: &State) -> u64 {
        let left_bytes = self.signals.left_bytes;
        let kept_bytes = LEFT_GROWTHS.saturating_mul(self.signals.grown_bytes);
        let unused_bytes = left_bytes.saturating_sub(kept_bytes.max(self.least_headroom_bytes()));
        let is_spared = self.host.now_ms < state.spared_until_ms;
        if is_spared || self.nowhere_to_go(state).is_some() {
            return unused_bytes;
        }
        let room_bytes = self.places().map(|place| place.room_bytes()).min().unwrap_or(u64::MAX);
        let leeway_bytes = room_bytes.saturating_add(left_bytes);
        let pushed_bytes = leeway_bytes.saturating_sub(kept_bytes.max(self.leeway_bytes()));
        let is_tried = state.dry_bytes > self.memory.actual_bytes / DRY_PART;
        let tried_bytes = unused_bytes.saturating_add(self.cold_step_bytes());
        // One that was heard once and was not found out is taken to push out, as one that never says anything.
        match (self.pushes_out() || self.signals.is_stale, self.swaps(state)) {
            (true, _) => pushed_bytes,
            // It may just not have had to yet: were it left alone, an idle guest would keep what others lack.
            (false, true) if is_tried => pushed_bytes.min(tried_bytes),
            (false, true) => pushed_bytes,
            (false, false) if is_tried => pushed_bytes.min(unused_bytes),
            (false, false) => tried_bytes,
        }
    }

    /// Whether it hurts, and what the guest should have then.
    fn distress(&self, state: &State) -> Option<(u64, Distress)> {
        let Signals { promoted, pain_percent, stored_bytes, failed_stores, took_bytes, .. } = *self.signals;
        let Signals { grown_bytes, available_bytes, .. } = *self.signals;
        let actual_bytes = self.memory.actual_bytes;
        let reached_bytes = reached_bytes(self.from_bytes);
        let more = |bytes: u64| self.bounds.above(self.from_bytes.max(actual_bytes), bytes);
        let half_way_bytes = self.bounds.max_bytes.saturating_sub(self.from_bytes) / 2;
        if self.signals.oom_kills > 0 {
            return Some((self.bounds.max_bytes, Distress::OomKill));
        }
        if self.signals.storm && self.refilling().is_none() {
            let back = promoted.saturating_add(self.signals.reread);
            let bytes = half_way_bytes.max(back.saturating_mul(4 * PAGE_SIZE_U64));
            return Some((more(bytes), Distress::RefaultStorm(back)));
        }
        if failed_stores > 0 {
            return Some((more(half_way_bytes), Distress::StoresFailed(failed_stores)));
        }
        let on_its_way_bytes = if state.target_ticks > 1 { 0 } else { state.before_bytes };
        let by_itself = actual_bytes > reached_bytes.max(on_its_way_bytes);
        if took_bytes >= REACHED_BYTES_MIN / 2 && by_itself {
            return Some((more(took_bytes.max(actual_bytes / RELAX_PART)), Distress::TookBack(took_bytes)));
        }
        if self.is_cornered() {
            return Some((more(actual_bytes / RELAX_PART), Distress::Cornered));
        }
        if self.signals.is_stale && pain_percent >= 100 {
            return Some((more(half_way_bytes), Distress::Unheard));
        }
        let given_just_now = self.host.now_ms < state.given_until_ms(self.host.interval_ms);
        let too_much = if given_just_now { RELAX_AGAIN_PERCENT } else { RELAX_PERCENT };
        if pain_percent > too_much && promoted > 0 && self.refilling().is_none() {
            let bytes = (actual_bytes / RELAX_PART).max(promoted.saturating_mul(2 * PAGE_SIZE_U64));
            return Some((more(bytes), Distress::TooMuchBack(pain_percent)));
        }
        let needs_bytes =
            if self.swaps(state) { grown_bytes } else { grown_bytes.saturating_mul(HEADROOM_GROWTHS) };
        if needs_bytes > available_bytes.unwrap_or(u64::MAX).max(self.quick_bytes(state)) {
            let bytes = (actual_bytes / RELAX_PART).max(grown_bytes.saturating_mul(2));
            return Some((more(bytes), Distress::Growing(grown_bytes)));
        }
        let unasked = state.step_ticks > STEP_TICKS && actual_bytes <= reached_bytes;
        if unasked && stored_bytes > actual_bytes / GROWING_PART {
            let bytes = (actual_bytes / RELAX_PART).max(stored_bytes.saturating_mul(2));
            return Some((more(bytes), Distress::Growing(stored_bytes)));
        }
        // One that is known to swap may have more to spare than it says, and pushes something out when that is gone.
        let nothing_bytes = if self.swaps(state) {
            actual_bytes / GROWING_UNSWAPPED_PART
        } else {
            self.leeway_bytes() / CORNERED_PART
        };
        let has_nothing = available_bytes.is_some_and(|bytes| bytes < nothing_bytes);
        let tried = state.dry_bytes > actual_bytes / DRY_PART && actual_bytes <= reached_bytes && has_nothing;
        let not_swapping = tried && !self.pushes_out() && self.nowhere_to_go(state).is_none();
        (not_swapping && self.free_step_bytes() == 0)
            .then(|| (self.bounds.above(self.from_bytes, self.headroom_bytes()), Distress::NotSwapping))
    }

    /// Whether it has next to no leeway, or may have none at the next tick if it grows as it did.
    fn is_cornered(&self) -> bool {
        let growth_bytes = self.signals.look.growth_bytes;
        self.place_with_less_than((self.leeway_bytes() / CORNERED_PART).max(growth_bytes)).is_some()
    }

    /// Whether something in it is killed unless it is relaxed, whatever else hurts.
    fn rescues(&self, state: &State, distress: &Distress) -> bool {
        distress.has_nowhere_to_go() || !self.swaps(state) || self.is_cornered()
    }

    /// Leaves the VM alone for a while; twice as long when it hurt soon after it had been left alone.
    fn back_off(&self, state: &mut State, distress: &Distress) {
        let now_ms = self.host.now_ms;
        let in_ticks = |ticks: u64| ticks.saturating_mul(self.host.interval_ms);
        let ended_ms = state.back_off_until_ms;
        let long_calm = now_ms
            > ended_ms.saturating_add(in_ticks(CALM_BACK_OFFS * state.back_off_ticks.max(BACK_OFF_TICKS)));
        if long_calm {
            state.back_off_ticks = BACK_OFF_TICKS;
        } else if now_ms >= ended_ms && !matches!(distress, Distress::Growing(_)) {
            state.back_off_ticks = (state.back_off_ticks * 2).clamp(BACK_OFF_TICKS, BACK_OFF_TICKS_MAX);
        }
        state.back_off_until_ms = now_ms.saturating_add(in_ticks(state.back_off_ticks.max(BACK_OFF_TICKS)));
        if self.rescues(state, distress) {
            state.spared_until_ms = now_ms.saturating_add(in_ticks(BACK_OFF_TICKS));
        }
        // One that kills or lets air out of its balloon while nothing was pushed out has shown the same.
        let at_last = matches!(distress, Distress::OomKill | Distress::TookBack(_)) && state.dry_bytes > 0;
        if at_last || matches!(distress, Distress::NotSwapping) {
            (state.dry_bytes, state.dry_loads) = (0, Some(self.snapshot.counters.loads));
            state.dry_until_ms = now_ms.saturating_add(in_ticks(DRY_TICKS));
        }
    }

    /// Why nothing is taken now, if nothing is.
    fn hold(&self, state: &State) -> Option<Hold> {
        let left_ms = state.back_off_until_ms.saturating_sub(self.host.now_ms);
        if left_ms > 0 {
            return Some(Hold::BackOff(left_ms));
        }
        // A page now and then comes back to every guest. Whatever does: what is free beside the room for it nobody misses.
        let much_back = self.signals.pain_percent.max(self.signals.pain_now_percent) >= 100;
        if much_back && self.spare_bytes() == 0 {
            if let Some(spare_bytes) = self.refilling() {
                return Some(Hold::Refilling(spare_bytes));
            }
            if self.signals.pain_percent >= 100 {
                return Some(Hold::Enough);
            }
        }
        if self.signals.is_stale {
            return Some(Hold::StatsOld);
        }
        if self.signals.grown_bytes > self.memory.actual_bytes / GROWING_PART {
            return Some(Hold::Growing(self.signals.grown_bytes));
        }
        if self.memory.actual_bytes > reached_bytes(self.from_bytes) {
            return Some(Hold::Underway);
        }
        (self.from_bytes <= self.bounds.min_bytes).then_some(Hold::AtMinimum)
    }

    /// Why pages have nowhere to go now: what the guest doesn't use can be taken all the same.
    fn nowhere_to_go(&self, state: &State) -> Option<Hold> {
        let held = &self.snapshot.held;
        if self.signals.delayed_stores > 0 || held.waiting_stores > 0 || self.host.is_stuck() {
            return Some(Hold::PoolBusy);
        }
        if state.dry_loads.is_some() {
            return Some(Hold::NotSwapping);
        }
        if !self.swaps(state) && self.signals.grown_bytes > self.quick_bytes(state) {
            return Some(Hold::Growing(self.signals.grown_bytes));
        }
        let full = self.places().find(Place::is_nearly_full).map(|place| place.hold);
        full.or_else(|| self.place_with_less_than(self.or_growth_bytes(self.leeway_bytes())))
            .or_else(|| room::hardly_shrinks(held).then_some(Hold::HardlyShrinks))
    }

    /// What has so little room that the guest could use less than this at once, with what it has to spare.
    fn place_with_less_than(&self, bytes: u64) -> Option<Hold> {
        let available_bytes = self.signals.available_bytes.unwrap_or(0);
        let has_less = |place: &Place| place.room_bytes().saturating_add(available_bytes) < bytes;
        self.places().find(has_less).map(|place| place.hold)
    }

    fn places(&self) -> impl Iterator<Item = Place> {
        room::places(self.host, &self.snapshot.held)
    }

    /// What it has to spare, if that is enough for all that comes back: it was given memory, and makes use of it.
    fn refilling(&self) -> Option<u64> {
        let back_bytes = self.signals.promoted.saturating_mul(PAGE_SIZE_U64);
        let enough_bytes = back_bytes.max(self.headroom_bytes()).saturating_mul(2);
        self.signals.available_bytes.filter(|bytes| back_bytes > 0 && *bytes >= enough_bytes)
    }

    /// What nobody would miss: above the headroom, and above what comes back for a while.
    fn spare_bytes(&self) -> u64 {
        let back_bytes = self.signals.promoted.saturating_mul(PAGE_SIZE_U64);
        let kept_bytes = self.headroom_bytes().saturating_add(back_bytes.saturating_mul(REFILL_TICKS));
        self.signals.left_bytes.saturating_sub(kept_bytes)
    }

    fn headroom_bytes(&self) -> u64 {
        self.or_growth_bytes(self.least_headroom_bytes())
    }

    /// What a guest could begin to use at least before something is killed, for it to be squeezed into what it uses.
    fn leeway_bytes(&self) -> u64 {
        (self.memory.actual_bytes / LEEWAY_PART).clamp(LEEWAY_BYTES_MIN, LEEWAY_BYTES_MAX)
    }

    fn least_headroom_bytes(&self) -> u64 {
        (self.memory.actual_bytes / HEADROOM_PART).max(HEADROOM_BYTES_MIN)
    }

    /// So much, or what it lately grew by in some ticks, if that is more.
    fn or_growth_bytes(&self, bytes: u64) -> u64 {
        bytes.max(HEADROOM_GROWTHS.saturating_mul(self.signals.look.growth_bytes))
    }

    /// A step down: what is free first and fast, then what is in use, the slower the more comes back.
    fn squeeze(&self, state: &mut State) -> (u64, Reason) {
        let free_bytes = self.free_step_bytes();
        let nowhere_to_go = self.nowhere_to_go(state);
        if let Some(hold) = nowhere_to_go.as_ref().filter(|_| free_bytes == 0) {
            return (self.from_bytes, Reason::Held(*hold));
        }
        let near_edge = self.from_bytes.abs_diff(state.edge_bytes) < state.edge_bytes / EDGE_PART;
        let slower = if near_edge { EDGE_STEPS } else { 1 };
        let slower = if self.signals.available_bytes.is_none() { slower * MUTE_PART } else { slower };
        let cold_bytes = self.cold_step_bytes() / slower;
        let cold_bytes = cold_bytes * (100 - self.signals.pain_percent.min(100)) / 100;
        let cold_bytes = if nowhere_to_go.is_some() { 0 } else { cold_bytes };
        let elsewhere_percent = self.signals.elsewhere_percent;
        if free_bytes == 0 && elsewhere_percent > ELSEWHERE_PERCENT {
            // Tried again once that is some ticks ago, by a small step: its other swap may have become full.
            state.edge_bytes = self.from_bytes;
            return (self.from_bytes, Reason::Held(Hold::OtherSwap(elsewhere_percent)));
        }
        let to_bytes = self.bounds.below(self.from_bytes, free_bytes.max(cold_bytes));
        let taken_bytes = self.from_bytes - to_bytes;
        if taken_bytes == 0 {
            return (to_bytes, Reason::Held(Hold::Enough));
        }
        let reason = if free_bytes >= cold_bytes { Reason::TookFree } else { Reason::Squeezed };
        (to_bytes, reason(taken_bytes))
    }

    fn free_step_bytes(&self) -> u64 {
        (self.spare_bytes() / FREE_STEP_PART).min(self.memory.actual_bytes / FREE_STEP_MAX_PART)
    }

    fn cold_step_bytes(&self) -> u64 {
        (self.memory.actual_bytes / COLD_STEP_PART).min(COLD_STEP_BYTES_MAX)
    }

    /// Whether it is known to swap: the header alone is no page of its, and once it was found not to swap any more what is on
    /// its disk only has not been discarded.
    fn swaps(&self, state: &State) -> bool {
        self.pushes_out() || (self.snapshot.held.stored_pages > 1 && state.dry_loads.is_none())
    }

    /// What a guest begins to use in a tick before that is quick, in bytes; of one that isn't known to swap it is less.
    fn quick_bytes(&self, state: &State) -> u64 {
        self.memory.actual_bytes / if self.swaps(state) { GROWING_FAST_PART } else { GROWING_UNSWAPPED_PART }
    }

    /// Whether it pushes pages out; one that doesn't say what it has to spare is taken to.
    fn pushes_out(&self) -> bool {
        let out_bytes = self.signals.stored_bytes.saturating_add(self.signals.out_elsewhere_bytes);
        out_bytes > 0 || (self.signals.available_bytes.is_none() && !self.signals.is_stale)
    }
}

/// The most that a guest has which has reached its target, in bytes.
fn reached_bytes(target_bytes: u64) -> u64 {
    let near_bytes = (target_bytes / REACHED_PART).clamp(REACHED_BYTES_MIN, REACHED_BYTES_MAX);
    target_bytes.saturating_add(near_bytes)
}
