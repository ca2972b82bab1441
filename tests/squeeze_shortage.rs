//! What is taken for a host that is short of memory, and what isn't: nothing that a guest uses where its pages have nowhere to
//! go, and nothing of one that had just nowhere to push them while others have something.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use ballast::balloon::{Distress, Hold, Mode, Pressure, Reason, State};

#[path = "support/squeezed.rs"]
mod squeezed;

use squeezed::{MIB, Seen, check, relaxed, seen};

const HALF_MIB: u64 = MIB / 2;

#[test]
fn what_has_nowhere_to_go_is_not_taken_for_the_host() {
    let held = |hold| Reason::Held(hold);
    check(vec![
        (
            "its disk is nearly full",
            20,
            |seen| (seen.pressure, seen.snapshot.held.stored_pages) = (Pressure::Severe, 950_000),
            512,
            held(Hold::DiskFull),
        ),
        (
            "what it has to spare is taken from it all the same",
            100,
            |seen| (seen.pressure, seen.snapshot.held.stored_pages) = (Pressure::Severe, 950_000),
            469,
            Reason::TookForHost(42 * MIB + HALF_MIB),
        ),
        (
            "its pages hardly shrink",
            20,
            |seen| {
                seen.pressure = Pressure::Severe;
                (seen.snapshot.held.pool_pages, seen.snapshot.held.pool_bytes) = (4096, 14 * MIB);
            },
            512,
            held(Hold::HardlyShrinks),
        ),
        (
            "its stores wait",
            20,
            |seen| (seen.pressure, seen.snapshot.held.waiting_stores) = (Pressure::Severe, 1),
            512,
            held(Hold::PoolBusy),
        ),
        (
            "its disk has room for 17 MiB more: it keeps 16 that it could begin to use",
            20,
            |seen| {
                let held = &mut seen.snapshot.held;
                (seen.pressure, held.size_bytes, held.stored_pages) = (Pressure::Severe, 100 * MIB, 20480);
            },
            491,
            Reason::TookForHost(21 * MIB),
        ),
        (
            "it began to use 6 MiB more as well: it keeps four times that",
            26,
            |seen| {
                let held = &mut seen.snapshot.held;
                (seen.pressure, held.size_bytes, held.stored_pages) = (Pressure::Severe, 100 * MIB, 20480);
                seen.stats.available_bytes = Some(20 * MIB);
            },
            499,
            Reason::TookForHost(13 * MIB),
        ),
        (
            "it hasn't shown yet that it swaps: no more than it would be tried by",
            10,
            |seen| seen.pressure = Pressure::Severe,
            504,
            Reason::Squeezed(8 * MIB),
        ),
    ]);
}

/// A guest with no swap, and a host that is very short of memory all the time.
#[test]
fn a_guest_without_swap_keeps_its_headroom_whatever_the_host_lacks() {
    let (mut seen, mut state) = (seen(10), State::default());
    seen.pressure = Pressure::Severe;
    let mut reasons = Vec::new();
    for tick in 0..400 {
        let (before_bytes, was_found) = (seen.memory.actual_bytes, state.dry_loads.is_some());
        let decision = seen.decide(tick, &mut state);
        reasons.push(decision.reason);
        assert!(!was_found || decision.target_bytes >= before_bytes, "{reasons:?}");
        seen.memory.actual_bytes = decision.target_bytes;
        let available_bytes = seen.stats.available_bytes.unwrap() + decision.target_bytes;
        seen.stats.available_bytes = Some(available_bytes.saturating_sub(before_bytes));
    }
    assert_eq!(state.dry_loads, Some(0), "it is not found out: {reasons:?}");
    assert_eq!(reasons.last(), Some(&Reason::Held(Hold::NotSwapping)));
    assert!(seen.stats.available_bytes >= Some(4 * MIB), "{:?}", seen.stats);
    // Its swap is switched on, and the header read: it is tried again.
    seen.snapshot.counters.loads += 1;
    let decision = seen.decide(400, &mut state);
    assert!(matches!(decision.reason, Reason::Squeezed(_) | Reason::TookForHost(_)), "{decision:?}");
}

/// Its swap was used and switched off, and that was found out: what is left on its disk is no sign that it swaps.
#[test]
fn a_guest_that_swaps_no_more_is_given_what_it_grows_by_before_it_has_nothing_to_spare() {
    let (mut seen, mut state) =
        (seen(20), State { dry_loads: Some(0), dry_until_ms: u64::MAX, ..State::default() });
    seen.snapshot.held.stored_pages = 1000;
    seen.decide(0, &mut state);
    seen.stats.available_bytes = Some(10 * MIB);
    let decision = seen.decide(1, &mut state);
    assert_eq!(decision.reason, relaxed(32, Distress::Growing(10 * MIB)));
}

