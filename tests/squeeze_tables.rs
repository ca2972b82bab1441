//! The balloon policy's rules as a table: a guest of 512 MiB that was booted with 1 GiB, one thing that happens to it within a
//! tick, and what is decided. The rows are those of the table in `ARCHITECTURE.md`.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::time::Duration;

use ballast::balloon::vmm::GuestStats;
use ballast::balloon::{Decision, Distress, Hold, Mode, Pressure, Reason, State, Vmm, Word};

#[path = "support/squeezed.rs"]
mod squeezed;

use squeezed::{MIB, Seen, WAIT_NS, check, relaxed, seen, silence};

#[test]
fn it_is_squeezed_while_little_comes_back() {
    check(vec![
        ("a quarter of what is free above the headroom", 256, |_| (), 456, Reason::TookFree(56 * MIB)),
        ("an eighth of what it has at most", 500, |_| (), 448, Reason::TookFree(64 * MIB)),
        ("a sixty-fourth of what is in use", 10, |_| (), 504, Reason::Squeezed(8 * MIB)),
        (
            "half of that where half as much comes back as may",
            10,
            |seen| seen.snapshot.counters.load_ns = WAIT_NS / 2,
            508,
            Reason::Squeezed(4 * MIB),
        ),
        (
            "a quarter of that where it says nothing of itself",
            10,
            |seen| seen.stats = GuestStats { age: Duration::ZERO, ..GuestStats::default() },
            510,
            Reason::Squeezed(2 * MIB),
        ),
        (
            "no lower than its least",
            256,
            |seen| seen.snapshot.min_bytes = 500 * MIB,
            500,
            Reason::TookFree(12 * MIB),
        ),
        (
            "step by step where the most was lowered",
            10,
            |seen| (seen.snapshot.max_bytes, seen.snapshot.held.stored_pages) = (256 * MIB, 100),
            480,
            Reason::Squeezed(32 * MIB),
        ),
        (
            "for the host as well",
            10,
            |seen| (seen.pressure, seen.snapshot.counters.stores) = (Pressure::Severe, 1),
            // A twentieth of what it would have had; whole units.
            478,
            Reason::TookForHost(512 * MIB - (478 * MIB + MIB / 2)),
        ),
    ]);
}

#[test]
fn what_it_does_not_use_is_taken_all_the_same() {
    let took = |mib: u64| Reason::TookFree(mib * MIB);
    check(vec![
        ("stores wait", 256, |seen| seen.snapshot.held.waiting_stores = 1, 456, took(56)),
        ("its disk is nearly full", 256, |seen| seen.snapshot.held.stored_pages = 950_000, 456, took(56)),
        (
            "a page now and then comes back to a guest with room",
            256,
            |seen| seen.snapshot.counters.promoted = 1,
            456,
            Reason::TookFree(56 * MIB - MIB / 4),
        ),
        (
            "too much comes back, and it has room for a minute of that and more",
            256,
            |seen| {
                (seen.snapshot.counters.load_ns, seen.snapshot.counters.promoted) = (WAIT_NS * 3 / 2, 1024)
            },
            468,
            took(44),
        ),
    ]);
}

#[test]
fn it_is_held_for_a_reason() {
    let held = |hold| Reason::Held(hold);
    check(vec![
        (
            "as much comes back as may",
            10,
            |seen| seen.snapshot.counters.load_ns = WAIT_NS * 3 / 2,
            512,
            held(Hold::Enough),
        ),
        (
            "it begins to use more",
            256,
            |seen| seen.stats.available_bytes = Some(246 * MIB),
            512,
            held(Hold::Growing(10 * MIB)),
        ),
        (
            "its statistics are old",
            256,
            |seen| seen.stats.age = Duration::from_secs(21),
            512,
            held(Hold::StatsOld),
        ),
        ("stores wait", 20, |seen| seen.snapshot.held.waiting_stores = 1, 512, held(Hold::PoolBusy)),
        (
            "stores have waited",
            20,
            |seen| seen.snapshot.counters.delayed_stores = 1,
            512,
            held(Hold::PoolBusy),
        ),
        (
            "others' stores wait, and the pool is full",
            20,
            |seen| (seen.waiting_stores, seen.pool_bytes) = (1, 980 * MIB),
            512,
            held(Hold::PoolBusy),
        ),
        (
            "others' stores wait for a limit of their own: the pool is between the shrinker's marks",
            10,
            |seen| (seen.waiting_stores, seen.pool_bytes) = (1, 970 * MIB),
            504,
            Reason::Squeezed(8 * MIB),
        ),
        (
            "what it uses is not taken for the host either while others' stores wait",
            10,
            |seen| {
                (seen.waiting_stores, seen.pool_bytes) = (1, 980 * MIB);
                seen.pressure = Pressure::Severe;
            },
            512,
            held(Hold::PoolBusy),
        ),
        (
            "what comes back has room",
            256,
            |seen| {
                seen.snapshot.counters.promoted = 5000;
                seen.snapshot.counters.promoted_young = 5000;
                seen.snapshot.counters.load_ns = WAIT_NS * 30;
            },
            512,
            held(Hold::Refilling(256 * MIB)),
        ),
    ]);
}

