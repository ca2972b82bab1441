//! What is told of each VM: a family for each number of its status, a sample for each VM.

use super::text::{Kind, Writer};
use super::{Number, counter, gauge};
use crate::control::api::{BalloonStatus, Bucket, LatencyBySource, VmState, VmStatus};
use crate::device::latency;
use crate::page::PAGE_SIZE_U64;
use crate::store::histogram::{BUCKETS, SIZE_STEP_BYTES};

const NANOSECONDS: f64 = 1e9;
const MILLISECONDS: f64 = 1e3;
/// Buckets of how long stores waited: up to a minute, the longest deadline.
const DELAY_BUCKETS: usize = 17;

const NUMBERS: &[Number<VmStatus>] = &[
    gauge("ballast_vm_size_bytes", "What the guest sees as its disk, in bytes.", |vm| vm.size_bytes),
    gauge("ballast_vm_limit_bytes", "Most bytes of the pool that the VM may hold.", |vm| vm.limit_bytes),
    gauge("ballast_vm_reserve_bytes", "Bytes of the pool that it keeps whatever the others need.", |vm| {
        vm.reserve_bytes
    }),
    gauge("ballast_vm_weight", "Its share of the pool against the other VMs'.", |vm| vm.weight.into()),
    gauge("ballast_vm_writeback", "Whether its pages may move to the writeback file.", |vm| {
        vm.writeback.into()
    }),
    gauge("ballast_vm_connected", "Whether a VMM is connected.", |vm| vm.connected.into()),
    gauge(
        "ballast_vm_stored_pages",
        "Pages of 4096 bytes kept in memory, same-filled ones included.",
        |vm| vm.stored_pages,
    ),
    gauge(
        "ballast_vm_same_filled_pages",
        "Those of them that repeat one word and cost no pool memory.",
        |vm| vm.same_filled_pages,
    ),
    gauge(
        "ballast_vm_incompressible_pages",
        "Those of them that would not shrink and are kept as they are.",
        |vm| vm.incompressible_pages,
    ),
    gauge("ballast_vm_dictionaries", "Dictionaries that its pages are compressed with.", |vm| {
        vm.dictionaries
    }),
    gauge("ballast_vm_duplicate_pages", "Those of them that the guest read since it wrote them.", |vm| {
        vm.duplicates
    }),
    gauge(
        "ballast_vm_zombie_pages",
        "Those of these that it will not read again, an estimate by what became of others.",
        |vm| vm.zombie_pages,
    ),
    gauge(
        "ballast_vm_shared_pages",
        "Those of them that are kept as objects which equal pages of the VM may share.",
        |vm| vm.shared_pages,
    ),
    gauge("ballast_vm_shared_objects", "These objects.", |vm| vm.shared_objects),
    gauge(
        "ballast_vm_deduplicated_bytes",
        "Bytes of the pool that these pages don't take because equal ones are kept once.",
        |vm| vm.deduplicated_bytes,
    ),
    gauge("ballast_vm_file_pages", "Pages in the writeback file.", |vm| vm.file_pages),
    gauge(
        "ballast_vm_lost_pages",
        "Pages that could not be kept: errors to read until they are written again.",
        |vm| vm.lost_pages,
    ),
    gauge("ballast_vm_pool_bytes", "Bytes of the pool that the VM's pages take.", |vm| vm.pool_bytes),
    gauge("ballast_vm_payload_bytes", "Bytes of its compressed pages in the pool themselves.", |vm| {
        vm.payload_bytes
    }),
    gauge("ballast_vm_metadata_bytes", "Bytes kept beside them: its page table, generations, lists.", |vm| {
        vm.metadata_bytes
    }),
    gauge("ballast_vm_waiting_stores", "Requests to write that wait for room now.", |vm| vm.waiting_stores),
    gauge(
        "ballast_vm_consecutive_crashes",
        "Times in a row that the daemon crashed while it worked for it.",
        |vm| vm.crashes,
    ),
    counter("ballast_vm_stores", "Pages that the guest wrote.", |vm| vm.stores),
    counter("ballast_vm_loads", "Pages that the guest read.", |vm| vm.loads),
    counter("ballast_vm_invalidates", "Pages that the guest discarded or overwrote.", |vm| vm.invalidates),
    counter("ballast_vm_errors", "Requests that ended in an error.", |vm| vm.errors),
    counter("ballast_vm_pool_limit_hit", "Stores that found the pool at its maximum.", |vm| {
        vm.counters.pool_limit_hit
    }),
    counter("ballast_vm_limit_hit", "Stores that found the VM at its limit.", |vm| vm.counters.limit_hit),
    counter("ballast_vm_reject_reclaim_fail", "Stores that failed: no room could be made in time.", |vm| {
        vm.counters.reject_reclaim_fail
    }),
    counter(
        "ballast_vm_reject_alloc_fail",
        "Stores that failed: the state directory had no memory left.",
        |vm| vm.counters.reject_alloc_fail,
    ),
    counter(
        "ballast_vm_reject_compress_poor",
        "Stores of pages that would not shrink; they are kept.",
        |vm| vm.counters.reject_compress_poor,
    ),
    counter(
        "ballast_vm_reject_fatal",
        "Requests that failed because the daemon crashed twice at them.",
        |vm| vm.counters.reject_fatal,
    ),
    counter("ballast_vm_decompress_fail", "Loads that failed because the stored page was damaged.", |vm| {
        vm.counters.decompress_fail
    }),
    counter("ballast_vm_file_load_fail", "Loads that failed because of the writeback file.", |vm| {
        vm.counters.file_load_fail
    }),
    counter("ballast_vm_checked_pages", "Pages that a check or a round of scrubbing looked at.", |vm| {
        vm.counters.checked_pages
    }),
    counter(
        "ballast_vm_bad_pages",
        "Pages found bad, by a load or a check; while 1024 are bad, no more are counted.",
        |vm| vm.counters.bad_pages,
    ),
    counter("ballast_vm_written_back_pages", "Pages moved to the writeback file.", |vm| {
        vm.counters.written_back_pages
    }),
    counter("ballast_vm_loaded_from_file", "Pages read from the writeback file for the guest.", |vm| {
        vm.counters.loaded_from_file
    }),
    counter(
        "ballast_vm_read_back_pages",
        "Pages moved back from the file into the pool, before the guest read them, because it was given memory.",
        |vm| vm.counters.read_back_pages,
    ),
    counter("ballast_vm_promoted_pages", "Pages moved back from the file into the pool.", |vm| {
        vm.counters.promoted_pages
    }),
    counter("ballast_vm_delayed_stores", "Stores that had to wait for room, those in vain included.", |vm| {
        vm.counters.delayed_stores
    }),
    counter("ballast_vm_compacted_pages", "Pages whose objects were moved within the arena.", |vm| {
        vm.counters.compacted_pages
    }),
    counter("ballast_vm_recompressed_pages", "Pages compressed anew for another pool.", |vm| {
        vm.counters.recompressed_pages
    }),
    counter(
        "ballast_vm_deduplicated_pages",
        "Those of them that were found to be the same as another page, and are kept as that.",
        |vm| vm.counters.deduplicated_pages,
    ),
    counter(
        "ballast_vm_given_up_pages",
        "Pages given up because what was stored of them is damaged.",
        |vm| vm.counters.given_up_pages,
    ),
];

