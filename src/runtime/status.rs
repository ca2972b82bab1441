//! The daemon's status, put together from what each room counts.

use std::sync::Arc;

use super::balloons::Shown;
use super::daemon::Daemon;
use super::psi;
use super::served::Served;
use crate::balloon::{Mode, Vmm};
use crate::control::api::{
    BadPage, BalloonStatus, CheckState, CheckStatus, CompressorPool, CompressorPoolState, Counters,
    Histogram, LatencyBySource, MemoryPressure, PoolStatus, RunsByReason, ShrinkerStatus, Status,
    VmState as ApiVmState, VmStatus, WritebackState as ApiWritebackState, WritebackStatus, buckets,
};
use crate::device::complaints::Chain;
use crate::device::latency::Path;
use crate::device::vm::DeviceVm;
use crate::page::PAGE_SIZE_U64;
use crate::scrub;
use crate::store::VmState;
use crate::store::accounting::{Accounting, Events, Held};
use crate::store::crashes::CRASHES_MAX;
use crate::store::histogram::{PowersOfTwo, SIZE_STEP_BYTES};
use crate::store::pool::{POOLS_MAX, PoolInfo};
use crate::store::room::{Outlook, Shared};
use crate::store::vm::{Source, VmStore};
use crate::writeback::{OpenError, Writeback, WritebackState};

/// What the daemon shows of itself.
pub(super) fn of(daemon: &Daemon) -> Status {
    let served = daemon.served();
    let mut vms = Vec::new();
    // Two steps: what a VMM's connection holds is never waited for under the store's list.
    let mut found = Vec::new();
    daemon.store.for_each(|name, vm| found.push((name.to_owned(), vm.clone())));
    for (name, vm) in &found {
        let mut status = vm_status(&served, name, vm);
        status.balloon = daemon.balloons.shown(name).map(|shown| balloon(daemon, &shown));
        vms.push(status);
    }
    // Configured ones first, in the configuration's order.
    let place = |vm: &VmStatus| served.iter().position(|other| other.config.name == vm.name);
    vms.sort_by_key(|vm| place(vm).unwrap_or(usize::MAX));
    let pool = pool_status(daemon, &vms);
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        state_dir: daemon.config.state_dir.display().to_string(),
        start_time_seconds: daemon.start_time_seconds,
        shrinker: shrinker_status(daemon, &pool),
        writeback: writeback_status(daemon),
        memory_pressure: psi::now().map(|now| MemoryPressure {
            some_avg10_ppm: now.some_avg10_ppm,
            full_avg10_ppm: now.full_avg10_ppm,
        }),
        pool,
        vms,
    }
}

fn pool_status(daemon: &Daemon, vms: &[VmStatus]) -> PoolStatus {
    let sum = |of: fn(&VmStatus) -> u64| vms.iter().map(of).sum();
    let sums = Sums::of(daemon);
    let (arena, shared) = (daemon.store.arena(), daemon.store.shared());
    let compressor = shared.pools.current().compressor;
    let done = daemon.shrinker.stats().get();
    PoolStatus {
        max_bytes: arena.max_bytes(),
        used_bytes: arena.used_bytes(),
        object_bytes: sum(|vm| vm.pool_bytes),
        payload_bytes: sum(|vm| vm.payload_bytes),
        metadata_bytes: arena.metadata_bytes() + sum(|vm| vm.metadata_bytes),
        stored_pages: sum(|vm| vm.stored_pages),
        same_filled_pages: sum(|vm| vm.same_filled_pages),
        duplicates: sum(|vm| vm.duplicates),
        zombie_pages: sum(|vm| vm.zombie_pages),
        shared_pages: sum(|vm| vm.shared_pages),
        shared_objects: sum(|vm| vm.shared_objects),
        deduplicated_bytes: sum(|vm| vm.deduplicated_bytes),
        file_pages: sum(|vm| vm.file_pages),
        lost_pages: sum(|vm| vm.lost_pages),
        waiting_stores: sum(|vm| vm.waiting_stores),
        full: done.full,
        stuck: stuck(shared).filter(|_| done.full).map(str::to_owned),
        accept_threshold_percent: shared.accept_percent(),
        compressor: compressor.to_string(),
        pools: pools(daemon, &sums.objects_by_pool),
        mended_pages: daemon.mending.pages(),
        pressure_source: daemon.pressure.as_ref().map(|monitor| monitor.source().to_string()),
        counters: vms.iter().map(|vm| vm.counters).chain([sums.past]).sum(),
        refault_age_seconds: buckets(&sums.refault_age_seconds.counts),
        refault_age_seconds_sum: sums.refault_age_seconds.sum,
        store_delay_ms: buckets(&sums.store_delay_ms.counts),
        store_delay_ms_sum: sums.store_delay_ms.sum,
    }
}