/// It was found not to swap; then it says nothing of itself for long, and the host is very short of memory.
#[test]
fn a_guest_without_swap_that_says_nothing_any_more_is_left_what_it_has() {
    let (mut seen, mut state) =
        (seen(10), State { dry_loads: Some(0), dry_until_ms: u64::MAX, ..State::default() });
    seen.pressure = Pressure::Severe;
    seen.decide(0, &mut state);
    seen.stats.age = std::time::Duration::from_secs(60);
    for tick in 1..5 {
        let decision = seen.decide(tick, &mut state);
        assert_eq!(decision.target_bytes, 512 * MIB, "{decision:?}");
        assert_eq!(state.dry_loads, Some(0));
    }
}

/// Its swap was used, and is switched off: pages stay on the disk, and nothing comes any more.
#[test]
fn a_guest_whose_swap_was_switched_off_is_tried_by_little_more_than_a_sixteenth() {
    let (mut seen, mut state) = (seen(10), State::default());
    (seen.pressure, seen.snapshot.held.stored_pages) = (Pressure::Severe, 1000);
    seen.decide(0, &mut state);
    for tick in 1..50 {
        let decision = seen.decide(tick, &mut state);
        assert!(decision.target_bytes >= 512 * MIB - 2 * 33 * MIB, "{decision:?}");
        seen.memory.actual_bytes = decision.target_bytes;
        // What can't be swapped is killed, and something else wants that memory.
        seen.stats.available_bytes = Some(MIB);
    }
    assert_eq!(state.dry_loads, Some(0));
}

/// It killed as it was tried, which freed a lot: it is not tried again, whatever the host lacks.
#[test]
fn a_guest_without_swap_that_killed_is_left_all_it_uses_however_much_the_kill_freed() {
    let (mut seen, mut state) = (seen(6), State { dry_bytes: 8 * MIB, ..State::default() });
    seen.pressure = Pressure::Severe;
    seen.decide(0, &mut state);
    (seen.stats.oom_kills, seen.stats.available_bytes) = (Some(1), Some(80 * MIB));
    let decision = seen.decide(1, &mut state);
    assert!(matches!(decision.reason, Reason::Relaxed(_, Distress::OomKill)), "{decision:?}");
    seen.memory.actual_bytes = decision.target_bytes;
    seen.stats.available_bytes = Some(6 * MIB);
    for tick in 2..200 {
        let then = seen.decide(tick, &mut state);
        assert!(then.target_bytes >= decision.target_bytes, "{tick}: {then:?}");
    }
}

/// It repeats what it said last while it is squeezed: what was taken since is not there to be taken again.
#[test]
fn what_a_guest_said_once_that_it_has_to_spare_is_taken_once() {
    let (mut seen, mut state) =
        (seen(74), State { dry_loads: Some(0), dry_until_ms: u64::MAX, ..State::default() });
    seen.pressure = Pressure::Severe;
    seen.stats.update = Some(7);
    for tick in 0..50 {
        seen.memory.actual_bytes = seen.decide(tick, &mut state).target_bytes;
    }
    // It uses 438 MiB, and keeps a sixteenth of what it has.
    assert_eq!(seen.memory.actual_bytes / MIB, 467);
}

/// A sixteenth was taken of a guest that still has something to spare, and so had nothing to push out yet; it is left alone, and
/// the host is short of memory.
#[test]
fn a_guest_that_swaps_is_not_spared_because_it_had_nothing_to_push_out_yet() {
    let held = Reason::Held(Hold::BackOff(u64::MAX - 1_005_000));
    for (stored_pages, target_mib, reason) in [(1000, 504, Reason::TookForHost(8 * MIB)), (0, 512, held)] {
        let mut seen = seen(12);
        (seen.pressure, seen.snapshot.held.stored_pages) = (Pressure::Severe, stored_pages);
        let mut state = State { dry_bytes: 33 * MIB, back_off_until_ms: u64::MAX, ..State::default() };
        seen.decide(0, &mut state);
        let decision = seen.decide(1, &mut state);
        assert_eq!((decision.target_bytes / MIB, decision.reason), (target_mib, reason), "{stored_pages}");
    }
}

/// After a process was killed, stores failed or it had no room: what is decided a tick later, with nothing to spare.
#[test]
fn what_was_given_because_pages_had_nowhere_to_go_is_not_taken_back_at_the_next_tick() {
    let rows: [fn(&mut Seen); 3] = [
        |seen| seen.stats.oom_kills = Some(1),
        |seen| seen.snapshot.counters.failed_stores = 1,
        |seen| seen.snapshot.held.stored_pages = 1_040_000,
    ];
    for (row, happens) in rows.into_iter().enumerate() {
        for pressure in [Pressure::Moderate, Pressure::Severe] {
            let (mut seen, mut state) = (seen(7), State::default());
            seen.pressure = pressure;
            // It swaps, as far as anybody knows.
            seen.decide(0, &mut state);
            seen.snapshot.counters.stores += 1;
            happens(&mut seen);
            let given = seen.decide(1, &mut state);
            assert!(given.target_bytes > 512 * MIB, "{row}: {given:?}");
            // It uses all that at once, and there is room again.
            seen.memory.actual_bytes = given.target_bytes;
            seen.snapshot.held.stored_pages = 100;
            for tick in 2..8 {
                seen.snapshot.counters.stores += 1;
                let then = seen.decide(tick, &mut state);
                assert!(then.target_bytes >= given.target_bytes, "{row}, tick {tick}: {then:?}");
                let is_held = matches!(then.reason, Reason::Held(Hold::BackOff(_)) | Reason::Rationed(_));
                assert!(tick == 2 || is_held, "{row}, tick {tick}: {then:?}");
            }
        }
    }
}

