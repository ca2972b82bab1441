//! What is told of the daemon as a whole: the pool, the shrinker, the writeback file.

use super::text::{Kind, Writer};
use super::{Number, counter, gauge, write_numbers};
use crate::control::api::{PoolStatus, ShrinkerStatus, Status, WritebackState, WritebackStatus};

const POOL: &[Number<PoolStatus>] = &[
    gauge("ballast_pool_max_bytes", "Most bytes that the pool may take.", |pool| pool.max_bytes),
    gauge(
        "ballast_pool_used_bytes",
        "Bytes that it takes: compressed pages, and what is lost between them.",
        |pool| pool.used_bytes,
    ),
    gauge("ballast_pool_metadata_bytes", "Bytes kept beside it: page tables, generations, lists.", |pool| {
        pool.metadata_bytes
    }),
    gauge(
        "ballast_pool_full",
        "Whether it was at its maximum, and not below the accept threshold since.",
        |pool| pool.full.into(),
    ),
    gauge("ballast_pool_stuck", "Whether it is full and no page can leave.", |pool| {
        pool.stuck.is_some().into()
    }),
    counter(
        "ballast_pool_mended_pages",
        "Pages of the pool's memory that could not be read any more and were replaced.",
        |pool| pool.mended_pages.into(),
    ),
];

const SHRINKER: &[Number<ShrinkerStatus>] = &[
    counter("ballast_shrinker_evicted_pages", "Pages that the shrinker moved out of the pool.", |done| {
        done.evicted_pages
    }),
    counter("ballast_shrinker_evicted_bytes", "Bytes of the pool that they took.", |done| done.evicted_bytes),
    counter("ballast_shrinker_stale_pages", "Pages written in vain: they had changed meanwhile.", |done| {
        done.stale_pages
    }),
    counter("ballast_shrinker_compacted_objects", "Objects moved to make the pool smaller.", |done| {
        done.compacted_objects
    }),
    counter(
        "ballast_shrinker_recompressed_objects",
        "Objects compressed again for another compressor.",
        |done| done.recompressed_objects,
    ),
    gauge(
        "ballast_shrinker_recompression_objects",
        "Objects that there were to compress again when that was asked for; 0 when it has ended.",
        |done| done.recompression_objects,
    ),
    gauge("ballast_shrinker_recompression_objects_left", "Those of them that are left.", |done| {
        done.recompression_objects_left
    }),
    gauge("ballast_shrinker_recompression_waits", "Whether recompression found no room.", |done| {
        done.recompression_waits.into()
    }),
    counter(
        "ballast_shrinker_cleaned_segments",
        "Segments of the writeback file that were cleaned.",
        |done| done.cleaned_segments,
    ),
];

const WRITEBACK: &[Number<WritebackStatus>] = &[
    gauge("ballast_writeback_size_bytes", "Most bytes of the writeback file that are used.", |file| {
        file.size_bytes
    }),
    gauge("ballast_writeback_segments", "Segments of 1 MiB that this is divided into.", |file| file.segments),
    gauge("ballast_writeback_free_segments", "Segments with nothing in them.", |file| file.free_segments),
    gauge("ballast_writeback_live_bytes", "Bytes of the file that some page needs.", |file| file.live_bytes),
    counter(
        "ballast_writeback_written_bytes",
        "Bytes written to it, since its state directory was made.",
        |file| file.written_bytes,
    ),
    gauge("ballast_writeback_written_today_bytes", "Bytes written to it today (UTC).", |file| {
        file.written_today_bytes
    }),
    counter("ballast_writeback_written_records", "Records written, one for each page.", |file| {
        file.written_records
    }),
    counter("ballast_writeback_read_records", "Records read.", |file| file.read_records),
    counter("ballast_writeback_moved_records", "Records that cleaning moved within the file.", |file| {
        file.moved_records
    }),
    counter("ballast_writeback_write_errors", "Batches that failed to be written.", |file| file.write_errors),
    counter("ballast_writeback_no_space_errors", "Batches for which its file system had no room.", |file| {
        file.no_space_errors
    }),
    counter("ballast_writeback_state_errors", "Failed writes of what has to be known of the file.", |file| {
        file.state_errors
    }),
    counter("ballast_writeback_read_errors", "Reads that failed.", |file| file.read_errors),
    counter(
        "ballast_writeback_discard_errors",
        "Failed attempts to give room back to the file system.",
        |file| file.discard_errors,
    ),
];

