//! Room: what all VMs share besides the arena, and who is told when it gets short. The shrinker sleeps on the
//! [`Bell`]; whoever stores rings it when a mark is passed. Reserves are kept as one number, what their owners may
//! still claim, which changes only when a VM that has a reserve is below it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::accounting::Held;
use super::arena::Arena;
use super::file::Opened;
use super::pool::Pools;
use crate::writeback::{OpenError, Writeback};

/// What the VMs of a host share.
#[derive(Debug)]
pub struct Shared {
    /// The memory of all pools.
    pub arena: Arena,
    /// The compressors.
    pub pools: Pools,
    /// Where the coldest pages go, if there is one.
    pub file: Option<Arc<Writeback>>,
    /// Why there is none, when one is configured or pages are in one. Then entries may name places in it.
    pub missing: Option<OpenError>,
    /// Wakes the shrinker.
    pub bell: Arc<Bell>,
    /// What VMs below their reserves may still claim, in bytes.
    pub(super) unclaimed_bytes: AtomicU64,
    accept_percent: AtomicU32,
    outlook: AtomicU8,
    /// Whether pages of a VM that are the same are to be kept once.
    deduplicates: AtomicBool,
    /// Whether the state directory had no memory left for a store.
    shortage: AtomicBool,
    written_off: WrittenOff,
}

/// What damaged entries stood for: places that stay taken, and that no entry names, until the next start.
#[derive(Debug, Default)]
pub(super) struct WrittenOff {
    /// Objects in the arena.
    pub objects: AtomicU64,
    /// Bytes of their size classes.
    pub charged_bytes: AtomicU64,
    /// Records in the writeback file.
    pub records: AtomicU64,
    /// Objects and records of each VM of which the log was not told, by its name.
    untold: Mutex<BTreeMap<String, (u64, u64)>>,
}

/// Whether a store that finds no room may hope for some, as the shrinker last found it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Outlook {
    /// Pages leave, or would if they had to.
    Open = 0,
    /// The writeback file takes nothing: it is full, failed, or has had its bytes for today.
    FileRefuses = 1,
    /// The pool is full and no VM gives anything up: reserves, or `writeback = false`.
    NobodyGives = 2,
}

impl Shared {
    /// A pool that counts as not full again below `accept_percent` of its maximum.
    #[must_use]
    pub(super) fn new(arena: Arena, pools: Pools, (file, missing): Opened, accept_percent: u32) -> Self {
        Self {
            arena,
            pools,
            file,
            missing,
            bell: Arc::default(),
            unclaimed_bytes: AtomicU64::new(0),
            accept_percent: AtomicU32::new(accept_percent),
            outlook: AtomicU8::new(Outlook::Open as u8),
            deduplicates: AtomicBool::new(true),
            shortage: AtomicBool::new(false),
            written_off: WrittenOff::default(),
        }
    }

    /// The marks of something that may hold `max_bytes`.
    #[must_use]
    pub fn marks(&self, max_bytes: u64) -> Marks {
        Marks::new(max_bytes, self.accept_percent())
    }

    /// The share of a maximum below which something that was full counts as not full again, in percent.
    #[must_use]
    pub fn accept_percent(&self) -> u32 {
        self.accept_percent.load(Ordering::Relaxed)
    }

    /// Changes that.
    pub fn set_accept_percent(&self, percent: u32) {
        self.accept_percent.store(percent, Ordering::Relaxed);
        self.bell.ring();
    }

    /// Whether pages of a VM that are the same are to be kept once, from when they get cold on.
    #[must_use]
    pub fn deduplicates(&self) -> bool {
        self.deduplicates.load(Ordering::Relaxed)
    }

    /// Changes that. Those that share an object go on doing so.
    pub fn set_deduplicates(&self, deduplicates: bool) {
        self.deduplicates.store(deduplicates, Ordering::Relaxed);
    }

    /// What reserves may still claim, in bytes.
    #[must_use]
    pub fn unclaimed_bytes(&self) -> u64 {
        self.unclaimed_bytes.load(Ordering::Relaxed)
    }

    /// Says whether stores may hope for room.
    pub fn set_outlook(&self, outlook: Outlook) {
        self.outlook.store(outlook as u8, Ordering::Relaxed);
    }

    /// Whether stores may hope for room.
    #[must_use]
    pub fn outlook(&self) -> Outlook {
        let outlook = self.outlook.load(Ordering::Relaxed);
        let all = [Outlook::Open, Outlook::FileRefuses, Outlook::NobodyGives];
        all.into_iter().find(|other| *other as u8 == outlook).unwrap_or(Outlook::Open)
    }

