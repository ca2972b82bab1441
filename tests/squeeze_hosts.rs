//! The balloon policy on hosts of simulated guests where several things go wrong together: whatever the host is short of and
//! wherever pages can't go, nobody is killed or below its least; a store that is slow is asked for no more than it takes;
//! a guest that freed memory is not kept from giving it up by a page that comes back now and then.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use ballast::balloon::simulate::{Guest, Set, Simulation, named};
use ballast::balloon::trace::Tick;
use ballast::balloon::vmm::{GuestMemory, GuestStats};
use ballast::balloon::{Distress, Pressure, Reason, Vmm};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const INTERVAL_MS: u64 = 5000;
/// What the store may have before it, whatever it takes: what it would take of a fast compressor within a tick.
const WINDOW_BYTES: u64 = 640 * MIB;

fn set(mib: u64, touches_per_s: f64) -> Set {
    Set { bytes: (mib * MIB) as f64, touches_per_s }
}

fn actual(tick: &Tick, vm: usize) -> u64 {
    match &tick.vms[vm].snapshot.vmm {
        Vmm::Answers(memory) => memory.actual_bytes,
        Vmm::Silent(_) | Vmm::Gone(_) => unreachable!("a simulated VMM answers"),
    }
}

/// Where a guest's pages can't go.
#[derive(Clone, Copy, Debug)]
enum Trouble {
    None,
    SwapOff,
    /// It has a disk of so many MiB.
    SmallDisk(u64),
    /// Its pages stay in a pool that is full.
    PoolFull,
    /// Its own limit is reached.
    AtLimit,
}

fn troubles() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        Just(Trouble::None),
        Just(Trouble::SwapOff),
        (8u64..256).prop_map(Trouble::SmallDisk),
        Just(Trouble::PoolFull),
        Just(Trouble::AtLimit),
    ]
}

/// A guest of 512 MiB: what it works on and how often it touches that, what is cold, the least that it may have.
type Story = (u64, f64, u64, u64, Trouble);

fn host(stories: &[Story], budget_bytes: Option<u64>) -> Simulation {
    let guests = stories.iter().map(|&(mib, rate, cold_mib, min_mib, trouble)| {
        let disk_mib = if let Trouble::SmallDisk(mib) = trouble { mib } else { 2048 };
        let guest = Guest::new(512 * MIB, disk_mib * MIB, &[set(mib, rate), set(cold_mib, 1e-5)]);
        (guest, min_mib * MIB)
    });
    let mut simulation = Simulation::new(guests.collect(), INTERVAL_MS, budget_bytes);
    (simulation.host().pool_max_bytes, simulation.host().pool_start_bytes) = (1000 * MIB, Some(975 * MIB));
    for (vm, story) in stories.iter().enumerate() {
        let held = &mut simulation.snapshots()[vm].held;
        match story.4 {
            Trouble::None => {}
            Trouble::SmallDisk(mib) => held.size_bytes = mib * MIB,
            Trouble::PoolFull => held.writeback = false,
            Trouble::AtLimit => (held.writeback, held.limit_bytes) = (false, 8 * MIB),
            Trouble::SwapOff => simulation.guests()[vm].swap_off(),
        }
    }
    simulation
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 320, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nobody_is_killed_or_below_its_least_whatever_the_host_lacks_and_wherever_pages_cannot_go(
        stories in prop::collection::vec((16u64..360, 0.0001f64..5.0, 0u64..80, 64u64..256, troubles()), 1..6),
        pressures in prop::collection::vec((prop::sample::select(vec![Pressure::None, Pressure::Moderate, Pressure::Severe]), any::<bool>(), 1u64..60), 1..5),
        budget_percent in prop::option::of(30u64..100),
    ) {
        let all_bytes = 512 * MIB * stories.len() as u64;
        let mut simulation = host(&stories, budget_percent.map(|percent| all_bytes / 100 * percent));
        for (pressure, pool_full, ticks) in pressures {
            simulation.host().pressure = pressure;
            simulation.host().pool_bytes = if pool_full { 990 * MIB } else { 500 * MIB };
            simulation.host().waiting_stores = pool_full.into();
            for _ in 0..ticks {
                let tick = simulation.tick();
                prop_assert_eq!(&tick.again(), &tick, "a decision isn't made again from its trace");
                for (vm, step) in tick.vms.iter().enumerate() {
                    let least_bytes = step.snapshot.min_bytes;
                    prop_assert!(step.decision.target_bytes >= least_bytes, "below the least: {step:?}");
                    prop_assert!(actual(&tick, vm) >= least_bytes, "below the least: {step:?}");
                }
            }
        }
        for (vm, guest) in simulation.guests().iter().enumerate() {
            prop_assert_eq!(guest.memory().guest.unwrap().oom_kills, Some(0), "guest {}", vm);
        }
    }
}

