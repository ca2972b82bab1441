//! What the shrinker has done since the daemon started.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::policy::Reason;

/// Running numbers, written by the shrinker and read by whoever asks.
#[derive(Debug, Default)]
pub struct ShrinkerStats {
    runs: [AtomicU64; 4],
    evicted_pages: AtomicU64,
    evicted_bytes: AtomicU64,
    stale_pages: AtomicU64,
    compacted_objects: AtomicU64,
    recompressed_pages: AtomicU64,
    recompression_objects: AtomicU64,
    recompression_waits: AtomicBool,
    cleaned_segments: AtomicU64,
    full: AtomicBool,
}

/// A snapshot of [`ShrinkerStats`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Batches because a VM was at its limit.
    pub runs_limit: u64,
    /// Batches because the pool was at its maximum.
    pub runs_pool_full: u64,
    /// Batches because the host ran short of memory.
    pub runs_pressure: u64,
    /// Batches of old pages.
    pub runs_idle: u64,
    /// Pages that left for the writeback file.
    pub evicted_pages: u64,
    /// Bytes of their objects.
    pub evicted_bytes: u64,
    /// Pages that were written in vain: they had changed meanwhile.
    pub stale_pages: u64,
    /// Objects that were moved together.
    pub compacted_objects: u64,
    /// Pages that were compressed anew.
    pub recompressed_pages: u64,
    /// Objects that there were to compress anew when that began; 0 when it has ended.
    pub recompression_objects: u64,
    /// Whether pages that are to be compressed anew found no room, and are tried again after a pause.
    pub recompression_waits: bool,
    /// Segments of the file that were cleaned.
    pub cleaned_segments: u64,
    /// Whether the pool counts as full.
    pub full: bool,
}

impl ShrinkerStats {
    pub(super) fn ran(&self, reason: Reason) {
        self.runs[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn evicted(&self, pages: u64, bytes: u64, stale: u64) {
        self.evicted_pages.fetch_add(pages, Ordering::Relaxed);
        self.evicted_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.stale_pages.fetch_add(stale, Ordering::Relaxed);
    }

    pub(super) fn compacted(&self, objects: u64) {
        self.compacted_objects.fetch_add(objects, Ordering::Relaxed);
    }

    pub(super) fn recompressed(&self, pages: u64, of: u64, waits: bool) {
        self.recompressed_pages.fetch_add(pages, Ordering::Relaxed);
        self.recompression_objects.store(of, Ordering::Relaxed);
        self.recompression_waits.store(waits, Ordering::Relaxed);
    }

    pub(super) fn cleaned(&self) {
        self.cleaned_segments.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    /// The numbers now.
    #[must_use]
    pub fn get(&self) -> Reclaimed {
        let read = |number: &AtomicU64| number.load(Ordering::Relaxed);
        let runs = |reason: Reason| read(&self.runs[reason as usize]);
        Reclaimed {
            runs_limit: runs(Reason::Limit),
            runs_pool_full: runs(Reason::PoolFull),
            runs_pressure: runs(Reason::Pressure),
            runs_idle: runs(Reason::Idle),
            evicted_pages: read(&self.evicted_pages),
            evicted_bytes: read(&self.evicted_bytes),
            stale_pages: read(&self.stale_pages),
            compacted_objects: read(&self.compacted_objects),
            recompressed_pages: read(&self.recompressed_pages),
            recompression_objects: read(&self.recompression_objects),
            recompression_waits: self.recompression_waits.load(Ordering::Relaxed),
            cleaned_segments: read(&self.cleaned_segments),
            full: self.full.load(Ordering::Relaxed),
        }
    }
}
