//! What two looks at a VM say of it: how much comes back and how long the guest waits for that, smoothed over some ticks,
//! and what happened since the last one. The measure is far memory's promotion rate (Lagar-Cavilla et al., ASPLOS 2019),
//! with a bound on the time spent waiting beside it, as Senpai has (Weiner et al., ASPLOS 2022): a page out of the file
//! hurts a hundred times as much as one out of the pool.

use serde::{Deserialize, Serialize};

use super::elsewhere::{Pages, Swapping};
use super::snapshot::{Counters, Snapshot};
use super::vmm::{GuestMemory, GuestStats};
use crate::page::PAGE_SIZE_U64;

/// Ticks over which rates are smoothed.
pub(super) const WINDOW_TICKS: u64 = 12;
/// The share of time that a guest may spend waiting for loads, in parts per million. Senpai has 0.1 % of a container's time;
/// here the waits of all of a guest's processors are added up.
pub(super) const STALL_PPM: u64 = 10_000;
/// What comes back in a tick counts as so many times what may, at most: an outburst says no more of the next minute.
const OUTBURST: u64 = 60;
/// A page that had been away for minutes counts as this part of one.
const OLD_PART: u64 = 4;
/// By so much a tick it is forgotten how much a guest lately began to use, in parts of that.
const GROWTH_FORGOTTEN_PART: u64 = 8;
/// Guest statistics older than so many ticks are none.
const STALE_TICKS: u64 = 4;
/// Looks that are further apart than so many ticks can't be compared.
const GAP_TICKS: u64 = 4;
/// Memory that the guest could use below this, in parts of what it has, is none to speak of: what it reads from its own disks
/// it had before.
const CACHE_PART: u64 = 16;
/// So much of the working set back within one tick is a storm, in parts of it; fewer pages than that never are.
const STORM_PART: u64 = 100;
const STORM_PAGES_MIN: u64 = 256;
/// Less than this pushed out elsewhere in a tick, in parts of what the guest has, is not worth speaking of.
const NOTABLE_PART: u64 = 16384;

/// What is kept of a look for the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Look {
    /// When it was, by the boot-time clock in milliseconds.
    pub at_ms: u64,
    /// The counters then.
    pub counters: Counters,
    /// What the guest had then, in bytes.
    pub actual_bytes: u64,
    /// What it used of its memory when it said so last, in bytes, if it ever did.
    pub used_bytes: Option<u64>,
    /// The counters as they were when that was news.
    pub said_counters: Counters,
    /// Which of its statistics that was, if they have numbers.
    pub said_update: Option<u64>,
    /// Faults that waited for a disk, if it said so.
    pub major_faults: Option<u64>,
    /// Processes that it had killed, if it said so.
    pub oom_kills: Option<u64>,
    /// What it swaps, with us and with others.
    #[serde(default)]
    pub swapping: Swapping,
    /// What came back, smoothed: parts of the working set a minute, in millionths.
    pub promotion_ppm: u64,
    /// Time spent waiting for loads, smoothed, in millionths.
    pub stall_ppm: u64,
    /// The most that it began to use in a tick lately, in bytes; forgotten by an eighth a tick.
    pub growth_bytes: u64,
}

impl Look {
    /// Of what the guest pushes out lately, the part that goes to another swap than ours, in millionths, as far as that is
    /// worth speaking of; `None` if it doesn't say what it swaps.
    #[must_use]
    pub fn other_swap_ppm(&self) -> Option<u64> {
        self.swapping.is_told().then(|| self.swapping.elsewhere_ppm(self.actual_bytes / NOTABLE_PART))
    }
}

