//! Guests with a story: what `ballast simulate` shows.

use super::{Guest, Set, Simulation};

const MIB: u64 = 1 << 20;
/// The policy's own.
const INTERVAL_MS: u64 = 5000;

/// A story.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// Its name.
    pub name: &'static str,
    /// What happens.
    pub about: &'static str,
    /// Ticks until it is told.
    pub ticks: u64,
    begin: fn() -> Simulation,
    /// What the guests do from a tick on, if that changes.
    turn: fn(u64, &mut [Guest]),
}

/// All of them.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "cold",
        about: "a guest of 512 MiB that uses 64 of the 384 that it holds",
        ticks: 240,
        begin: || one(512, &[hot(64), cold(320)]),
        turn: |_, _| (),
    },
    Scenario {
        name: "growth",
        about: "the same guest; after twenty minutes it works on 320 MiB",
        ticks: 480,
        begin: || one(512, &[hot(64), cold(320)]),
        turn: |tick, guests| {
            if tick == 240 {
                guests[0].work_on(&[hot(320), cold(64)]);
            }
        },
    },
    Scenario {
        name: "warm",
        about: "a guest that goes through most of its memory every few minutes, and has little that is cold",
        ticks: 480,
        begin: || one(512, &[hot(64), warm(256), cold(64)]),
        turn: |_, _| (),
    },
    Scenario {
        name: "zram",
        about: "the first guest with a zram of its own, for 96 MiB, that it swaps to first",
        ticks: 960,
        begin: || {
            let guest = Guest::new(512 * MIB, 2048 * MIB, &[hot(64), cold(320)]).with_zram(96 * MIB);
            Simulation::new(vec![(guest, 96 * MIB)], INTERVAL_MS, None)
        },
        turn: |_, _| (),
    },
    Scenario {
        name: "freed",
        about: "a guest that works on 320 MiB, and after ten minutes on 96; of 64 others a few come back now and then",
        ticks: 480,
        begin: || one(512, &[hot(320), lukewarm(64)]),
        turn: |tick, guests| {
            if tick == 120 {
                guests[0].work_on(&[hot(96), lukewarm(64)]);
            }
        },
    },
    Scenario {
        name: "opposite",
        about: "two guests of 512 MiB take turns at working on 384, every ten minutes; the host has 700 for them",
        ticks: 600,
        begin: || {
            let guest = |sets: &[Set]| (Guest::new(512 * MIB, 2048 * MIB, sets), 128 * MIB);
            let guests = vec![guest(&busy()), guest(&idle())];
            Simulation::new(guests, INTERVAL_MS, Some(700 * MIB))
        },
        turn: |tick, guests| {
            if tick % 120 == 0 {
                let first_is_busy = (tick / 120) % 2 == 0;
                let (first, second) = if first_is_busy { (busy(), idle()) } else { (idle(), busy()) };
                guests[0].work_on(&first);
                guests[1].work_on(&second);
            }
        },
    },
];

/// The scenario of this name.
#[must_use]
pub fn named(name: &str) -> Option<&'static Scenario> {
    SCENARIOS.iter().find(|scenario| scenario.name == name)
}

impl Scenario {
    /// Its guests, before anything happened.
    #[must_use]
    pub fn begin(&self) -> Simulation {
        (self.begin)()
    }

    /// What its guests do from this tick on.
    pub fn turn(&self, tick: u64, guests: &mut [Guest]) {
        (self.turn)(tick, guests);
    }
}

fn one(mib: u64, sets: &[Set]) -> Simulation {
    Simulation::new(vec![(Guest::new(mib * MIB, 4 * mib * MIB, sets), 96 * MIB)], INTERVAL_MS, None)
}

fn busy() -> [Set; 2] {
    [hot(384), cold(16)]
}

fn idle() -> [Set; 2] {
    [hot(32), cold(368)]
}

fn hot(mib: u64) -> Set {
    set(mib, 2.0)
}

/// Touched every three minutes.
fn warm(mib: u64) -> Set {
    set(mib, 1.0 / 180.0)
}

/// Touched twice in an hour.
fn lukewarm(mib: u64) -> Set {
    set(mib, 1.0 / 1800.0)
}

/// Touched once in a day.
fn cold(mib: u64) -> Set {
    set(mib, 1.0 / 86_400.0)
}

fn set(mib: u64, touches_per_s: f64) -> Set {
    Set { bytes: (mib * MIB) as f64, touches_per_s }
}