/// Why no page can leave, as far as that is known.
fn stuck(shared: &Shared) -> Option<&'static str> {
    let slow = |file: &Writeback| matches!(file.status().state, WritebackState::Slow { .. });
    match (shared.file.as_ref().map(|file| file.is_on()), shared.outlook()) {
        (Some(true), _) if shared.file.as_deref().is_some_and(slow) => {
            Some("a write to the writeback file does not end")
        }
        (None, _) if shared.missing.is_some() => Some("the writeback file is missing"),
        (None, _) => Some("there is no writeback file"),
        (Some(false), _) => Some("the writeback file failed"),
        (Some(true), Outlook::FileRefuses) => Some("the writeback file takes nothing now"),
        (Some(true), Outlook::NobodyGives) => Some("reserves and \"writeback = false\" keep them all"),
        (Some(true), Outlook::Open) => None,
    }
}

/// What is summed over the VMs and doesn't stand in their status.
struct Sums {
    objects_by_pool: [u64; POOLS_MAX],
    refault_age_seconds: PowersOfTwo,
    store_delay_ms: PowersOfTwo,
    /// What happened to VMs whose pages were dropped.
    past: Counters,
}

impl Sums {
    fn of(daemon: &Daemon) -> Self {
        let past = daemon.store.past_events();
        let mut sums = Self {
            objects_by_pool: [0; POOLS_MAX],
            refault_age_seconds: past.refault_age_seconds,
            store_delay_ms: past.store_delay_ms,
            past: counters(&Held::default(), &past),
        };
        for vm in daemon.store.in_use() {
            let Accounting { held, events, .. } = vm.accounting();
            for (sum, more) in sums.objects_by_pool.iter_mut().zip(held.objects_by_pool) {
                *sum += more;
            }
            sums.refault_age_seconds += events.refault_age_seconds;
            sums.store_delay_ms += events.store_delay_ms;
        }
        sums
    }
}

/// The current pool and those that still hold something.
fn pools(daemon: &Daemon, objects: &[u64; POOLS_MAX]) -> Vec<CompressorPool> {
    let list = daemon.store.shared().pools.list().into_iter();
    let shown = list.filter(|pool| pool.current || pool.cold || objects[pool.id.index()] > 0);
    shown
        .map(|pool| CompressorPool {
            compressor: pool
                .compressor
                .map_or_else(|| "earlier".to_owned(), |compressor| compressor.to_string()),
            state: match pool {
                PoolInfo { current: true, .. } => CompressorPoolState::Current,
                PoolInfo { cold: true, .. } => CompressorPoolState::Cold,
                _ => CompressorPoolState::Draining,
            },
            objects: objects[pool.id.index()],
            objects_at_first: if pool.current || pool.cold {
                0
            } else {
                daemon.draining.at_first(pool.id, objects[pool.id.index()])
            },
        })
        .collect()
}