/// What is known of a VM at a tick.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Signals {
    /// This look.
    pub look: Look,
    /// What comes back and how long that takes, the worse of both, in percent of what may.
    pub pain_percent: u64,
    /// The same of this tick alone.
    pub pain_now_percent: u64,
    /// Memory that the guest could use without swapping, in bytes, if it says so.
    pub available_bytes: Option<u64>,
    /// What of that is left to be taken for certain, in bytes: some may have been since it said so.
    pub left_bytes: u64,
    /// Whether it says so now and then, but has not for too long.
    pub is_stale: bool,
    /// What it began to use since the last look, in bytes: room that it made by pushing pages out counts.
    pub grown_bytes: u64,
    /// Pages that came back since the last look, wherever from.
    pub promoted: u64,
    /// Pages that it read again from disks of its own: the cache that was taken.
    pub reread: u64,
    /// Whether both together are a storm.
    pub storm: bool,
    /// Bytes that it pushed out to us since then.
    pub stored_bytes: u64,
    /// Bytes that it pushed out elsewhere by the time that it spoke before, if it has spoken again.
    pub out_elsewhere_bytes: u64,
    /// Of all that it pushes out lately, what goes elsewhere, in percent, if that is worth speaking of.
    pub elsewhere_percent: u64,
    /// Stores since then that waited.
    pub delayed_stores: u64,
    /// Stores since then that failed.
    pub failed_stores: u64,
    /// Processes that it killed since then.
    pub oom_kills: u64,
    /// By how much its memory grew since then, in bytes.
    pub took_bytes: u64,
}

/// The first look at a VM.
pub(super) fn first(now_ms: u64, memory: &GuestMemory, snapshot: &Snapshot) -> Look {
    Look {
        at_ms: now_ms,
        counters: snapshot.counters,
        actual_bytes: memory.actual_bytes,
        used_bytes: used(memory, memory.guest.as_ref()),
        said_counters: snapshot.counters,
        said_update: memory.guest.and_then(|guest| guest.update),
        major_faults: memory.guest.and_then(|guest| guest.major_faults),
        oom_kills: memory.guest.and_then(|guest| guest.oom_kills),
        swapping: Swapping::from(now_ms),
        ..Look::default()
    }
}