/// What is before the store once this is decided: all that guests use and are not to have.
fn before_store_bytes(tick: &Tick) -> u64 {
    let guests = tick.vms.iter().map(|step| match &step.snapshot.vmm {
        Vmm::Answers(memory) => {
            let available_bytes = memory.guest.and_then(|guest| guest.available_bytes).unwrap_or(0);
            let over_bytes = memory.actual_bytes.saturating_sub(step.decision.target_bytes);
            over_bytes.saturating_sub(available_bytes)
        }
        Vmm::Silent(_) | Vmm::Gone(_) => 0,
    });
    guests.sum()
}

#[test]
fn a_slow_store_has_no_more_before_it_than_a_fast_one_takes_and_is_never_idle() {
    // An eighth of what is asked for where nobody is slow.
    let store_bytes_per_s = 16 * MIB;
    let guest = || (Guest::new(1024 * MIB, 4096 * MIB, &[set(32, 2.0), set(900, 1e-5)]), 64 * MIB);
    let mut simulation = Simulation::new((0..100).map(|_| guest()).collect(), INTERVAL_MS, None);
    simulation.slow_store(store_bytes_per_s);
    let mut most_bytes = 0;
    for _ in 0..240 {
        let tick = simulation.tick();
        assert_eq!(tick.again(), tick, "a decision isn't made again from its trace");
        let for_want_of_swap = |step: &&_| matches!(reason(step), Reason::Relaxed(_, Distress::NotSwapping));
        assert_eq!(tick.vms.iter().filter(for_want_of_swap).count(), 0, "it waits for the store, no more");
        most_bytes = most_bytes.max(before_store_bytes(&tick));
    }
    // Of a guest so near to its target nothing is waited for.
    let near_bytes = 100 * 2 * MIB;
    assert!(most_bytes <= WINDOW_BYTES + near_bytes, "{} MiB before the store", most_bytes / MIB);
    let stored_bytes: u64 = simulation.guests().iter().map(Guest::swapped).sum();
    let could_bytes = store_bytes_per_s * 240 * INTERVAL_MS / 1000;
    assert!(stored_bytes >= could_bytes * 9 / 10, "{} of {} MiB", stored_bytes / MIB, could_bytes / MIB);
}

/// A store that takes 4 MiB a tick, and a guest that is asked for a sixty-fourth of what it has, nearly 8.
#[test]
fn what_a_guest_was_promised_and_does_not_have_yet_it_need_not_push_out() {
    for (then_has_mib, squeezed_bytes) in [(504, 4 * MIB), (496, 7 * MIB + MIB / 2 + MIB / 4)] {
        let mut simulation = host(&[(400, 2.0, 0, 64, Trouble::None)], None);
        simulation.host().pool_max_bytes = 40 * MIB;
        let mut decide = |has_mib: u64| {
            let stats = GuestStats { available_bytes: Some(10 * MIB), ..GuestStats::default() };
            let (configured_bytes, actual_bytes) = (512 * MIB, has_mib * MIB);
            let memory = GuestMemory { configured_bytes, actual_bytes, guest: Some(stats) };
            simulation.silence(0, Some(Vmm::Answers(memory)));
            simulation.tick().vms[0].decision.reason.clone()
        };
        assert_eq!(decide(504), Reason::First);
        assert_eq!(decide(then_has_mib), Reason::Squeezed(squeezed_bytes), "it has {then_has_mib} MiB");
    }
}

fn reason(step: &ballast::balloon::trace::Step) -> &Reason {
    &step.decision.reason
}

#[test]
fn a_guest_that_frees_memory_gives_it_up_though_a_page_comes_back_now_and_then() {
    let scenario = named("freed").unwrap();
    let mut simulation = scenario.begin();
    let (mut has, mut back) = (Vec::new(), 0);
    for number in 0..scenario.ticks {
        scenario.turn(number, simulation.guests());
        let before = simulation.guests()[0].counters().promoted;
        let tick = simulation.tick();
        has.push(actual(&tick, 0) / MIB);
        let came_back = simulation.guests()[0].counters().promoted > before;
        back += u64::from(number > 150 && came_back);
    }
    assert!(has[120] > 360, "{} MiB while it works on 320", has[120]);
    assert!(back > 100, "something came back in {back} ticks");
    // What it works on, what its kernel has, and a little that it could use at once.
    assert!(has[150] < 240 && has[479] < 200, "{} and {} MiB", has[150], has[479]);
}