    /// Whether a store that found no room may find some soon: at its VM's limit, or in the pool as a whole.
    #[must_use]
    pub fn may_make_room(&self, at_limit: bool) -> bool {
        let open = match self.outlook() {
            Outlook::Open => true,
            Outlook::FileRefuses => false,
            Outlook::NobodyGives => at_limit,
        };
        open && self.file.as_ref().is_some_and(|file| file.is_on())
    }

    /// Takes note that the VM of this name held what was `before` and now holds no more than `held`, because its damaged
    /// entries are gone.
    pub(super) fn write_off(&self, vm: &str, before: &Held, held: &Held) {
        let missing = |of: fn(&Held) -> u64| of(before).saturating_sub(of(held));
        let (objects, records) = (missing(Held::objects), missing(|held| held.file_pages));
        self.written_off.objects.fetch_add(objects, Ordering::Relaxed);
        self.written_off.charged_bytes.fetch_add(missing(|held| held.pool_bytes), Ordering::Relaxed);
        self.written_off.records.fetch_add(records, Ordering::Relaxed);
        let mut untold = self.written_off.untold.lock();
        let of_vm = untold.entry(vm.to_owned()).or_default();
        *of_vm = (of_vm.0 + objects, of_vm.1 + records);
        drop(untold);
        self.bell.ring();
    }

    /// Says once of each VM what was written off. Not where it happens, under the VM's lock.
    pub fn tell_written_off(&self) {
        let untold = std::mem::take(&mut *self.written_off.untold.lock());
        for (vm, (objects, records)) in untold {
            tracing::error!(
                vm,
                objects,
                records,
                "entries of the VM's page table were damaged: their pages are lost, and what they named stays taken until the next start"
            );
        }
    }

    /// What was written off so far.
    pub(super) fn written_off(&self) -> &WrittenOff {
        &self.written_off
    }

    /// The state directory had no memory left for a store.
    pub(super) fn note_shortage(&self) {
        self.shortage.store(true, Ordering::Relaxed);
    }

    /// Whether that happened since the last call.
    #[must_use]
    pub fn take_shortage(&self) -> bool {
        self.shortage.swap(false, Ordering::Relaxed)
    }
}

/// Where shrinking starts and where it stops, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Above this it starts. A little below the maximum, so that the next store seldom has to wait.
    pub start_bytes: u64,
    /// Below this it stops.
    pub stop_bytes: u64,
}

impl Marks {
    /// The marks below `max_bytes`; `accept_percent` is where a pool counts as not full again.
    #[must_use]
    pub fn new(max_bytes: u64, accept_percent: u32) -> Self {
        // In this order nothing overflows; asked at every store, so without a wider type.
        let percent = u64::from(accept_percent.min(100));
        let stop_bytes = max_bytes / 100 * percent + max_bytes % 100 * percent / 100;
        Self { start_bytes: max_bytes - (max_bytes - stop_bytes) / 4, stop_bytes }
    }
}

/// Wakes one thread, at most once for any number of reasons; ringing a bell that rings already costs one read.
#[derive(Debug, Default)]
pub struct Bell {
    rung: AtomicBool,
    asleep: Mutex<()>,
    wake: Condvar,
}

impl Bell {
    /// Wakes the sleeper, or keeps it from falling asleep.
    pub fn ring(&self) {
        if !self.rung.load(Ordering::Relaxed) && !self.rung.swap(true, Ordering::AcqRel) {
            // Under the lock, so that it is not missed between the sleeper's look and its sleep.
            let _asleep = self.asleep.lock();
            self.wake.notify_one();
        }
    }

    /// Sleeps until the bell is rung, or for `at_most`. True when it was rung.
    pub fn wait(&self, at_most: Duration) -> bool {
        let mut asleep = self.asleep.lock();
        if !self.rung.load(Ordering::Acquire) {
            let _ = self.wake.wait_for(&mut asleep, at_most);
        }
        self.rung.swap(false, Ordering::AcqRel)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shrinking_starts_below_the_maximum_and_ends_at_the_threshold() {
        assert_eq!(Marks::new(1000, 90), Marks { start_bytes: 975, stop_bytes: 900 });
        assert_eq!(Marks::new(1000, 100), Marks { start_bytes: 1000, stop_bytes: 1000 });
        assert_eq!(Marks::new(u64::MAX, 50).stop_bytes, u64::MAX / 2);
    }

    #[test]
    fn a_bell_rung_before_the_sleep_is_heard() {
        let bell = Bell::default();
        bell.ring();
        bell.ring();
        assert!(bell.wait(Duration::from_secs(60)));
        assert!(!bell.wait(Duration::ZERO));
    }
}
