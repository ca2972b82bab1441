//! The balloon policy on hosts of simulated guests where several things go wrong together: whatever the host is short of and
//! wherever pages can't go, nobody is killed or below its least; a store that is slow is asked for no more than it takes;
//! a guest that freed memory is not kept from giving it up by a page that comes back now and then.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use ballast::balloon::simulate::{Guest, Set, Simulation, named};
use ballast::balloon::trace::{Step, Tick};
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
    /// Its swap is switched off after so many ticks, as soon as there is room for what is on it.
    SwapOffLater(u64),
    /// It has a disk of so many MiB.
    SmallDisk(u64),
    /// Its pages stay in the pool, which may be full, or may fill.
    InPool,
    /// Its own limit is reached.
    AtLimit,
}

fn troubles() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        Just(Trouble::None),
        Just(Trouble::SwapOff),
        (1u64..120).prop_map(Trouble::SwapOffLater),
        (8u64..256).prop_map(Trouble::SmallDisk),
        Just(Trouble::InPool),
        Just(Trouble::AtLimit),
    ]
}

/// A guest of 512 MiB: what it works on at most and how often it touches that, what is cold, the least that it may have, where
/// its pages can't go, and whether it takes memory out of its balloon before it kills.
type Story = (u64, f64, u64, u64, Trouble, bool);

fn host(stories: &[Story], budget_bytes: Option<u64>) -> Simulation {
    let guests = stories.iter().map(|&(mib, rate, cold_mib, min_mib, trouble, deflates)| {
        let disk_mib = match trouble {
            Trouble::SmallDisk(mib) => mib,
            // A third of a page is left of one in the pool.
            Trouble::AtLimit => 24,
            _ => 2048,
        };
        let guest = Guest::new(512 * MIB, disk_mib * MIB, &[set(mib, rate), set(cold_mib, 1e-5)]);
        (if deflates { guest.with_deflation() } else { guest }, min_mib * MIB)
    });
    let mut simulation = Simulation::new(guests.collect(), INTERVAL_MS, budget_bytes);
    (simulation.host().pool_max_bytes, simulation.host().pool_start_bytes) = (1000 * MIB, Some(975 * MIB));
    for (vm, story) in stories.iter().enumerate() {
        let held = &mut simulation.snapshots()[vm].held;
        match story.4 {
            Trouble::None | Trouble::SwapOffLater(_) => {}
            Trouble::SmallDisk(mib) => held.size_bytes = mib * MIB,
            Trouble::InPool => held.writeback = false,
            Trouble::AtLimit => (held.writeback, held.limit_bytes) = (false, 8 * MIB),
            Trouble::SwapOff => assert!(simulation.guests()[vm].swap_off()),
        }
    }
    simulation
}

/// What a guest without room anywhere grows by in a tick at most. More than a guest has to spare nobody can give it in time.
const GROWTH_MIB: u64 = 4;

/// What becomes of a guest.
#[derive(Clone, Copy, Debug)]
struct Life {
    works_on_mib: u64,
    /// By how much that grew in this tick, and in the one before.
    grown_mib: [u64; 2],
    /// Whether it was found not to swap, or has killed and never swapped.
    found_dry: bool,
    /// Ticks since its swap was switched off, if it was later than it was used.
    off_ticks: u64,
    /// Ticks since its statistics were late last, and whether it grew while they were.
    heard_ticks: u64,
    grown_unseen: bool,
}

impl Life {
    fn working_on(works_on_mib: u64) -> Self {
        Self {
            works_on_mib,
            grown_mib: [0; 2],
            found_dry: false,
            off_ticks: 0,
            heard_ticks: HEARD_TICKS,
            grown_unseen: false,
        }
    }

    fn work_on(&mut self, mib: u64) {
        self.grown_mib = [mib.saturating_sub(self.works_on_mib), self.grown_mib[0]];
        self.works_on_mib = mib;
    }

