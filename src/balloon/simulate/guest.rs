//! A guest as the policy's tests need it: sets of pages with a heat each, a kernel that evicts the coldest it can find and
//! is now and then mistaken, a swap disk, and a balloon that takes its time. Flows, not pages: what is touched in a tick is
//! the share that chance would touch.

use super::super::snapshot::Counters;
use super::super::vmm::{GuestMemory, GuestStats};
use crate::page::PAGE_SIZE_U64;

const MIB: f64 = 1_048_576.0;
/// What a balloon moves in a second, and what a guest can fault in.
const BALLOON_BYTES_PER_S: f64 = 256.0 * MIB;
const FAULT_BYTES_PER_S: f64 = 200.0 * MIB;
/// What the kernel takes for itself, and what it keeps free while it can push something out: before it kills it uses that.
const KERNEL_BYTES: f64 = 40.0 * MIB;
const WATERMARK_BYTES: f64 = 4.0 * MIB;
/// A load out of the pool as the guest sees it.
const LOAD_NS: u64 = 20_000;
/// Pages untouched for as long are evicted before others; the kernel can't tell more.
const LRU_SECONDS: f64 = 60.0;
/// Of what is evicted, the share that is picked without regard to heat.
const MISTAKEN: f64 = 0.02;
/// A page in a zram of the guest's own takes this part of its memory.
const ZRAM_PART: f64 = 1.0 / 3.0;
/// Who touches a page at least so often misses it soon.
const YOUNG_SECONDS: f64 = 256.0;

/// Pages that are used alike.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Set {
    /// How many bytes.
    pub bytes: f64,
    /// How often each page is touched, in times a second.
    pub touches_per_s: f64,
}

/// A set, and how much of it is in memory.
#[derive(Clone, Copy, Debug)]
struct Pages {
    set: Set,
    resident_bytes: f64,
}

impl Pages {
    /// The share that is touched within a time.
    fn touched(&self, seconds: f64) -> f64 {
        1.0 - (-self.set.touches_per_s * seconds).exp()
    }
}

/// A guest that runs.
#[derive(Clone, Debug)]
pub struct Guest {
    configured_bytes: f64,
    actual_bytes: f64,
    swap_bytes: f64,
    load_ns: u64,
    /// What its disk takes in the next run, in bytes.
    out_bytes_max: f64,
    /// What the pool takes of it still, in bytes of its memory.
    pool_room_bytes: f64,
    /// What was on its disk as its swap was switched off: nobody has discarded that.
    left_bytes: f64,
    sets: Vec<Pages>,
    /// A zram of its own that it swaps to first: how much it takes, and how much is in it.
    zram_bytes_max: f64,
    zram_bytes: f64,
    /// Pushed out to us, come back from us, those that were missed soon; pushed out and come back over all.
    counters: [f64; 5],
    /// What it couldn't push out because the pool was full, in bytes.
    failed_bytes: f64,
    oom_kills: u64,
    /// Whether its kernel takes memory out of the balloon before it kills.
    deflates: bool,
    /// The share of the last tick that it spent waiting for pages.
    stalled: f64,
}

impl Guest {
    /// One with so much memory and swap, in bytes, that has just touched all of its pages.
    #[must_use]
    pub fn new(configured_bytes: u64, swap_bytes: u64, sets: &[Set]) -> Self {
        let mut guest = Self {
            configured_bytes: configured_bytes as f64,
            actual_bytes: configured_bytes as f64,
            swap_bytes: swap_bytes as f64,
            load_ns: LOAD_NS,
            out_bytes_max: f64::INFINITY,
            pool_room_bytes: f64::INFINITY,
            left_bytes: 0.0,
            sets: Vec::new(),
            zram_bytes_max: 0.0,
            zram_bytes: 0.0,
            counters: [0.0; 5],
            failed_bytes: 0.0,
            oom_kills: 0,
            deflates: false,
            stalled: 0.0,
        };
        guest.work_on(sets);
        guest
    }

    /// It has a zram of its own, for so many bytes, that it swaps to before it swaps to us.
    #[must_use]
    pub fn with_zram(self, bytes: u64) -> Self {
        Self { zram_bytes_max: bytes as f64, ..self }
    }

    /// Its kernel takes memory out of the balloon before it kills: deflate on OOM.
    #[must_use]
    pub fn with_deflation(self) -> Self {
        Self { deflates: true, ..self }
    }

    /// What it has pushed out to us comes back from the file, in so many nanoseconds a page.
    #[must_use]
    pub fn with_file(self, load_ns: u64) -> Self {
        Self { load_ns, ..self }
    }

    /// Its sets are these from now on. What a set grew by is allocated, and so resident; what it shrank by is freed.
    pub fn work_on(&mut self, sets: &[Set]) {
        self.sets
            .resize(sets.len(), Pages { set: Set { bytes: 0.0, touches_per_s: 0.0 }, resident_bytes: 0.0 });
        for (pages, set) in self.sets.iter_mut().zip(sets) {
            let grown_bytes = set.bytes - pages.set.bytes;
            pages.resident_bytes = (pages.resident_bytes + grown_bytes.max(0.0)).min(set.bytes);
            pages.set = *set;
        }
        self.zram_bytes = self.zram_bytes.min(self.swapped_bytes());
    }