/// Numbers of the balloons that are known.
type OfBalloon = fn(&BalloonStatus) -> Option<u64>;
const BALLOONS: [(&str, &str, OfBalloon); 9] = [
    ("ballast_vm_balloon_reachable", "Whether the VMM of a squeezed VM answers.", |balloon| {
        Some(balloon.reachable.into())
    }),
    ("ballast_vm_balloon_configured_bytes", "What the guest was booted with, in bytes.", |balloon| {
        balloon.configured_bytes
    }),
    ("ballast_vm_balloon_actual_bytes", "What the guest has, in bytes: all but its balloon.", |balloon| {
        balloon.actual_bytes
    }),
    (
        "ballast_vm_balloon_target_bytes",
        "What the guest should have, or would have in the mode observe, in bytes.",
        |balloon| balloon.reachable.then_some(balloon.target_bytes),
    ),
    (
        "ballast_vm_balloon_available_bytes",
        "What the guest could use without swapping, in bytes.",
        |balloon| balloon.available_bytes,
    ),
    (
        "ballast_vm_balloon_reading_back_pages",
        "Pages still to be read back from the writeback file because the guest was given memory.",
        |balloon| Some(balloon.reading_back_pages),
    ),
    (
        "ballast_vm_balloon_promotion_ppm",
        "What came back of the guest's working set in a minute, smoothed, in millionths.",
        |balloon| Some(balloon.promotion_ppm),
    ),
    (
        "ballast_vm_balloon_stall_ppm",
        "Time that the guest waited for loads, smoothed, in millionths.",
        |balloon| Some(balloon.stall_ppm),
    ),
    (
        "ballast_vm_balloon_other_swap_ppm",
        "Of what the guest pushes out, the part that goes to another swap than ours, smoothed, in millionths.",
        |balloon| balloon.other_swap_ppm,
    ),
];