    fn hear(&mut self, is_late: bool) {
        self.heard_ticks = if is_late { 0 } else { self.heard_ticks + 1 };
        let grows = is_late && self.grown_mib[0] > 0;
        self.grown_unseen = grows || (self.grown_unseen && self.heard_ticks < HEARD_TICKS);
    }
}

/// After so many ticks with statistics what was done without them is made good.
const HEARD_TICKS: u64 = 3;

/// Whether a kill says nothing against the policy.
fn is_excused(story: &Story, step: &Step, life: Life, share_mib: u64) -> bool {
    let (_, _, cold_mib, _, trouble, deflates) = *story;
    // Its kernel has 40 MiB, and keeps 4 free.
    let needs_mib = life.works_on_mib + cold_mib + 44;
    // Whether a guest swaps is found out by taking what it has to spare, a sixty-fourth at a time; once, and while it rests.
    let Some(look) = step.state.look else { return false };
    let is_at_rest = life.grown_mib[1] * MIB <= look.actual_bytes / 256;
    let is_tried = match trouble {
        Trouble::SwapOff => step.state.dry_bytes > 0 && !life.found_dry && is_at_rest,
        // It has as little to spare as one that swaps may have, until it is seen that it doesn't any more.
        Trouble::SwapOffLater(_) => !life.found_dry,
        _ => false,
    };
    // What grows where nobody sees it, with nowhere to push anything, nobody can help.
    let grew_unseen = life.grown_unseen && !matches!(trouble, Trouble::None);
    // One that says nothing any more before it was found out is taken to swap, as one that never says anything.
    let may_swap = life.heard_ticks < HEARD_TICKS && !life.found_dry;
    let is_unheard = may_swap && matches!(trouble, Trouble::SwapOff | Trouble::SwapOffLater(_));
    needs_mib > share_mib || (is_tried && !deflates) || grew_unseen || is_unheard
}

/// What a guest works on in this tick, on its way to so much.
fn grown(mib: u64, to_mib: u64, trouble: Trouble, pool_fills: bool) -> u64 {
    match trouble {
        Trouble::None => to_mib,
        Trouble::InPool if !pool_fills => to_mib,
        _ => to_mib.min(mib + GROWTH_MIB),
    }
}

/// What happens for some ticks: how short of memory the host is, whether its pool is full, how much of what guests work on at
/// most they work on in percent, and whose statistics are late.
type Phase = (Pressure, bool, u64, Vec<u64>, Vec<bool>);

fn phases() -> impl Strategy<Value = Vec<Phase>> {
    let pressure = prop::sample::select(vec![Pressure::None, Pressure::Moderate, Pressure::Severe]);
    let late = prop::collection::vec(prop::bool::weighted(0.15), 6);
    let percents = prop::collection::vec(0u64..=100, 6);
    prop::collection::vec((pressure, any::<bool>(), 1u64..60, percents, late), 1..6)
}