    /// Its disk takes so much in the next run, in bytes: its balloon waits for that.
    pub(super) fn push_out_at_most(&mut self, bytes: f64) {
        self.out_bytes_max = bytes;
    }

    /// The pool takes so much of it, in bytes of its memory; what is more fails.
    pub(super) fn pool_takes(&mut self, bytes: f64) {
        self.pool_room_bytes = bytes;
    }

    /// It has no swap any more, if there is room for all that is swapped out; else it goes on as it was.
    pub fn swap_off(&mut self) -> bool {
        let back_bytes = self.swapped_bytes() - self.zram_bytes;
        let fits = back_bytes <= self.actual_bytes - self.used_bytes() - WATERMARK_BYTES;
        if fits && self.zram_bytes <= 0.0 {
            self.sets.iter_mut().for_each(|pages| pages.resident_bytes = pages.set.bytes);
            self.counters[1] += back_bytes;
            self.counters[4] += back_bytes;
            (self.swap_bytes, self.left_bytes) = (0.0, self.left_bytes + back_bytes);
        }
        self.swap_bytes <= 0.0
    }

    /// Lets some time go by, with a target for the balloon.
    pub fn run(&mut self, seconds: f64, target_bytes: u64) {
        let most_bytes = BALLOON_BYTES_PER_S * seconds;
        let target_bytes = (target_bytes as f64).min(self.configured_bytes);
        // The balloon takes what can be freed: what is free, and what there is swap for.
        let room_bytes =
            self.room_bytes().min(self.out_bytes_max) + self.zram_room_bytes() * (1.0 - ZRAM_PART);
        let freeable_bytes = (self.actual_bytes - self.used_bytes() - WATERMARK_BYTES).max(0.0) + room_bytes;
        let wanted_bytes = (self.actual_bytes - target_bytes).min(most_bytes);
        if wanted_bytes > freeable_bytes {
            self.fail(wanted_bytes - freeable_bytes);
        }
        self.actual_bytes += (-wanted_bytes).clamp(-freeable_bytes, most_bytes);
        self.reclaim();
        self.touch(seconds);
        self.reclaim();
    }

    /// What is not in memory and touched comes back, as fast as it can.
    fn touch(&mut self, seconds: f64) {
        let wanted: f64 = self
            .sets
            .iter()
            .map(|pages| (pages.set.bytes - pages.resident_bytes) * pages.touched(seconds))
            .sum();
        let most_bytes = FAULT_BYTES_PER_S * seconds * LOAD_NS as f64 / self.load_ns as f64;
        let share = if wanted > 0.0 { (most_bytes / wanted).min(1.0) } else { 0.0 };
        let swapped_bytes = self.swapped_bytes();
        let ours = if swapped_bytes > 0.0 { 1.0 - self.zram_bytes / swapped_bytes } else { 1.0 };
        for pages in &mut self.sets {
            let back_bytes = (pages.set.bytes - pages.resident_bytes) * pages.touched(seconds) * share;
            pages.resident_bytes += back_bytes;
            self.counters[1] += back_bytes * ours;
            self.pool_room_bytes += back_bytes * ours;
            if pages.set.touches_per_s * YOUNG_SECONDS >= 1.0 {
                self.counters[2] += back_bytes * ours;
            }
            self.counters[4] += back_bytes;
            self.zram_bytes -= back_bytes * (1.0 - ours);
        }
        let back_pages = wanted * share * ours / PAGE_SIZE_U64 as f64;
        self.stalled = (back_pages * self.load_ns as f64 / 1e9 / seconds).min(1.0);
    }

