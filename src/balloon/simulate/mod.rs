//! The policy on guests that are not there: what the properties in `tests/squeeze_policy.rs` stand on, kept as a tool, for
//! a change of the policy is quicker judged by this than by guests that are. `ballast simulate` shows it.

mod guest;
mod scenario;

pub use self::guest::{Guest, Set};
pub use self::scenario::{SCENARIOS, Scenario, named};
use super::Mode;
use super::snapshot::{Held, Host, Snapshot, Vmm};
use super::state::State;
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
    /// What VMMs say instead of answering.
    silence: Vec<Option<Vmm>>,
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
        Self {
            host,
            guests: guests.into_iter().map(|(guest, _)| guest).collect(),
            snapshots,
            states,
            silence,
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

    /// The store takes no more than this of all guests in a second.
    pub fn slow_store(&mut self, bytes_per_s: u64) {
        self.store_bytes_per_s = bytes_per_s as f64;
    }

    /// Lets a tick go by.
    pub fn tick(&mut self) -> Tick {
        self.host.now_ms += self.host.interval_ms;
        for ((snapshot, guest), silence) in self.snapshots.iter_mut().zip(&self.guests).zip(&self.silence) {
            look(snapshot, guest);
            if let Some(silence) = silence {
                snapshot.vmm = silence.clone();
            }
        }
        let tick = Tick::decide(self.host, self.snapshots.clone(), &mut self.states);
        let seconds = self.host.interval_ms as f64 / 1000.0;
        let mut left_bytes = self.store_bytes_per_s * seconds;
        let guests = self.guests.len();
        for (number, (guest, step)) in self.guests.iter_mut().zip(&tick.vms).enumerate() {
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
fn look(snapshot: &mut Snapshot, guest: &Guest) {
    let stored_pages = guest.swapped() / crate::page::PAGE_SIZE_U64;
    snapshot.vmm = Vmm::Answers(guest.memory());
    snapshot.counters = guest.counters();
    snapshot.held.stored_pages = stored_pages;
    snapshot.held.pool_pages = stored_pages;
    snapshot.held.pool_bytes = guest.swapped() / RATIO;
}