const STATES: [WritebackState; 7] = [
    WritebackState::Ready,
    WritebackState::Slow,
    WritebackState::Full,
    WritebackState::NoSpace,
    WritebackState::Waiting,
    WritebackState::Failed,
    WritebackState::Missing,
];

pub(super) fn write(status: &Status, writer: &mut Writer) {
    writer.family("ballast_build", Kind::Info, "The daemon's version.");
    writer.sample(&[("version", &status.version)], 1);
    let help = "When the daemon started, in seconds since 1970.";
    writer.family("ballast_start_time_seconds", Kind::Gauge, help);
    writer.sample(&[], status.start_time_seconds);
    pool(&status.pool, writer);
    shrinker(&status.shrinker, writer);
    if let Some(file) = &status.writeback {
        writeback(file, writer);
    }
    if let Some(pressure) = &status.memory_pressure {
        let help =
            "The share of the last ten seconds in which some or all tasks of the host waited for memory.";
        writer.family("ballast_memory_pressure_avg10_ratio", Kind::Gauge, help);
        for (tasks, ppm) in [("some", pressure.some_avg10_ppm), ("full", pressure.full_avg10_ppm)] {
            writer.sample(&[("tasks", tasks)], ppm as f64 / 1e6);
        }
    }
}

fn pool(pool: &PoolStatus, writer: &mut Writer) {
    write_numbers(POOL, pool, writer);
    let help = "The share of the maximum below which a pool that was full counts as not full again.";
    writer.family("ballast_pool_accept_threshold_ratio", Kind::Gauge, help);
    writer.sample(&[], f64::from(pool.accept_threshold_percent) / 100.0);
    writer.family("ballast_pool_compressor", Kind::Info, "What new pages are compressed with.");
    writer.sample(&[("compressor", &pool.compressor)], 1);
    writer.family("ballast_pool_objects", Kind::Gauge, "Compressed pages in the pool, by what made them.");
    for made in &pool.pools {
        writer.sample(&[("compressor", &made.compressor), ("state", made.state.as_str())], made.objects);
    }
    let help = "Compressed pages that a pool held when new ones ceased to go to it; 0 of the current one.";
    writer.family("ballast_pool_objects_at_first", Kind::Gauge, help);
    for made in &pool.pools {
        let labels = [("compressor", &*made.compressor), ("state", made.state.as_str())];
        writer.sample(&labels, made.objects_at_first);
    }
    let help = "How the daemon learns that the host's memory is short; none when it doesn't.";
    writer.family("ballast_pressure_source", Kind::Info, help);
    writer.sample(&[("source", pool.pressure_source.as_deref().unwrap_or("none"))], 1);
}

fn shrinker(done: &ShrinkerStatus, writer: &mut Writer) {
    let runs = &done.runs_by_reason;
    writer.family("ballast_shrinker_runs", Kind::Counter, "Batches of the shrinker, by what they were for.");
    let reasons = [
        ("pool_full", runs.pool_full),
        ("limit", runs.limit),
        ("pressure", runs.pressure),
        ("idle", runs.idle),
    ];
    for (reason, count) in reasons {
        writer.sample(&[("reason", reason)], count);
    }
    write_numbers(SHRINKER, done, writer);
}

fn writeback(file: &WritebackStatus, writer: &mut Writer) {
    writer.family(
        "ballast_writeback_state",
        Kind::Gauge,
        "1 for the state that the file is in, 0 for the others.",
    );
    for state in STATES {
        writer.sample(&[("state", state.as_str())], u8::from(file.state == state));
    }
    write_numbers(WRITEBACK, file, writer);
    if let Some(limit_bytes) = file.daily_limit_bytes {
        let help = "Most bytes that may be written to the file in a day.";
        writer.family("ballast_writeback_daily_limit_bytes", Kind::Gauge, help);
        writer.sample(&[], limit_bytes);
    }
    writer.family("ballast_writeback_io", Kind::Info, "How the file is read and written.");
    writer.sample(&[("io", &file.io)], 1);
}