    /// Pushes out what doesn't fit, the coldest first as far as the kernel knows.
    fn reclaim(&mut self) {
        let mut short_bytes = self.used_bytes() + WATERMARK_BYTES - self.actual_bytes;
        if short_bytes <= 0.0 {
            return;
        }
        // What goes into its zram frees a part of its size.
        let zram_bytes = (short_bytes / (1.0 - ZRAM_PART)).min(self.zram_room_bytes());
        short_bytes += zram_bytes * ZRAM_PART;
        let room_bytes = self.room_bytes() + zram_bytes;
        let full_bytes = room_bytes + WATERMARK_BYTES;
        if self.deflates {
            let deflated_bytes =
                (short_bytes - full_bytes).clamp(0.0, self.configured_bytes - self.actual_bytes);
            self.actual_bytes += deflated_bytes;
            short_bytes -= deflated_bytes;
        }
        if short_bytes > room_bytes {
            self.fail(short_bytes - room_bytes);
        }
        // Sums of flows are a little off; a page is more than that.
        while short_bytes > full_bytes + PAGE_SIZE_U64 as f64 {
            short_bytes -= self.kill();
        }
        short_bytes = short_bytes.min(room_bytes);
        if short_bytes <= 0.0 {
            return;
        }
        let total_bytes: f64 = self.sets.iter().map(|pages| pages.resident_bytes).sum();
        let mistaken_bytes = short_bytes * MISTAKEN;
        for pages in &mut self.sets {
            pages.resident_bytes -= mistaken_bytes * pages.resident_bytes / total_bytes.max(1.0);
        }
        let mut left_bytes = short_bytes - mistaken_bytes;
        let mut order: Vec<usize> = (0..self.sets.len()).collect();
        order.sort_by(|a, b| {
            self.sets[*a].touched(LRU_SECONDS).total_cmp(&self.sets[*b].touched(LRU_SECONDS))
        });
        for index in order {
            let taken_bytes = left_bytes.min(self.sets[index].resident_bytes);
            self.sets[index].resident_bytes -= taken_bytes;
            left_bytes -= taken_bytes;
        }
        let out_bytes = short_bytes - left_bytes;
        let zram_bytes = zram_bytes.min(out_bytes);
        self.zram_bytes += zram_bytes;
        self.counters[0] += out_bytes - zram_bytes;
        self.pool_room_bytes -= out_bytes - zram_bytes;
        self.counters[3] += out_bytes;
    }

    /// Its disk had room for so much more; the pool hadn't.
    fn fail(&mut self, bytes: f64) {
        self.failed_bytes += bytes.min(self.disk_room_bytes() - self.room_bytes());
    }

    /// Nothing else can leave: the kernel ends who owns the largest set, which frees so much.
    fn kill(&mut self) -> f64 {
        self.oom_kills += 1;
        let largest = self.sets.iter_mut().max_by(|a, b| a.resident_bytes.total_cmp(&b.resident_bytes));
        let Some(pages) = largest.filter(|pages| pages.resident_bytes > 0.0) else { return f64::INFINITY };
        pages.set.bytes = 0.0;
        std::mem::take(&mut pages.resident_bytes)
    }

    fn used_bytes(&self) -> f64 {
        let resident_bytes: f64 = self.sets.iter().map(|pages| pages.resident_bytes).sum();
        KERNEL_BYTES + resident_bytes + self.zram_bytes * ZRAM_PART
    }

    /// What can be pushed out to us.
    fn room_bytes(&self) -> f64 {
        self.disk_room_bytes().min(self.pool_room_bytes)
    }

    /// What its disk has room for.
    fn disk_room_bytes(&self) -> f64 {
        (self.swap_bytes - (self.swapped_bytes() - self.zram_bytes)).max(0.0)
    }

    fn zram_room_bytes(&self) -> f64 {
        (self.zram_bytes_max - self.zram_bytes).max(0.0)
    }

    fn swapped_bytes(&self) -> f64 {
        self.sets.iter().map(|pages| pages.set.bytes - pages.resident_bytes).sum()
    }

    /// What its VMM would say.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        let free_bytes = bytes((self.actual_bytes - self.used_bytes()).max(0.0));
        let stats = GuestStats {
            available_bytes: Some(free_bytes),
            free_bytes: Some(free_bytes),
            oom_kills: Some(self.oom_kills),
            swap_out_bytes: Some(bytes(self.counters[3])),
            swap_in_bytes: Some(bytes(self.counters[4])),
            ..GuestStats::default()
        };
        let (configured_bytes, actual_bytes) = (bytes(self.configured_bytes), bytes(self.actual_bytes));
        GuestMemory { configured_bytes, actual_bytes, guest: Some(stats) }
    }

    /// What its disk would have counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let [stores, promoted, promoted_young, ..] =
            self.counters.map(|counter| bytes(counter) / PAGE_SIZE_U64);
        let load_ns = promoted * self.load_ns;
        let failed_stores = bytes(self.failed_bytes) / PAGE_SIZE_U64;
        let counters = Counters { stores, loads: promoted, promoted, promoted_young, ..Counters::default() };
        Counters { load_ns, failed_stores, ..counters }
    }

    /// Bytes that are swapped out to us, with those that were as its swap was switched off.
    #[must_use]
    pub fn swapped(&self) -> u64 {
        bytes(self.swapped_bytes() - self.zram_bytes + self.left_bytes)
    }

    /// Bytes that are in its own zram.
    #[must_use]
    pub fn in_zram(&self) -> u64 {
        bytes(self.zram_bytes)
    }

    /// The share of a set that is in memory.
    #[must_use]
    pub fn resident_share(&self, set: usize) -> f64 {
        let pages = self.sets[set];
        if pages.set.bytes > 0.0 { pages.resident_bytes / pages.set.bytes } else { 1.0 }
    }

    /// The share of the last tick that it spent waiting for pages.
    #[must_use]
    pub fn stalled(&self) -> f64 {
        self.stalled
    }
}

/// Flows are never negative and far below 2^53.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "said above")]
fn bytes(flow: f64) -> u64 {
    flow.max(0.0) as u64
}