/// A look after another; `None` if that was too long ago.
pub(super) fn next(
    last: &Look,
    now_ms: u64,
    interval_ms: u64,
    memory: &GuestMemory,
    snapshot: &Snapshot,
) -> Option<Signals> {
    let (interval_ms, elapsed_ms) = (interval_ms.max(1), now_ms.saturating_sub(last.at_ms).max(1));
    if elapsed_ms > GAP_TICKS.saturating_mul(interval_ms) {
        return None;
    }
    let guest =
        memory.guest.filter(|guest| guest.age.as_millis() <= u128::from(STALE_TICKS * interval_ms.max(1000)));
    // QEMU asks its guest every two seconds; whoever looks more often sees the same again, beside counters that went on.
    let is_news = guest.is_some_and(|guest| guest.update.is_none() || guest.update != last.said_update);
    let said = guest.filter(|_| is_news);
    let used_bytes = used(memory, said.as_ref());
    let (now, before) = (&snapshot.counters, &last.counters);
    let working_set_bytes = working_set(memory, guest.as_ref());
    let told = said.and_then(|said| last.swapping.told(&said));
    let (mut swapping, elsewhere) = swapped_elsewhere(last, now_ms, said.as_ref(), now, working_set_bytes);
    let major_faults = guest.and_then(|guest| guest.major_faults).or(last.major_faults);
    let faults = major_faults.zip(last.major_faults).map_or(0, |(now, before)| since(now, before));
    let loaded = since(now.promoted, before.promoted);
    let promoted = loaded.saturating_add(elsewhere.back);
    let available_bytes = guest.and_then(|guest| guest.available_bytes);
    // A guest that has nothing to spare dropped its cache for the balloon, and reads it again from disks of its own.
    let has_cache = available_bytes.is_none_or(|bytes| bytes > memory.actual_bytes / CACHE_PART);
    let reread = if has_cache { 0 } else { faults.saturating_sub(promoted) };
    // What had been away for long comes back in every guest once in a while; what was pushed out just now was missed.
    let young = since(now.promoted_young, before.promoted_young).min(loaded);
    let missed = young.saturating_add((loaded - young) / OLD_PART).saturating_add(reread);
    // How long it was away elsewhere nobody tells, and that it came back is told at times that aren't ours.
    let elsewhere_ppm = if guest.is_some() { swapping.back_elsewhere_ppm } else { 0 };
    let missed_ppm = rate_ppm(missed.saturating_mul(PAGE_SIZE_U64), working_set_bytes, elapsed_ms);
    let promotion_ppm = missed_ppm.saturating_add(elsewhere_ppm);
    let stall_ppm = since(now.load_ns, before.load_ns) / elapsed_ms;
    let stored_bytes = since(now.stores, before.stores).saturating_mul(PAGE_SIZE_U64);
    let out_elsewhere_bytes = elsewhere.out.saturating_mul(PAGE_SIZE_U64);
    let grown_bytes = used_bytes.map_or(0, |used_bytes| grown_bytes(last, now, used_bytes, told));
    let mean = |before: u64, now: u64| smoothed(before, now, elapsed_ms, WINDOW_TICKS * interval_ms);
    swapping.out_bytes = mean(swapping.out_bytes, stored_bytes.saturating_add(out_elsewhere_bytes));
    swapping.out_elsewhere_bytes = mean(swapping.out_elsewhere_bytes, out_elsewhere_bytes);
    let rate = |before: u64, now: u64, most: u64| mean(before, now.min(most.saturating_mul(OUTBURST)));
    let look = Look {
        at_ms: now_ms,
        counters: *now,
        actual_bytes: memory.actual_bytes,
        used_bytes: used_bytes.or(last.used_bytes),
        said_counters: if is_news { *now } else { last.said_counters },
        said_update: if is_news { guest.and_then(|guest| guest.update) } else { last.said_update },
        major_faults,
        oom_kills: guest.and_then(|guest| guest.oom_kills).or(last.oom_kills),
        swapping,
        promotion_ppm: rate(last.promotion_ppm, promotion_ppm, snapshot.promotion_ppm),
        stall_ppm: rate(last.stall_ppm, stall_ppm, STALL_PPM),
        growth_bytes: grown_bytes.max(last.growth_bytes - last.growth_bytes / GROWTH_FORGOTTEN_PART),
    };
    let pain_percent = |promotion_ppm: u64, stall_ppm: u64| {
        percent(promotion_ppm, snapshot.promotion_ppm).max(percent(stall_ppm, STALL_PPM))
    };
    let is_storm = |pages: u64, ms: u64| pages >= storm_pages(working_set_bytes, ms.div_ceil(interval_ms));
    Some(Signals {
        pain_percent: pain_percent(look.promotion_ppm, look.stall_ppm),
        pain_now_percent: pain_percent(promotion_ppm, stall_ppm),
        available_bytes,
        left_bytes: available_bytes.map_or(0, |bytes| left_bytes(&look, bytes)),
        is_stale: memory.guest.is_some() && guest.is_none(),
        grown_bytes,
        promoted,
        reread,
        storm: is_storm(missed, elapsed_ms) || is_storm(elsewhere.back, since(now_ms, last.swapping.told_ms)),
        stored_bytes,
        out_elsewhere_bytes,
        elsewhere_percent: look.other_swap_ppm().unwrap_or(0) / 10_000,
        delayed_stores: since(now.delayed_stores, before.delayed_stores),
        failed_stores: since(now.failed_stores, before.failed_stores),
        oom_kills: look.oom_kills.zip(last.oom_kills).map_or(0, |(now, before)| since(now, before)),
        took_bytes: since(memory.actual_bytes, last.actual_bytes),
        look,
    })
}

fn since(now: u64, before: u64) -> u64 {
    now.saturating_sub(before)
}

fn percent(rate: u64, target: u64) -> u64 {
    rate.saturating_mul(100) / target.max(1)
}

/// So many pages back within so many ticks are a storm.
fn storm_pages(working_set_bytes: u64, ticks: u64) -> u64 {
    (working_set_bytes / STORM_PART / PAGE_SIZE_U64).max(STORM_PAGES_MIN).saturating_mul(ticks)
}

/// What is found to have gone elsewhere, if the guest speaks now; and what is kept of it.
fn swapped_elsewhere(
    last: &Look,
    now_ms: u64,
    said: Option<&GuestStats>,
    now: &Counters,
    working_set_bytes: u64,
) -> (Swapping, Pages) {
    let mut swapping = last.swapping;
    let Some(said) = said else { return (swapping, Pages::default()) };
    let before = &last.said_counters;
    // The guest counts a page when it begins to write it.
    let out = since(now.stores, before.stores).saturating_add(since(now.failed_stores, before.failed_stores));
    let elsewhere = swapping.note(said, Pages { back: since(now.loads, before.loads), out });
    let back_bytes = elsewhere.back.saturating_mul(PAGE_SIZE_U64);
    let elapsed_ms = since(now_ms, swapping.told_ms).max(1);
    swapping.back_elsewhere_ppm = rate_ppm(back_bytes, working_set_bytes, elapsed_ms);
    swapping.told_ms = now_ms;
    (swapping, elsewhere)
}