fn shrinker_status(daemon: &Daemon, pool: &PoolStatus) -> ShrinkerStatus {
    let done = daemon.shrinker.stats().get();
    let draining = pool.pools.iter().filter(|pool| pool.state == CompressorPoolState::Draining);
    let left: u64 = draining.map(|pool| pool.objects).sum();
    ShrinkerStatus {
        runs_by_reason: RunsByReason {
            pool_full: done.runs_pool_full,
            limit: done.runs_limit,
            pressure: done.runs_pressure,
            idle: done.runs_idle,
        },
        evicted_pages: done.evicted_pages,
        compacted_objects: done.compacted_objects,
        recompressed_objects: done.recompressed_pages,
        recompression_objects: done.recompression_objects,
        recompression_objects_left: left.min(done.recompression_objects),
        recompression_waits: done.recompression_waits,
        evicted_bytes: done.evicted_bytes,
        stale_pages: done.stale_pages,
        cleaned_segments: done.cleaned_segments,
    }
}

fn writeback_status(daemon: &Daemon) -> Option<WritebackStatus> {
    let shared = daemon.store.shared();
    let path = daemon.config.writeback.as_ref().map(|writeback| writeback.path.display().to_string());
    let path = path.unwrap_or_default();
    let missing = |err: &OpenError| WritebackStatus {
        state: ApiWritebackState::Missing,
        message: Some(Chain(err).to_string()),
        path: path.clone(),
        ..WritebackStatus::default()
    };
    match &shared.file {
        Some(file) => Some(file_status(file, path.clone())),
        None => shared.missing.as_ref().map(missing),
    }
}

fn file_status(file: &Writeback, path: String) -> WritebackStatus {
    let now = file.status();
    let (state, message) = match now.state {
        WritebackState::On => (ApiWritebackState::Ready, None),
        WritebackState::Slow { for_seconds } => {
            let message = format!("a write has taken {for_seconds} s so far: see to the disk");
            (ApiWritebackState::Slow, Some(message))
        }
        WritebackState::Full => {
            (ApiWritebackState::Full, Some("make it larger, or discard pages".to_owned()))
        }
        WritebackState::NoSpace => {
            (ApiWritebackState::NoSpace, Some("the file system that it is in has no room: make some".to_owned()))
        }
        WritebackState::Budget => {
            (ApiWritebackState::Waiting, Some("as much was written today as daily_limit allows: it goes on at midnight UTC, or when that is raised".to_owned()))
        }
        WritebackState::Off { reason } => (ApiWritebackState::Failed, Some(reason)),
    };
    WritebackStatus {
        state,
        message,
        path,
        size_bytes: now.size_bytes,
        segments: now.segments.total,
        free_segments: now.segments.free,
        live_bytes: now.segments.live_bytes,
        written_bytes: now.written_bytes_total,
        written_today_bytes: now.written_bytes_today,
        daily_limit_bytes: now.daily_bytes_max,
        written_records: now.written_records,
        read_records: now.read_records,
        moved_records: now.moved_records,
        write_errors: now.write_errors,
        no_space_errors: now.no_space_errors,
        state_errors: now.state_errors,
        read_errors: now.read_errors,
        discard_errors: now.discard_errors,
        io: format!("{}{}", now.io.name(), if now.direct { ", direct" } else { "" }),
    }
}

/// How far a check is.
pub(super) fn check(progress: scrub::Progress) -> CheckStatus {
    let bad = progress.bad.into_iter();
    CheckStatus {
        number: progress.number,
        state: match progress.state {
            scrub::State::Running => CheckState::Running,
            scrub::State::Done => CheckState::Done,
        },
        vm: progress.order.vm,
        rate_bytes: progress.order.rate_bytes,
        expected_pages: progress.expected_pages,
        same_filled_pages: progress.same_filled_pages,
        memory_pages: progress.arena_pages,
        file_pages: progress.file_pages,
        bad_pages: progress.bad_pages,
        bad: bad.map(|page| BadPage { vm: page.vm, slot: page.slot.0, reason: page.reason }).collect(),
        missing_pages: progress.missing_pages,
        not_checked: progress.not_checked,
    }
}

