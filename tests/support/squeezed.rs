//! A guest of 512 MiB that was booted with 1 GiB, as the policy is told of it: one thing happens to it within a tick, and what is
//! decided.

#![allow(dead_code, reason = "no test needs all of it")]

use ballast::balloon::vmm::{GuestMemory, GuestStats};
use ballast::balloon::{
    Counters, Decision, Distress, Held, Host, Mode, Pressure, Reason, Silence, Snapshot, State, Vmm, Word,
    decide_all,
};

pub const MIB: u64 = 1 << 20;
pub const TICK_MS: u64 = 5000;
/// Waiting for so long within one tick makes the smoothed wait just what may be.
pub const WAIT_NS: u64 = 10_000 * 12 * TICK_MS;

/// A VM at a tick, in parts that a row changes.
#[derive(Clone)]
pub struct Seen {
    pub snapshot: Snapshot,
    pub memory: GuestMemory,
    pub stats: GuestStats,
    pub pool_bytes: u64,
    pub pressure: Pressure,
    /// Stores of any VM that wait.
    pub waiting_stores: u64,
}

pub fn silence(text: &str) -> Silence {
    Silence { word: Word::Paused, text: text.to_owned() }
}

pub fn seen(available_mib: u64) -> Seen {
    let snapshot = Snapshot {
        vm: "web1".to_owned(),
        mode: Mode::Auto,
        min_bytes: 64 * MIB,
        max_bytes: u64::MAX,
        weight: 100,
        promotion_ppm: 2000,
        vmm: Vmm::Silent(silence("")),
        counters: Counters::default(),
        held: Held { limit_bytes: u64::MAX, size_bytes: 4096 * MIB, writeback: true, ..Held::default() },
    };
    let available_bytes = Some(available_mib * MIB);
    let stats =
        GuestStats { available_bytes, oom_kills: Some(0), major_faults: Some(0), ..GuestStats::default() };
    let memory = GuestMemory { configured_bytes: 1024 * MIB, actual_bytes: 512 * MIB, guest: None };
    Seen { snapshot, memory, stats, pool_bytes: 0, pressure: Pressure::None, waiting_stores: 0 }
}

impl Seen {
    pub fn decide(&self, tick: u64, state: &mut State) -> Decision {
        let host = Host {
            now_ms: 1_000_000 + tick * TICK_MS,
            interval_ms: TICK_MS,
            budget_bytes: None,
            pressure: self.pressure,
            pool_bytes: self.pool_bytes,
            pool_max_bytes: 1000 * MIB,
            pool_start_bytes: Some(975 * MIB),
            waiting_stores: self.waiting_stores,
        };
        let mut snapshot = self.snapshot.clone();
        if let Vmm::Silent(silence) = &snapshot.vmm
            && silence.text.is_empty()
        {
            snapshot.vmm = Vmm::Answers(GuestMemory { guest: Some(self.stats), ..self.memory });
        }
        let mut states = [*state];
        let decision = decide_all(&host, &[snapshot], &mut states).pop().unwrap();
        [*state] = states;
        decision
    }
}

/// What is decided about a guest with so much to spare once this has happened to it.
pub fn after(available_mib: u64, happens: fn(&mut Seen)) -> (u64, Reason) {
    let mut seen = seen(available_mib);
    let mut state = State::default();
    assert_eq!(seen.decide(0, &mut state).reason, Reason::First);
    happens(&mut seen);
    let decision = seen.decide(1, &mut state);
    (decision.target_bytes / MIB, decision.reason)
}

/// Something that happens to a guest with so many MiB to spare; what it should have then, in MiB, and why.
pub type Row = (&'static str, u64, fn(&mut Seen), u64, Reason);

pub fn relaxed(mib: u64, distress: Distress) -> Reason {
    Reason::Relaxed(mib * MIB, distress)
}

pub fn check(rows: Vec<Row>) {
    for (what, available_mib, happens, target_mib, reason) in rows {
        assert_eq!(after(available_mib, happens), (target_mib, reason), "{what}");
    }
}
