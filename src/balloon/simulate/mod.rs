//! The policy on guests that are not there: what the properties in `tests/squeeze_policy.rs` stand on, kept as a tool, for
//! a change of the policy is quicker judged by this than by guests that are. `ballast simulate` shows it.

mod guest;
mod scenario;

pub use self::guest::{Guest, Set};
pub use self::scenario::{SCENARIOS, Scenario, named};
use super::Mode;
use super::policy::State;
use super::snapshot::{Held, Host, Snapshot, Vmm};
use super::trace::Tick;

/// What a stored page takes in the pool, in parts of it: lz4's ratio on common heaps.
const RATIO: u64 = 3;

/// Guests on a host, under the policy.
#[derive(Debug)]
pub struct Simulation {
    host: Host,
    guests: Vec<Guest>,
    snapshots: Vec<Snapshot>,
    states: Vec<State>,
}

impl Simulation {
    /// Guests with what each may have at least, in bytes; `interval_ms` from tick to tick.
    #[must_use]
    pub fn new(guests: Vec<(Guest, u64)>, interval_ms: u64, budget_bytes: Option<u64>) -> Self {
        let host = Host { interval_ms, budget_bytes, pool_max_bytes: u64::MAX, ..Host::default() };
        let snapshots = guests.iter().zip(1..).map(|((guest, min_bytes), n)| snapshot(n, guest, *min_bytes));
        let snapshots: Vec<_> = snapshots.collect();
        let states = vec![State::default(); guests.len()];
        Self { host, guests: guests.into_iter().map(|(guest, _)| guest).collect(), snapshots, states }
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

    /// Lets a tick go by.
    pub fn tick(&mut self) -> Tick {
        self.host.now_ms += self.host.interval_ms;
        for (snapshot, guest) in self.snapshots.iter_mut().zip(&self.guests) {
            look(snapshot, guest);
        }
        let tick = Tick::decide(self.host, self.snapshots.clone(), &mut self.states);
        let seconds = self.host.interval_ms as f64 / 1000.0;
        for (guest, step) in self.guests.iter_mut().zip(&tick.vms) {
            let actual_bytes = guest.memory().actual_bytes;
            guest.run(seconds, if step.decision.apply { step.decision.target_bytes } else { actual_bytes });
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
fn look(snapshot: &mut Snapshot, guest: &Guest) {
    let stored_pages = guest.swapped() / crate::page::PAGE_SIZE_U64;
    snapshot.vmm = Vmm::Answers(guest.memory());
    snapshot.counters = guest.counters();
    snapshot.held.stored_pages = stored_pages;
    snapshot.held.pool_pages = stored_pages;
    snapshot.held.pool_bytes = guest.swapped() / RATIO;
}