/// What the guest began to use since it spoke last: room that it made by pushing pages out counts. What it says of that is of
/// the same moment as what it uses; what we have counted, some of it is still to come of, stands in for a guest that doesn't.
fn grown_bytes(last: &Look, now: &Counters, used_bytes: u64, told: Option<Pages>) -> u64 {
    let Some(before_bytes) = last.used_bytes else { return 0 };
    let before = &last.said_counters;
    let seen = Pages { back: since(now.promoted, before.promoted), out: since(now.stores, before.stores) };
    let Pages { back, out } = told.unwrap_or(seen);
    let bytes = |pages: u64| pages.saturating_mul(PAGE_SIZE_U64);
    since(used_bytes.saturating_add(bytes(out)), before_bytes.saturating_add(bytes(back)))
}

/// What is left of what a guest said could be used: since it said so its balloon has grown, perhaps by what it pushed out, and
/// what came back took its place. It may be more: pages that we still have a copy of leave without a store.
fn left_bytes(look: &Look, said_bytes: u64) -> u64 {
    let Some(used_bytes) = look.used_bytes else { return said_bytes };
    let (now, then) = (&look.counters, &look.said_counters);
    let bytes = |now: u64, then: u64| since(now, then).saturating_mul(PAGE_SIZE_U64);
    let used_bytes = used_bytes.saturating_add(bytes(now.promoted, then.promoted));
    let used_bytes = used_bytes.saturating_sub(bytes(now.stores, then.stores));
    said_bytes.min(look.actual_bytes.saturating_sub(used_bytes))
}

/// What the guest works with: all but what nobody uses.
fn working_set(memory: &GuestMemory, guest: Option<&GuestStats>) -> u64 {
    let free_bytes = guest.and_then(|guest| guest.free_bytes).unwrap_or(0);
    memory.actual_bytes.saturating_sub(free_bytes).max(1 << 20)
}

fn used(memory: &GuestMemory, guest: Option<&GuestStats>) -> Option<u64> {
    Some(memory.actual_bytes.saturating_sub(guest?.available_bytes?))
}

fn rate_ppm(bytes: u64, of_bytes: u64, elapsed_ms: u64) -> u64 {
    let ppm = u128::from(bytes) * 1_000_000 * 60_000 / (u128::from(of_bytes) * u128::from(elapsed_ms));
    u64::try_from(ppm).unwrap_or(u64::MAX)
}