#[test]
fn it_is_held_while_there_is_nowhere_to_go() {
    let held = |hold| Reason::Held(hold);
    check(vec![
        (
            "its disk is nearly full",
            20,
            |seen| seen.snapshot.held.stored_pages = 950_000,
            512,
            held(Hold::DiskFull),
        ),
        (
            "the pool is nearly full, and its pages can't leave",
            20,
            |seen| (seen.pool_bytes, seen.snapshot.held.writeback) = (910 * MIB, false),
            512,
            held(Hold::PoolFull),
        ),
        (
            "a pool with a file is never full",
            256,
            |seen| seen.pool_bytes = 990 * MIB,
            456,
            Reason::TookFree(56 * MIB),
        ),
        (
            "its pages hardly shrink",
            20,
            |seen| (seen.snapshot.held.pool_pages, seen.snapshot.held.pool_bytes) = (4096, 14 * MIB),
            512,
            held(Hold::HardlyShrinks),
        ),
        ("it has its least", 256, |seen| seen.snapshot.min_bytes = 512 * MIB, 512, held(Hold::AtMinimum)),
    ]);
}

#[test]
fn it_is_relaxed_at_once_when_it_hurts() {
    let storm: fn(&mut Seen) = |seen| {
        seen.snapshot.counters.promoted = 2000;
        seen.snapshot.counters.promoted_young = 2000;
    };
    check(vec![
        (
            "a process was killed",
            256,
            |seen| seen.stats.oom_kills = Some(1),
            1024,
            relaxed(512, Distress::OomKill),
        ),
        ("a storm", 10, storm, 768, relaxed(256, Distress::RefaultStorm(2000))),
        (
            "a store failed",
            256,
            |seen| seen.snapshot.counters.failed_stores = 1,
            768,
            relaxed(256, Distress::StoresFailed(1)),
        ),
        (
            "too much comes back",
            10,
            |seen| (seen.snapshot.counters.load_ns, seen.snapshot.counters.promoted) = (WAIT_NS * 3, 1),
            544,
            relaxed(32, Distress::TooMuchBack(300)),
        ),
        (
            "it needs more than it has to spare",
            40,
            |seen| seen.stats.available_bytes = Some(10 * MIB),
            572,
            relaxed(60, Distress::Growing(30 * MIB)),
        ),
        (
            "it has nothing to spare and no room to push anything out",
            7,
            |seen| (seen.pool_bytes, seen.snapshot.held.writeback) = (980 * MIB, false),
            544,
            relaxed(32, Distress::Cornered),
        ),
        (
            "its statistics are old, and it hurts",
            10,
            |seen| (seen.stats.age, seen.snapshot.counters.load_ns) = (Duration::from_secs(21), WAIT_NS * 2),
            768,
            relaxed(256, Distress::Unheard),
        ),
        (
            "no further than its most",
            10,
            |seen| {
                seen.snapshot.max_bytes = 520 * MIB;
                seen.snapshot.counters.failed_stores = 1;
            },
            516,
            relaxed(4, Distress::StoresFailed(1)),
        ),
    ]);
}

/// A guest with nothing to spare that says what it swaps, looked at twice; then something happens, and what is decided at the
/// next two looks.
fn after_two_looks(happens: fn(&mut Seen)) -> (Seen, State, [Decision; 2]) {
    let mut seen = seen(10);
    let said = Some(100 * MIB);
    (seen.stats.swap_in_bytes, seen.stats.swap_out_bytes) = (said, said);
    let mut state = State::default();
    for tick in 0..2 {
        seen.memory.actual_bytes = seen.decide(tick, &mut state).target_bytes;
    }
    happens(&mut seen);
    let first = seen.decide(2, &mut state);
    seen.memory.actual_bytes = first.target_bytes;
    let second = seen.decide(3, &mut state);
    (seen, state, [first, second])
}