fn write_balloons(vms: &[VmStatus], writer: &mut Writer) {
    let balloons = vms.iter().filter_map(|vm| Some((vm.name.as_str(), vm.balloon.as_ref()?)));
    let balloons: Vec<_> = balloons.collect();
    for (name, help, of) in BALLOONS {
        let samples = balloons.iter().filter_map(|(vm, balloon)| Some((*vm, of(balloon)?)));
        let samples: Vec<_> = samples.collect();
        // A family without a sample is one that nobody asked for.
        if !samples.is_empty() {
            writer.family(name, Kind::Gauge, help);
            samples.iter().for_each(|(vm, value)| writer.sample(&[("vm", vm)], value));
        }
    }
    if !balloons.is_empty() {
        let help = "1 for the mode that the balloon is in: in observe its target is told to nobody.";
        writer.family("ballast_vm_balloon_mode", Kind::Gauge, help);
    }
    for (vm, balloon) in &balloons {
        writer.sample(&[("vm", vm), ("mode", &balloon.mode)], 1);
    }
    if !balloons.is_empty() {
        let help = "1 for the word that says what goes on with the balloon; other words have no sample.";
        writer.family("ballast_vm_balloon_state", Kind::Gauge, help);
    }
    for (vm, balloon) in balloons {
        writer.sample(&[("vm", vm), ("state", &balloon.state.to_string())], 1);
    }
}

const STATES: [VmState; 4] = [VmState::Ready, VmState::Damaged, VmState::Unconfigured, VmState::Quarantined];

pub(super) fn write(vms: &[VmStatus], writer: &mut Writer) {
    if vms.is_empty() {
        return;
    }
    for Number { name, kind, help, of } in NUMBERS {
        writer.family(name, *kind, help);
        for vm in vms {
            writer.sample(&[("vm", &vm.name)], of(vm));
        }
    }
    write_balloons(vms, writer);
    writer.family("ballast_vm_state", Kind::Gauge, "1 for the state that the VM is in, 0 for the others.");
    for vm in vms {
        for state in STATES {
            let labels = [("vm", vm.name.as_str()), ("state", state.as_str())];
            writer.sample(&labels, u8::from(vm.state == state));
        }
    }
    write_latencies(vms, writer);
    write_histograms(vms, writer);
}

/// `first` and its doubles.
fn doubling(first: u64, buckets: usize) -> impl Iterator<Item = u64> {
    (0..buckets).map(move |n| first << n)
}

fn write_latencies(vms: &[VmStatus], writer: &mut Writer) {
    // Coarser than the status has them: each bucket is a series.
    let les = || doubling(latency::FIRST_BUCKET_NS, latency::DOUBLINGS + 1);
    let mut write = |name, help, by: fn(&VmStatus) -> &LatencyBySource| {
        writer.family(name, Kind::Histogram, help);
        for vm in vms {
            let LatencyBySource { same_filled, pool, file } = by(vm);
            for (source, of) in [("same_filled", same_filled), ("pool", pool), ("file", file)] {
                let labels = [("vm", vm.name.as_str()), ("source", source)];
                writer.histogram(&labels, &of.buckets, les(), of.sum, NANOSECONDS);
            }
        }
    };
    write(
        "ballast_vm_store_latency_seconds",
        "How long requests to write took, from when they were taken off the ring to their answers, by where their pages went, in seconds; \
         file: a page was there, of which they change a part.",
        |vm| &vm.store_latency_ns,
    );
    write(
        "ballast_vm_load_latency_seconds",
        "The same of requests to read, by the slowest source of their pages, in seconds.",
        |vm| &vm.load_latency_ns,
    );
}

fn write_histograms(vms: &[VmStatus], writer: &mut Writer) {
    type Of = fn(&VmStatus) -> (&[Bucket], u64);
    let mut write = |name, help, of: Of, les: &dyn Fn() -> Vec<u64>, per| {
        writer.family(name, Kind::Histogram, help);
        for vm in vms {
            let (buckets, sum) = of(vm);
            writer.histogram(&[("vm", &vm.name)], buckets, les().into_iter(), sum, per);
        }
    };
    write(
        "ballast_vm_compressed_bytes",
        "What pages that the guest wrote were compressed to, in bytes; without same-filled ones.",
        |vm| (&vm.compressed_bytes.buckets, vm.compressed_bytes.sum),
        &|| (1..=PAGE_SIZE_U64 / SIZE_STEP_BYTES).map(|n| n * SIZE_STEP_BYTES).collect(),
        1.0,
    );
    write(
        "ballast_vm_refault_age_seconds",
        "How long pages had not been used when the guest read them, in seconds.",
        |vm| (&vm.refault_age_seconds, vm.refault_age_seconds_sum),
        &|| doubling(1, BUCKETS - 1).collect(),
        1.0,
    );
    write(
        "ballast_vm_store_delay_seconds",
        "How long writes waited for room, those that did, in seconds.",
        |vm| (&vm.store_delay_ms, vm.store_delay_ms_sum),
        &|| doubling(1, DELAY_BUCKETS).collect(),
        MILLISECONDS,
    );
}