fn vm_status(served: &[Served], name: &str, vm: &VmState) -> VmStatus {
    let of_it = served.iter().find(|vm| vm.config.name == name);
    let device_vm = of_it.map(|vm| &vm.device);
    let mut status = VmStatus {
        name: name.to_owned(),
        errors: device_vm.map_or(0, |vm| vm.errors()),
        connected: device_vm.is_some_and(|vm| vm.connected()),
        waiting_stores: device_vm.map_or(0, |vm| vm.waiting_stores()),
        ..VmStatus::default()
    };
    if let Some(vm) = device_vm {
        status.load_latency_ns = latencies(vm, Path::Load);
        status.store_latency_ns = latencies(vm, Path::Store);
    }
    match vm {
        VmState::Ready(pages) => {
            if pages.table().crashes().is_quarantined() {
                status.state = ApiVmState::Quarantined;
                status.message = Some(quarantine_message(name));
            }
            count(&mut status, pages);
        }
        VmState::Unconfigured(pages) => {
            status.state = ApiVmState::Unconfigured;
            count(&mut status, pages);
        }
        VmState::Damaged(damaged) => {
            status.state = ApiVmState::Damaged;
            status.message = Some(damaged.reason.clone());
        }
    }
    status.stores = status.stores.saturating_sub(of_it.map_or(0, Served::own_stores));
    status
}

fn balloon(daemon: &Daemon, shown: &Shown) -> BalloonStatus {
    let (snapshot, decision) = (&shown.step.snapshot, &shown.step.decision);
    let memory = match &snapshot.vmm {
        Vmm::Answers(memory) => Some(memory),
        Vmm::Silent(_) | Vmm::Gone(_) => None,
    };
    let mode = match snapshot.mode {
        Mode::Off => "off",
        Mode::Observe => "observe",
        Mode::Auto => "auto",
        Mode::Fixed(_) => "fixed",
    };
    let look = shown.look.unwrap_or_default();
    let pages = daemon.store.ready(&snapshot.vm);
    let reading_back = |pages: Arc<VmStore>| daemon.shrinker.reading_back_pages(pages.id());
    BalloonStatus {
        mode: mode.to_owned(),
        reachable: memory.is_some(),
        configured_bytes: memory.map(|memory| memory.configured_bytes),
        actual_bytes: memory.map(|memory| memory.actual_bytes),
        available_bytes: memory.and_then(|memory| memory.guest?.available_bytes),
        target_bytes: decision.target_bytes,
        state: decision.reason.word(),
        reason: decision.reason.to_string(),
        reading_back_pages: pages.map_or(0, reading_back),
        promotion_ppm: look.promotion_ppm,
        stall_ppm: look.stall_ppm,
        other_swap_ppm: look.other_swap_ppm(),
    }
}

fn latencies(vm: &DeviceVm, path: fn(Source) -> Path) -> LatencyBySource {
    let of = |source| {
        let latency = vm.latencies().get(path(source));
        Histogram::of(latency.buckets(), latency.sum_ns)
    };
    LatencyBySource { same_filled: of(Source::SameFilled), pool: of(Source::Pool), file: of(Source::File) }
}

/// Why no VMM may attach to a VM, and what to do.
pub(super) fn quarantine_message(name: &str) -> String {
    format!(
        "the daemon crashed {CRASHES_MAX} times in a row while it carried out requests of this VM, whose pages are \
         kept: report what the log says of it, and run `ballast vm release {name}` to let its VMM attach again"
    )
}