/// What a guest says of all its swaps and what went through us are compared; 8 MiB are 2048 pages. What it says of may be on
/// its way to us until it speaks again.
#[test]
fn what_is_swapped_elsewhere_counts_and_what_is_ours_counts_once() {
    type Row = (&'static str, fn(&mut Seen), [Word; 2]);
    const GOES_ON: [Word; 2] = [Word::Squeezing; 2];
    let rows: [Row; 9] = [
        ("nothing", |_| (), GOES_ON),
        (
            "much back from elsewhere",
            |seen| seen.stats.swap_in_bytes = Some(108 * MIB),
            [Word::Squeezing, Word::RelaxedStorm],
        ),
        (
            "a little back from elsewhere",
            |seen| seen.stats.swap_in_bytes = Some(101 * MIB + MIB / 2),
            [Word::Squeezing, Word::EnoughBack],
        ),
        (
            "back from us, of what had been away for long",
            |seen| {
                seen.stats.swap_in_bytes = Some(108 * MIB);
                (seen.snapshot.counters.loads, seen.snapshot.counters.promoted) = (2048, 2048);
            },
            [Word::EnoughBack; 2],
        ),
        (
            "back from us, of which nothing was stored but a word",
            |seen| {
                (seen.stats.swap_in_bytes, seen.snapshot.counters.loads) = (Some(108 * MIB), 2048);
            },
            GOES_ON,
        ),
        (
            "pushed out elsewhere",
            |seen| seen.stats.swap_out_bytes = Some(108 * MIB),
            [Word::Squeezing, Word::OtherSwap],
        ),
        (
            "pushed out to us",
            |seen| {
                (seen.stats.swap_out_bytes, seen.snapshot.counters.stores) = (Some(108 * MIB), 2048);
            },
            GOES_ON,
        ),
        (
            "pushed out to us for the most part",
            |seen| {
                (seen.stats.swap_out_bytes, seen.snapshot.counters.stores) = (Some(108 * MIB), 1500);
            },
            GOES_ON,
        ),
        (
            "booted again",
            |seen| (seen.stats.swap_in_bytes, seen.stats.swap_out_bytes) = (Some(0), Some(0)),
            GOES_ON,
        ),
    ];
    for (what, happens, words) in rows {
        let reasons = after_two_looks(happens).2.map(|decision| decision.reason);
        assert_eq!(reasons.each_ref().map(Reason::word), words, "{what}: {reasons:?}");
    }
}

#[test]
fn a_guest_that_swaps_elsewhere_is_tried_again_by_a_small_step() {
    let (seen, mut state, [_, held]) = after_two_looks(|seen| seen.stats.swap_out_bytes = Some(108 * MIB));
    assert_eq!(held.reason, Reason::Held(Hold::OtherSwap(100)));
    let decisions = (4..100).map(|tick| seen.decide(tick, &mut state));
    let others: Vec<_> = decisions.skip_while(|decision| decision.reason == held.reason).collect();
    let Some(Decision { reason: Reason::Squeezed(bytes), .. }) = others.first() else {
        unreachable!("it is not tried again: {others:?}");
    };
    assert!((20..50).contains(&(96 - others.len())), "after {} ticks", 96 - others.len());
    assert!(*bytes <= 504 * MIB / 256, "by {bytes}");
}

#[test]
fn after_that_it_is_left_alone_and_longer_each_time() {
    let mut seen = seen(256);
    seen.snapshot.held.stored_pages = 100;
    let mut state = State::default();
    seen.decide(0, &mut state);
    let mut tick = 1;
    // In ticks: how long nothing is taken after it hurt, and hurt again as soon as something was.
    for expected in [12, 24, 48, 96, 192, 192] {
        seen.snapshot.counters.failed_stores += 1;
        let distress = seen.decide(tick, &mut state);
        assert!(matches!(distress.reason, Reason::Relaxed(..)), "{distress:?}");
        seen.memory.actual_bytes = distress.target_bytes;
        let begin = tick;
        loop {
            tick += 1;
            let decision = seen.decide(tick, &mut state);
            if !matches!(decision.reason, Reason::Held(Hold::BackOff(_))) {
                break;
            }
        }
        assert_eq!(tick - begin, expected);
        tick += 1;
    }
}

#[test]
fn who_is_not_driven_is_told_nothing() {
    let decide = |change: fn(&mut Seen)| {
        let mut seen = seen(256);
        let mut state = State::default();
        change(&mut seen);
        seen.decide(0, &mut state);
        let decision = seen.decide(1, &mut state);
        (decision.target_bytes / MIB, decision.apply, decision.reason)
    };
    let most = u64::MAX / MIB;
    assert_eq!(decide(|seen| seen.snapshot.mode = Mode::Off), (most, false, Reason::Off));
    assert_eq!(decide(|seen| seen.snapshot.mode = Mode::Observe), (456, false, Reason::TookFree(56 * MIB)));
    assert_eq!(decide(|seen| seen.snapshot.mode = Mode::Fixed(300 * MIB)), (300, true, Reason::Fixed));
    assert_eq!(decide(|seen| seen.snapshot.mode = Mode::Fixed(u64::MAX)), (1024, true, Reason::Fixed));
    assert_eq!(
        decide(|seen| seen.snapshot.vmm = Vmm::Silent(silence("paused"))),
        (most, false, Reason::Silent(silence("paused")))
    );
    assert_eq!(
        decide(|seen| seen.snapshot.vmm = Vmm::Gone("gone".to_owned())),
        (most, false, Reason::Gone("gone".to_owned()))
    );
}
