//! The shrinker's thread, as others see it: what may be asked of it, what it has done, and its end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use super::pressure::Level;
use super::read_back::Order;
use super::recompress::ColdOptions;
use super::requests::Requests;
use super::stats::ShrinkerStats;
use crate::ids::VmId;
use crate::store::Store;

/// The running shrinker. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Handle {
    store: Arc<Store>,
    stats: Arc<ShrinkerStats>,
    requests: Arc<Requests>,
    thread: Option<JoinHandle<()>>,
}

impl Handle {
    /// The handle of a shrinker that runs on this thread.
    pub(super) fn new(
        store: Arc<Store>,
        stats: Arc<ShrinkerStats>,
        requests: Arc<Requests>,
        thread: JoinHandle<()>,
    ) -> Self {
        Self { store, stats, requests, thread: Some(thread) }
    }

    /// The host runs short of memory: some of the pool has to leave.
    pub fn press(&self, level: Level) {
        self.requests.press(level);
        self.store.shared().bell.ring();
    }

    /// Changes after how long an unused page is idle, and leaves while the disk is idle too.
    pub fn set_idle(&self, idle: Option<Duration>) {
        self.requests.set_idle(idle);
        self.store.shared().bell.ring();
    }

    /// A VM's guest was given room for so many pages more: as many come back from the writeback file, in the background.
    pub fn read_back(&self, vm: VmId, pages: u64) {
        self.requests.read_back(vm, Order::Given(pages));
        self.store.shared().bell.ring();
    }

    /// A VM's guest gives memory up again: no more of its pages come back but those that it loads.
    pub fn stop_reading_back(&self, vm: VmId) {
        self.requests.read_back(vm, Order::Taken);
        self.store.shared().bell.ring();
    }

    /// Pages of a VM that are still to come back.
    #[must_use]
    pub fn reading_back_pages(&self, vm: VmId) -> u64 {
        self.requests.reading_back_pages(vm)
    }

    /// Changes when a page is cold, and how much time may be spent on such pages.
    pub fn set_cold(&self, options: ColdOptions) {
        self.requests.set_cold(options);
        self.store.shared().bell.ring();
    }

    /// Moves idle pages to the current pool, in the background.
    pub fn recompress(&self) {
        self.requests.recompress.store(true, Ordering::Relaxed);
        self.store.shared().bell.ring();
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> &ShrinkerStats {
        &self.stats
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.requests.stop.store(true, Ordering::Release);
        self.store.shared().bell.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