/// The mean over `window_ms`, in which the newest weighs most; `elapsed_ms` have gone by since the last.
fn smoothed(before: u64, now: u64, elapsed_ms: u64, window_ms: u64) -> u64 {
    let (window, share) = (u128::from(window_ms), u128::from(elapsed_ms.min(window_ms)));
    let sum = u128::from(before) * (window - share) + u128::from(now) * share;
    u64::try_from(sum / window).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::Vmm;
    use super::*;
    use std::time::Duration;

    const MIB: u64 = 1 << 20;
    const TICK_MS: u64 = 1000;

    /// A look at a guest that has said for the n-th time that so much is available.
    fn look(actual_mib: u64, update: u64, available_mib: u64, stores: u64) -> (GuestMemory, Snapshot) {
        let available_bytes = Some(available_mib * MIB);
        let guest = GuestStats {
            age: Duration::ZERO,
            update: Some(update),
            available_bytes,
            ..GuestStats::default()
        };
        let (configured_bytes, actual_bytes) = (1024 * MIB, actual_mib * MIB);
        let memory = GuestMemory { configured_bytes, actual_bytes, guest: Some(guest) };
        let snapshot = Snapshot::of_nothing(Vmm::Answers(memory));
        (memory, Snapshot { counters: Counters { stores, ..Counters::default() }, ..snapshot })
    }

    #[test]
    fn what_was_said_once_is_no_growth_at_the_next_look() {
        let (memory, snapshot) = look(512, 1, 100, 0);
        let mut last = first(0, &memory, &snapshot);
        let pages = |mib: u64| mib * MIB / PAGE_SIZE_U64;
        // What it has, how often it has said what is available, how much that is, what it has pushed out so far; and by how
        // much it grew.
        let looks = [
            // It uses 8 MiB more, for which it pushed 8 out; it has not said so yet.
            (512, 1, 100, pages(8), 0),
            (512, 2, 100, pages(8), 8),
            (512, 2, 100, pages(8), 0),
            // It was given 64 MiB, and says nothing of them for a while.
            (576, 2, 100, pages(8), 0),
            (576, 3, 164, pages(8), 0),
            // It uses 20 more, and pushed out 10 of others in two looks.
            (576, 3, 164, pages(13), 0),
            (576, 4, 154, pages(18), 20),
        ];
        for (n, (actual, update, available, stores, grown)) in (1..).zip(looks) {
            let (memory, snapshot) = look(actual, update, available, stores);
            let signals = next(&last, n * TICK_MS, TICK_MS, &memory, &snapshot).unwrap();
            assert_eq!(signals.grown_bytes, grown * MIB, "look {n}");
            last = signals.look;
        }
    }

    #[test]
    fn what_was_taken_since_it_was_said_is_not_to_spare() {
        let (memory, snapshot) = look(512, 1, 100, 0);
        let mut last = first(0, &memory, &snapshot);
        let pages = |mib: u64| mib * MIB / PAGE_SIZE_U64;
        // What it has, how often it has said what is available, how much that is, what it has pushed out so far, what has come
        // back; and what it has to spare.
        let looks = [
            (512, 1, 100, 0, 0, 100),
            (482, 1, 100, 0, 0, 70),
            // It was given some back, and pushed 20 MiB out; then 30 come back.
            (492, 1, 100, 20, 0, 100),
            (492, 1, 100, 20, 30, 70),
            // What it may have more than it said nobody knows.
            (532, 1, 100, 20, 30, 100),
            (532, 2, 90, 20, 30, 90),
            (382, 2, 90, 20, 30, 0),
        ];
        for (n, (actual, update, available, out, back, left)) in (1..).zip(looks) {
            let (memory, mut snapshot) = look(actual, update, available, pages(out));
            snapshot.counters.promoted = pages(back);
            let signals = next(&last, n * TICK_MS, TICK_MS, &memory, &snapshot).unwrap();
            assert_eq!(signals.left_bytes, left * MIB, "look {n}");
            last = signals.look;
        }
    }

    /// Pages are on their way as the guest speaks: it uses them no more, and we have yet to count them.
    #[test]
    fn what_is_on_its_way_is_neither_growth_nor_elsewhere() {
        let pages = |mib: u64| mib * MIB / PAGE_SIZE_U64;
        let at = |update: u64, available_mib: u64, swap_out_mib: u64, swap_in_mib: u64, seen: (u64, u64)| {
            let (mut memory, mut snapshot) = look(512, update, available_mib, pages(seen.0));
            let (out, back) = (Some(swap_out_mib * MIB), Some(swap_in_mib * MIB));
            memory.guest =
                memory.guest.map(|guest| GuestStats { swap_out_bytes: out, swap_in_bytes: back, ..guest });
            (snapshot.counters.loads, snapshot.counters.promoted) = (pages(seen.1), pages(seen.1));
            (memory, snapshot)
        };
        let (memory, snapshot) = at(1, 100, 0, 0, (0, 0));
        let mut last = first(0, &memory, &snapshot);
        // 40 MiB leave, 10 of them are still to come at the first look; then 20 come back, all of them still to come.
        for (n, available, out, back, seen) in [
            (2, 140, 40, 0, (30, 0)),
            (3, 120, 40, 20, (40, 0)),
            (4, 120, 40, 20, (40, 20)),
            (5, 120, 40, 20, (40, 20)),
        ] {
            let (memory, snapshot) = at(n, available, out, back, seen);
            let signals = next(&last, n * TICK_MS, TICK_MS, &memory, &snapshot).unwrap();
            assert_eq!((signals.grown_bytes, signals.out_elsewhere_bytes), (0, 0), "look {n}");
            assert_eq!(signals.look.swapping.back_elsewhere_ppm, 0, "look {n}");
            assert_eq!(signals.look.other_swap_ppm(), Some(0));
            last = signals.look;
        }
    }
}
