//! The writeback file under a guest that overwrites its pages again and again: half-dead segments are cleaned in time,
//! so that a file somewhat larger than what lives in it is enough, for ever.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::sync::Arc;

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::store::vm::Limits;
use ballast::writeback::WritebackState;
use support::file::{load_waiting, neutral_shrinker, open_with_file};
use support::{Random, page_of};

const FILE_BYTES: u64 = 16 << 20;
const LIVE_PERCENT: u64 = 60;
const TIMES_ITS_SIZE: u64 = 3;
/// What a page of about a kilobyte takes there.
const RECORD_BYTES: u64 = 1088;

#[test]
fn a_small_file_is_overwritten_many_times_without_ever_being_full() {
    let dir = tempfile::tempdir().unwrap();
    let pages = u32::try_from((FILE_BYTES - (1 << 20)) * LIVE_PERCENT / 100 / RECORD_BYTES).unwrap();
    let vms = [("a", pages, Limits::NONE)];
    let store = Arc::new(open_with_file(dir.path(), &vms, 1 << 20, FILE_BYTES));
    let mut shrinker = neutral_shrinker(&store);
    let (vm, file) = (store.ready("a").unwrap(), store.shared().file.as_ref().unwrap());
    let mut truth = vec![0; pages as usize];
    let (mut random, mut scratch) = (Random(3), Scratch::default());
    let mut stores = 0;
    while file.status().written_bytes_total < TIMES_ITS_SIZE * FILE_BYTES {
        let slot = if stores < pages { stores } else { random.below(pages) };
        let page = page_of(2, u64::from(stores));
        while let Err(err) = vm.store(Slot(slot), &page, Age::now(), &mut scratch) {
            assert!(vm.may_wait(&err), "{err}: {:?}", file.status());
            let _ = shrinker.turn();
            assert_eq!(file.status().state, WritebackState::On, "{:?}", file.status());
        }
        truth[slot as usize] = stores;
        stores += 1;
    }
    store.validate();
    let (status, stats) = (file.status(), shrinker.stats().get());
    println!("{status:?}");
    assert!(stats.cleaned_segments > 20, "{stats:?}");
    let mut page = ZERO_PAGE;
    for (slot, stamp) in (0..pages).zip(truth) {
        load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, u64::from(stamp)), "{slot}");
    }
}
