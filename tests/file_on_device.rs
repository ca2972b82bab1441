//! A block device as the writeback file: a loop device over a file, which shows what is given back. Making one takes
//! root and a kernel that lets us; where there is neither the test says so, and in CI only that is an excuse.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::store::codec::{Compressor, Scratch};
use ballast::store::lru::Age;
use ballast::store::vm::Limits;
use ballast::store::{Store, VmSpec};
use ballast::writeback::{OpenError, Options, Writeback, WritebackState};
use support::file::{file_options, load_waiting, neutral_shrinker, settle, store_waiting};
use support::mount::Loop;
use support::{page_of, store_config};

const DEVICE_BYTES: u64 = 16 << 20;
const PAGES: u32 = 6000;

fn open(dir: &Path, options: &Options) -> Arc<Store> {
    let spec = VmSpec { name: "a".to_owned(), slots: PAGES, limits: Limits::NONE };
    let config = store_config(&dir.join("state"), Compressor::Lz4, 1 << 20);
    Arc::new(Store::open(config, vec![spec], || Writeback::open(options).map(Some)).unwrap())
}

#[test]
fn a_block_device_is_written_read_and_given_back_like_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    File::create(&backing).unwrap().set_len(DEVICE_BYTES).unwrap();
    let Some(device) = Loop::over(&backing) else { return };
    // Larger than it is: a device has as much as it has.
    let options = Options {
        path: device.path.clone(),
        lock_wait: Duration::ZERO,
        ..file_options(dir.path(), u64::MAX)
    };

    fs::create_dir(dir.path().join("state")).unwrap();
    // Somebody's data at its start, and old data elsewhere.
    let raw = OpenOptions::new().write(true).open(&device.path).unwrap();
    raw.write_all_at(&[0xff; 4096], 65536).unwrap();
    raw.sync_all().unwrap();
    let refused = Writeback::open(&options);
    assert!(matches!(refused, Err(OpenError::NotOurs { .. })), "{refused:?}");
    raw.write_all_at(&[0; 4096], 65536).unwrap();
    raw.write_all_at(&[0xff; 1 << 20], 3 << 20).unwrap();
    raw.sync_all().unwrap();
    drop(raw);

    let mut scratch = Scratch::default();
    let mut page = ZERO_PAGE;
    {
        let store = open(dir.path(), &options);
        let mut shrinker = neutral_shrinker(&store);
        let vm = store.ready("a").unwrap();
        for slot in 0..PAGES {
            store_waiting(&vm, &mut shrinker, slot, &page_of(2, slot.into()), Age::now(), &mut scratch);
        }
        let status = store.shared().file.as_ref().unwrap().status();
        assert_eq!(
            (status.size_bytes, status.state, status.discard_errors),
            (DEVICE_BYTES, WritebackState::On, 0)
        );
        assert!(vm.accounting().held.file_pages > 4000);
        assert!(matches!(Writeback::open(&options), Err(OpenError::Busy { .. })), "it is ours alone");
        store.validate();
    }
    let store = open(dir.path(), &options);
    let vm = store.ready("a").unwrap();
    for slot in 0..PAGES {
        load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, slot.into()), "{slot}");
    }
    // What dies is discarded, and no longer takes room below.
    let before = fs::metadata(&backing).unwrap().blocks();
    (0..PAGES).for_each(|slot| vm.invalidate(Slot(slot)));
    settle(&mut neutral_shrinker(&store));
    assert_eq!(store.shared().file.as_ref().unwrap().status().discard_errors, 0);
    let after = fs::metadata(&backing).unwrap().blocks();
    assert!(after + 4096 < before, "{before} blocks before, {after} after");
    store.validate();
}