#[test]
fn a_most_that_was_lowered_is_waited_for_while_something_would_be_killed() {
    let lower: fn(&mut Seen) = |seen| seen.snapshot.max_bytes = 256 * MIB;
    check(vec![
        (
            "a process was killed",
            10,
            |seen| (seen.snapshot.max_bytes, seen.stats.oom_kills) = (256 * MIB, Some(1)),
            512,
            relaxed(0, Distress::OomKill),
        ),
        (
            "its disk is nearly full",
            10,
            |seen| (seen.snapshot.max_bytes, seen.snapshot.held.stored_pages) = (256 * MIB, 950_000),
            512,
            Reason::Held(Hold::DiskFull),
        ),
        ("no faster than it shows that it swaps", 10, lower, 504, Reason::Squeezed(8 * MIB)),
    ]);
}

#[test]
fn a_guest_that_has_not_taken_the_last_step_is_waited_for() {
    for max_mib in [u64::MAX >> 20, 256] {
        let (mut seen, mut state) = (seen(10), State::default());
        seen.snapshot.max_bytes = max_mib * MIB;
        seen.decide(0, &mut state);
        assert_eq!(seen.decide(1, &mut state).reason, Reason::Squeezed(8 * MIB), "{max_mib}");
        assert_eq!(seen.decide(2, &mut state).reason, Reason::Held(Hold::Underway), "{max_mib}");
    }
}

/// A guest takes memory out of its balloon so many ticks after a step; that is seen whenever it is.
#[test]
fn what_a_guest_takes_back_by_itself_is_seen_however_soon_after_a_step() {
    for (ticks, took_mib) in [(0, 8), (1, 25), (2, 25)] {
        let (mut seen, mut state) = (seen(100), State::default());
        seen.snapshot.min_bytes = 495 * MIB;
        seen.decide(0, &mut state);
        assert_eq!(seen.decide(1, &mut state).reason, Reason::TookFree(17 * MIB));
        for tick in 0..ticks {
            seen.memory.actual_bytes = 495 * MIB;
            assert_eq!(seen.decide(2 + tick, &mut state).reason, Reason::Held(Hold::AtMinimum));
        }
        seen.memory.actual_bytes = 520 * MIB;
        let decision = seen.decide(2 + ticks, &mut state);
        let given = decision.target_bytes - 495 * MIB;
        assert_eq!(decision.reason, Reason::Relaxed(given, Distress::TookBack(took_mib * MIB)), "{ticks}");
        assert_eq!(decision.target_bytes, 552 * MIB + HALF_MIB, "{ticks}");
    }
}

#[test]
fn what_a_guest_was_promised_before_it_was_told_of_less_it_has_not_taken_by_itself() {
    let (mut seen, mut state) = (seen(10), State::default());
    for (tick, to_mib, has_mib) in [(0, 600, 512), (1, 560, 540)] {
        (seen.snapshot.mode, seen.memory.actual_bytes) = (Mode::Fixed(to_mib * MIB), has_mib * MIB);
        seen.decide(tick, &mut state);
    }
    (seen.snapshot.mode, seen.memory.actual_bytes) = (Mode::Auto, 590 * MIB);
    seen.stats.available_bytes = Some(60 * MIB);
    let decision = seen.decide(2, &mut state);
    assert!(!matches!(decision.reason, Reason::Relaxed(_, Distress::TookBack(_))), "{decision:?}");
    // It still grows when it has long been told.
    (seen.memory.actual_bytes, seen.stats.available_bytes) = (598 * MIB, Some(68 * MIB));
    let decision = seen.decide(3, &mut state);
    assert!(matches!(decision.reason, Reason::Relaxed(_, Distress::TookBack(_))), "{decision:?}");
}

/// A sixteenth of what it has is 32 MiB: with less than that to spare, what it reads from its own disks was its cache.
#[test]
fn what_a_guest_reads_from_its_own_disks_counts_only_where_it_has_nothing_to_spare() {
    check(vec![
        (
            "just less",
            31,
            |seen| seen.stats.major_faults = Some(2000),
            768,
            relaxed(256, Distress::RefaultStorm(2000)),
        ),
        ("just more", 33, |seen| seen.stats.major_faults = Some(2000), 504, Reason::Squeezed(8 * MIB)),
    ]);
}