proptest! {
    // `PROPTEST_CASES` asks for more.
    #![proptest_config({
        let config = ProptestConfig::default();
        ProptestConfig { cases: config.cases.max(8000), failure_persistence: None, ..config }
    })]

    #[test]
    fn nobody_is_killed_or_below_its_least_whatever_the_host_lacks_and_wherever_pages_cannot_go(
        stories in prop::collection::vec(
            (16u64..360, 0.0001f64..5.0, 0u64..80, 64u64..256, troubles(), any::<bool>()), 1..6),
        phases in phases(),
        budget_percent in prop::option::of(30u64..100),
        // One that fills by what guests push out.
        pool_mib in prop::option::of(16u64..300),
    ) {
        let all_bytes = 512 * MIB * stories.len() as u64;
        let mut simulation = host(&stories, budget_percent.map(|percent| all_bytes / 100 * percent));
        if let Some(mib) = pool_mib {
            simulation.fill_pool(mib * MIB);
            simulation.host().pool_start_bytes = Some(mib * MIB * 39 / 40);
        }
        let share_mib = budget_percent.map_or(512, |percent| 512 * percent / 100);
        let mut lives: Vec<Life> = stories.iter().map(|story| Life::working_on(story.0)).collect();
        let mut number = 0;
        for (pressure, pool_full, ticks, percents, late) in phases {
            simulation.host().pressure = pressure;
            if pool_mib.is_none() {
                simulation.host().pool_bytes = if pool_full { 990 * MIB } else { 500 * MIB };
                simulation.host().waiting_stores = pool_full.into();
            }
            for _ in 0..ticks {
                number += 1;
                let kills = simulation.guests().iter().map(oom_kills).collect::<Vec<_>>();
                for (vm, (story, life)) in stories.iter().zip(&mut lives).enumerate() {
                    let to_mib = story.0 * percents[vm] / 100;
                    life.work_on(grown(life.works_on_mib, to_mib, story.4, pool_mib.is_some()));
                    life.hear(late[vm]);
                    simulation.late(vm, late[vm]);
                    let guest = &mut simulation.guests()[vm];
                    guest.work_on(&[set(life.works_on_mib, story.1), set(story.2, 1e-5)]);
                    if matches!(story.4, Trouble::SwapOffLater(tick) if tick <= number) && guest.swap_off() {
                        life.off_ticks += 1;
                    }
                }
                let tick = simulation.tick();
                prop_assert_eq!(&tick.again(), &tick, "a decision isn't made again from its trace");
                for (vm, step) in tick.vms.iter().enumerate() {
                    let least_bytes = step.snapshot.min_bytes;
                    prop_assert!(step.decision.target_bytes >= least_bytes, "below the least: {step:?}");
                    prop_assert!(actual(&tick, vm) >= least_bytes, "below the least: {step:?}");
                    let is_killed = oom_kills(&simulation.guests()[vm]) > kills[vm];
                    let life = &mut lives[vm];
                    // Whoever switches it off reads all that is on it, which may have been found dry before.
                    life.found_dry = (life.found_dry || step.state.dry_loads.is_some()) && life.off_ticks != 1;
                    let is_excused = is_excused(&stories[vm], step, *life, share_mib);
                    life.found_dry |= is_killed && !matches!(stories[vm].4, Trouble::SwapOffLater(_));
                    prop_assert!(!is_killed || is_excused, "guest {vm} killed a process at {number}: {step:?}");
                }
            }
        }
    }

    /// Somebody else enlarges balloons, and the operator raises what guests have at least, more than once.
    #[test]
    fn what_a_guest_has_at_least_is_given_whatever_others_want(
        changes in prop::collection::vec((0usize..3, 64u64..200, 32u64..256, 1u64..8), 1..8),
        busy_mib in 100u64..400,
    ) {
        let stories = [(busy_mib, 2.0, 40, 64, Trouble::None, false); 3];
        let mut simulation = host(&stories, Some(600 * MIB));
        (0..12).for_each(|_| drop(simulation.tick()));
        for (vm, min_mib, cut_to_mib, ticks) in changes {
            simulation.snapshots()[vm].min_bytes = min_mib * MIB;
            simulation.guests()[vm].run(5.0, cut_to_mib * MIB);
            for number in 0..ticks {
                let tick = simulation.tick();
                for (vm, step) in tick.vms.iter().enumerate() {
                    let least_bytes = step.snapshot.min_bytes;
                    prop_assert!(step.decision.target_bytes >= least_bytes, "below the least: {step:?}");
                    prop_assert!(number == 0 || actual(&tick, vm) >= least_bytes, "below the least: {step:?}");
                }
            }
        }
    }
}

fn oom_kills(guest: &Guest) -> u64 {
    guest.memory().guest.and_then(|stats| stats.oom_kills).unwrap()
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
        let mut simulation = host(&[(400, 2.0, 0, 64, Trouble::None, false)], None);
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

fn reason(step: &Step) -> &Reason {
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
