//! What other threads may ask of the shrinker: taken note of at once, and looked at with its next step.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::pressure::Level;
use super::read_back::Order;
use super::recompress::ColdOptions;
use crate::ids::VmId;

/// Orders of which it has taken no note yet: one for each VM there may be.
const ORDERS_MAX: usize = 4096;

/// What may be asked of the shrinker from other threads.
#[derive(Debug, Default)]
pub(super) struct Requests {
    pub(super) pressure: AtomicU32,
    pub(super) recompress: AtomicBool,
    /// One more than the milliseconds after which an unused page is idle; zero for never.
    idle_ms: AtomicU64,
    cold: Mutex<ColdOptions>,
    pub(super) stop: AtomicBool,
    /// Whose pages are to come back from the file, and whose are not, in the order in which that was said.
    read_back: Mutex<Vec<(VmId, Order)>>,
    /// Pages that are still to come back, of each VM of which some are.
    reading_back: Mutex<BTreeMap<VmId, u64>>,
}

impl Requests {
    /// Changes after how long an unused page is idle.
    pub(super) fn set_idle(&self, idle: Option<Duration>) {
        let ms = idle.map_or(0, |idle| u64::try_from(idle.as_millis()).unwrap_or(u64::MAX).saturating_add(1));
        self.idle_ms.store(ms, Ordering::Relaxed);
    }

    /// After how long an unused page is idle.
    pub(super) fn idle(&self) -> Option<Duration> {
        let ms = self.idle_ms.load(Ordering::Relaxed);
        ms.checked_sub(1).map(Duration::from_millis)
    }

    /// Changes when a page is cold, and how much time may be spent on such pages.
    pub(super) fn set_cold(&self, options: ColdOptions) {
        *self.cold.lock() = options;
    }

    /// When a page is cold, and how much time may be spent on such pages.
    pub(super) fn cold(&self) -> ColdOptions {
        *self.cold.lock()
    }

    /// Takes effect at the next step.
    pub(super) fn read_back(&self, vm: VmId, order: Order) {
        let mut orders = self.read_back.lock();
        // Somebody who waits for the disk takes no note, for as long as that takes.
        if orders.len() >= ORDERS_MAX {
            orders.remove(0);
        }
        orders.push((vm, order));
    }

    /// What was said of that since the last call.
    pub(super) fn take_read_back(&self) -> Vec<(VmId, Order)> {
        std::mem::take(&mut *self.read_back.lock())
    }

    /// Says how many pages of which VMs are still to come back.
    pub(super) fn show_reading_back(&self, pages: impl Iterator<Item = (VmId, u64)>) {
        *self.reading_back.lock() = pages.collect();
    }

    /// Pages of a VM that are still to come back.
    pub(super) fn reading_back_pages(&self, vm: VmId) -> u64 {
        self.reading_back.lock().get(&vm).copied().unwrap_or(0)
    }

    /// Takes effect at the next step; of several requests until then the greatest counts.
    pub(super) fn press(&self, level: Level) {
        let percent = match level {
            Level::Moderate => 3,
            Level::Severe => 10,
        };
        self.pressure.fetch_max(percent, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_too_many_orders_the_last_are_kept() {
        let requests = Requests::default();
        let vm = |n| VmId(u32::try_from(n).unwrap());
        (0..ORDERS_MAX + 3).for_each(|n| requests.read_back(vm(n), Order::Taken));
        let taken = requests.take_read_back();
        assert_eq!((taken.len(), taken[0].0), (ORDERS_MAX, vm(3)));
        assert!(requests.take_read_back().is_empty());
    }
}
