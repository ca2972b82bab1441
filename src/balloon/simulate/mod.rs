//! The policy on guests that are not there: what the properties in `tests/squeeze_policy.rs` stand on, kept as a tool, for
//! a change of the policy is quicker judged by this than by guests that are. `ballast simulate` shows it.

mod guest;
mod scenario;

pub use self::guest::{Guest, Set};
pub use self::scenario::{SCENARIOS, Scenario, named};
use std::time::Duration;

use super::Mode;
use super::snapshot::{Held, Host, Snapshot, Vmm};
use super::state::State;
use super::trace::Tick;
use super::vmm::GuestStats;

/// What a stored page takes in the pool, in parts of it: lz4's ratio on common heaps.
const RATIO: u64 = 3;

/// What a guest said of itself last.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    stats: Option<GuestStats>,
    at_ms: u64,
    is_late: bool,
}

/// Guests on a host, under the policy.
#[derive(Debug)]
pub struct Simulation {
    host: Host,
    guests: Vec<Guest>,
    snapshots: Vec<Snapshot>,
    states: Vec<State>,
    /// What VMMs say instead of answering.
    silence: Vec<Option<Vmm>>,
    /// What guests said last of themselves, when, by the boot-time clock in milliseconds, and whether they say no more.
    said: Vec<Said>,
    /// Whether the pool is as full as the guests whose pages stay in it make it, and takes no more then.
    fills: bool,
    /// What the store takes of all guests in a second, in bytes.
    store_bytes_per_s: f64,
}

impl Simulation {
    /// Guests with what each may have at least, in bytes; `interval_ms` from tick to tick.
    #[must_use]
    pub fn new(guests: Vec<(Guest, u64)>, interval_ms: u64, budget_bytes: Option<u64>) -> Self {
        let host = Host { interval_ms, budget_bytes, pool_max_bytes: u64::MAX, ..Host::default() };
        let snapshots = guests.iter().zip(1..).map(|((guest, min_bytes), n)| snapshot(n, guest, *min_bytes));
        let snapshots: Vec<_> = snapshots.collect();
        let (states, silence) = (vec![State::default(); guests.len()], vec![None; guests.len()]);
        let said = vec![Said::default(); guests.len()];
        Self {
            host,
            guests: guests.into_iter().map(|(guest, _)| guest).collect(),
            snapshots,
            states,
            silence,
            said,
            fills: false,
            store_bytes_per_s: f64::INFINITY,
        }
    }

    /// The guests.
    pub fn guests(&mut self) -> &mut [Guest] {
        &mut self.guests
    }

    /// The host as the policy will see it; to be changed at will.
    pub fn host(&mut self) -> &mut Host {
        &mut self.host
    }

    /// The VMs as the policy saw them last; what isn't the guest's own may be changed at will.
    pub fn snapshots(&mut self) -> &mut [Snapshot] {
        &mut self.snapshots
    }

    /// What a VM's VMM says from now on instead of answering, if anything.
    pub fn silence(&mut self, vm: usize, silence: Option<Vmm>) {
        self.silence[vm] = silence;
    }

    /// Whether a guest's statistics are late from now on: its VMM repeats what it said last.
    pub fn late(&mut self, vm: usize, is_late: bool) {
        self.said[vm].is_late = is_late;
    }

    /// The pool has this maximum, and those guests in it whose pages can't leave for the file: when it is full, stores fail.
    pub fn fill_pool(&mut self, max_bytes: u64) {
        (self.host.pool_max_bytes, self.fills) = (max_bytes, true);
    }

    /// What the pool has room for, in bytes.
    fn pool_room_bytes(&self) -> u64 {
        let kept = self.guests.iter().zip(&self.snapshots).filter(|(_, snapshot)| !snapshot.held.writeback);
        let kept_bytes: u64 = kept.map(|(guest, _)| guest.swapped() / RATIO).sum();
        self.host.pool_max_bytes.saturating_sub(kept_bytes)
    }

    /// The store takes no more than this of all guests in a second.
    pub fn slow_store(&mut self, bytes_per_s: u64) {
        self.store_bytes_per_s = bytes_per_s as f64;
    }

    /// Lets a tick go by.
    pub fn tick(&mut self) -> Tick {
        self.host.now_ms += self.host.interval_ms;
        if self.fills {
            self.host.pool_bytes = self.host.pool_max_bytes - self.pool_room_bytes();
        }
        let guests = self.guests.iter().zip(&mut self.said);
        for ((snapshot, (guest, said)), silence) in self.snapshots.iter_mut().zip(guests).zip(&self.silence) {
            look(snapshot, guest, said, self.host.now_ms);
            if let Some(silence) = silence {
                snapshot.vmm = silence.clone();
            }
        }
        let tick = Tick::decide(self.host, self.snapshots.clone(), &mut self.states);
        let seconds = self.host.interval_ms as f64 / 1000.0;
        let mut left_bytes = self.store_bytes_per_s * seconds;
        let guests = self.guests.len();
        for (number, step) in tick.vms.iter().enumerate() {
            let fills = self.fills && !step.snapshot.held.writeback;
            let room_bytes = if fills { (self.pool_room_bytes() * RATIO) as f64 } else { f64::INFINITY };
            let guest = &mut self.guests[number];
            guest.pool_takes(room_bytes);
            let actual_bytes = guest.memory().actual_bytes;
            let before = guest.counters().stores;
            guest.push_out_at_most(left_bytes / (guests - number) as f64);
            guest.run(seconds, if step.decision.apply { step.decision.target_bytes } else { actual_bytes });
            let out_bytes = (guest.counters().stores - before) * crate::page::PAGE_SIZE_U64;
            left_bytes = (left_bytes - out_bytes as f64).max(0.0);
        }
        tick
    }
}

fn snapshot(number: u64, guest: &Guest, min_bytes: u64) -> Snapshot {
    let memory = guest.memory();
    Snapshot {
        vm: format!("vm{number}"),
        mode: Mode::Auto,
        min_bytes,
        max_bytes: memory.configured_bytes,
        weight: 100,
        promotion_ppm: 2000,
        vmm: Vmm::Answers(memory),
        counters: guest.counters(),
        held: Held {
            limit_bytes: u64::MAX,
            size_bytes: 4 * memory.configured_bytes,
            writeback: true,
            ..Held::default()
        },
    }
}

/// What is new of a guest.
fn look(snapshot: &mut Snapshot, guest: &Guest, said: &mut Said, now_ms: u64) {
    let stored_pages = guest.swapped() / crate::page::PAGE_SIZE_U64;
    let mut memory = guest.memory();
    if !said.is_late || said.stats.is_none() {
        (said.stats, said.at_ms) = (memory.guest, now_ms);
    }
    let age = Duration::from_millis(now_ms - said.at_ms);
    memory.guest = said.stats.map(|stats| GuestStats { age, update: Some(said.at_ms), ..stats });
    snapshot.vmm = Vmm::Answers(memory);
    snapshot.counters = guest.counters();
    snapshot.held.stored_pages = stored_pages;
    snapshot.held.pool_pages = stored_pages;
    snapshot.held.pool_bytes = guest.swapped() / RATIO;
}