fn count(status: &mut VmStatus, pages: &VmStore) {
    let Accounting { held, events, fates } = pages.accounting();
    let limits = pages.limits();
    status.size_bytes = u64::from(pages.slots()) * PAGE_SIZE_U64;
    status.limit_bytes = limits.limit_bytes;
    status.reserve_bytes = limits.reserve_bytes;
    status.weight = limits.weight;
    status.writeback = limits.writeback;
    // In memory; as in zswap, what was written back is counted apart.
    status.stored_pages = held.stored_pages - held.file_pages;
    status.same_filled_pages = held.same_filled_pages;
    status.incompressible_pages = held.incompressible_pages;
    status.duplicates = held.duplicate_pages;
    status.zombie_pages = fates.zombies(held.duplicate_pages);
    status.shared_pages = held.shared_pages;
    status.shared_objects = held.shared_objects;
    status.deduplicated_bytes = held.deduplicated_bytes;
    status.dictionaries = pages.dictionaries().count() as u64;
    status.file_pages = held.file_pages;
    status.lost_pages = held.lost_pages;
    status.pool_bytes = held.pool_bytes;
    status.payload_bytes = held.payload_bytes;
    status.metadata_bytes = pages.metadata_bytes();
    status.crashes = pages.table().crashes().count().into();
    status.stores = events.stores;
    status.loads = events.loads;
    status.invalidates = events.invalidates;
    status.counters = counters(&held, &events);
    status.refault_age_seconds = buckets(&events.refault_age_seconds.counts);
    status.refault_age_seconds_sum = events.refault_age_seconds.sum;
    status.store_delay_ms = buckets(&events.store_delay_ms.counts);
    status.store_delay_ms_sum = events.store_delay_ms.sum;
    let sizes = events.compressed_bytes;
    status.compressed_bytes = Histogram::even(SIZE_STEP_BYTES, &sizes.counts, sizes.sum);
}

fn counters(held: &Held, events: &Events) -> Counters {
    Counters {
        pool_limit_hit: events.pool_limit_hit,
        limit_hit: events.limit_hit,
        reject_reclaim_fail: events.reject_reclaim_fail,
        reject_alloc_fail: events.reject_alloc_fail,
        reject_compress_poor: events.reject_compress_poor,
        reject_fatal: events.reject_fatal,
        decompress_fail: events.decompress_fail,
        file_load_fail: events.file_load_fail,
        checked_pages: events.checked_pages,
        bad_pages: events.bad_pages,
        written_back_pages: events.written_back_pages,
        loaded_from_file: events.loaded_from_file,
        promoted_pages: events.promoted_pages,
        read_back_pages: events.read_back_pages,
        stored_incompressible_pages: held.incompressible_pages,
        delayed_stores: events.delayed_stores,
        compacted_pages: events.compacted_pages,
        recompressed_pages: events.recompressed_pages,
        deduplicated_pages: events.deduplicated_pages,
        given_up_pages: events.given_up_pages,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::control::socket::Sockets;
    use crate::device::vm::WaitingShare;

    #[test]
    fn waiting_stores_are_those_of_the_rings() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n[pool]\npressure = false\n\
             [[vm]]\nname = \"a\"\nsize = \"1MiB\"\n[[vm]]\nname = \"b\"\nsize = \"1MiB\"\n",
            dir.path().join("state"),
            dir.path().join("run")
        );
        let layers = Layers::load(Config::parse(&text, 1 << 30).unwrap()).unwrap();
        let daemon = Daemon::open(layers, Sockets::of_group(0)).unwrap();
        let seen = || {
            let status = of(&daemon);
            (status.pool.waiting_stores, [0, 1].map(|vm| status.vms[vm].waiting_stores))
        };
        let mut rings = [0, 0, 1].map(|vm| WaitingShare::new(daemon.served()[vm].device.clone()));
        for (ring, stores) in rings.iter_mut().zip([3, 4, 5]) {
            ring.set(stores);
        }
        assert_eq!(seen(), (12, [7, 5]));
        rings[1].set(1);
        assert_eq!(seen(), (9, [4, 5]));
        drop(rings);
        assert_eq!(seen(), (0, [0, 0]));
    }
}
