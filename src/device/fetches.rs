//! How many pages a VM has on their way from the writeback file. They count for as long as the read lasts, not for as
//! long as somebody wants them: a guest that breaks its ring and starts it anew again and again is held to the same
//! bound as one that waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::blk::execute::FETCH_PAGES_MAX;

/// Pages that all rings of a VM may have asked for from the file. Each takes up to 24 KiB until it has come.
const VM_FETCH_PAGES_MAX: usize = 1024;

/// The pages of one VM that are on their way.
#[derive(Debug)]
pub struct Fetches {
    pages: AtomicUsize,
    ring_pages_max: usize,
    pages_max: usize,
}

/// Pages that have been asked for and not come yet. They count until this is dropped, which is when they have.
#[derive(Debug)]
#[must_use = "the pages count until this is dropped"]
pub struct OnTheirWay {
    fetches: Arc<Fetches>,
    pages: usize,
}

impl Fetches {
    /// None yet, for a VM with this many queues.
    #[must_use]
    pub fn new(queues: u16) -> Self {
        let queues = usize::from(queues).max(1);
        let ring_pages_max = VM_FETCH_PAGES_MAX.checked_div(queues).unwrap_or(0).max(FETCH_PAGES_MAX);
        let pages_max = ring_pages_max.saturating_mul(queues).max(VM_FETCH_PAGES_MAX);
        Self { pages: AtomicUsize::new(0), ring_pages_max, pages_max }
    }

    /// What one ring may have on its way: an even share, and no less than what one request asks for.
    #[must_use]
    pub fn ring_pages_max(&self) -> usize {
        self.ring_pages_max
    }

    /// Pages that the VM may still ask for now.
    #[must_use]
    pub fn left(&self) -> usize {
        self.pages_max.saturating_sub(self.pages.load(Ordering::Relaxed))
    }

    /// Counts pages that are about to be asked for; `None` when that is more than may be.
    pub fn take(self: &Arc<Self>, pages: usize) -> Option<OnTheirWay> {
        let within = |taken: usize| taken.checked_add(pages).filter(|taken| *taken <= self.pages_max);
        self.pages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).ok()?;
        Some(OnTheirWay { fetches: Arc::clone(self), pages })
    }
}

impl Drop for OnTheirWay {
    fn drop(&mut self) {
        self.fetches.pages.fetch_sub(self.pages, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_on_its_way_counts_until_it_has_come() {
        let fetches = Arc::new(Fetches::new(4));
        assert_eq!((fetches.ring_pages_max(), fetches.left()), (256, 1024));
        let first = fetches.take(1000).unwrap();
        assert!(fetches.take(25).is_none());
        let second = fetches.take(24).unwrap();
        assert_eq!(fetches.left(), 0);
        drop(first);
        assert_eq!(fetches.left(), 1000);
        drop(second);
        assert_eq!(fetches.left(), 1024);
    }

    #[test]
    fn every_ring_may_ask_for_what_one_request_needs() {
        let fetches = Fetches::new(64);
        assert_eq!((fetches.ring_pages_max(), fetches.left()), (FETCH_PAGES_MAX, 64 * FETCH_PAGES_MAX));
    }
}
