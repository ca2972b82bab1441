//! What the policy is told of the daemon: numbers that the store and the device have anyway, in the policy's words.

use rustix::time::{ClockId, clock_gettime};

use crate::balloon::{Counters, Held, Host, Snapshot, Vmm};
use crate::config::{SqueezeConfig, VmConfig};
use crate::device::latency::Path;
use crate::device::vm::DeviceVm;
use crate::reclaim::shrinker::pool_marks;
use crate::runtime::daemon::Daemon;
use crate::store::accounting::Accounting;
use crate::store::vm::{Source, VmStore};

/// Of the buckets of a histogram of ages in seconds, those up to 256 s: who was missed within some minutes.
const YOUNG_BUCKETS: usize = 9;

/// The boot-time clock, in milliseconds.
pub(super) fn now_ms() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let ms = now.tv_sec.saturating_mul(1000).saturating_add(now.tv_nsec / 1_000_000);
    u64::try_from(ms).unwrap_or(0)
}

/// The host at this tick.
pub(super) fn host(daemon: &Daemon, interval_ms: u64) -> Host {
    let arena = daemon.store.arena();
    Host {
        now_ms: now_ms(),
        interval_ms,
        budget_bytes: daemon.balloons.budget_bytes(),
        pressure: daemon.balloons.pressure(now_ms(), 2 * interval_ms),
        pool_bytes: arena.used_bytes(),
        pool_max_bytes: arena.max_bytes(),
        pool_start_bytes: Some(pool_marks(daemon.store.shared()).start_bytes),
        waiting_stores: daemon.served().iter().map(|served| served.device.waiting_stores()).sum(),
    }
}

/// A VM at this tick.
pub(super) fn vm(
    daemon: &Daemon,
    config: &VmConfig,
    squeeze: &SqueezeConfig,
    device: &DeviceVm,
    vmm: Vmm,
) -> Snapshot {
    let pages = daemon.store.ready(&config.name);
    let file_takes = daemon.store.shared().file.as_ref().is_some_and(|file| file.is_on());
    Snapshot {
        vm: config.name.clone(),
        mode: squeeze.mode,
        min_bytes: squeeze.min_bytes.unwrap_or(0),
        max_bytes: squeeze.max_bytes.unwrap_or(u64::MAX),
        weight: config.weight,
        promotion_ppm: squeeze.promotion_rate_ppm.into(),
        vmm,
        counters: pages.as_ref().map_or_else(Counters::default, |pages| counters(pages, device)),
        held: pages
            .map_or_else(Held::default, |pages| held(config, &pages, file_takes, device.waiting_stores())),
    }
}

fn counters(pages: &VmStore, device: &DeviceVm) -> Counters {
    let Accounting { events, .. } = pages.accounting();
    let ages = &events.refault_age_seconds.counts;
    let load_ns = |source| device.latencies().get(Path::Load(source)).sum_ns;
    Counters {
        stores: events.stores,
        loads: events.loads,
        promoted: ages.iter().sum(),
        promoted_young: ages.iter().take(YOUNG_BUCKETS).sum(),
        load_ns: [Source::SameFilled, Source::Pool, Source::File].map(load_ns).iter().sum(),
        delayed_stores: events.delayed_stores,
        failed_stores: events.reject_reclaim_fail + events.reject_alloc_fail,
    }
}

fn held(config: &VmConfig, pages: &VmStore, file_takes: bool, waiting_stores: u64) -> Held {
    let Accounting { held, .. } = pages.accounting();
    Held {
        stored_pages: held.stored_pages,
        pool_pages: held.stored_pages - held.file_pages - held.same_filled_pages,
        pool_bytes: held.pool_bytes,
        limit_bytes: config.limit_bytes,
        size_bytes: config.size_bytes,
        writeback: file_takes && config.writeback,
        waiting_stores,
    }
}
