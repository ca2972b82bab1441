//! Tables that are made, found again, damaged, and of the version before.

use super::*;

#[test]
fn only_used_chunks_are_backed_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.table");
    let table = Table::create(&path, VmId(5), "web1", 1 << 20).unwrap();
    assert!(table.record(Slot(70_000)).is_none());
    table.back(Slot(70_000)).unwrap();
    table.record(Slot(70_000)).unwrap().entry.store(77, Ordering::Release);
    drop(table);

    let table = Table::open(&path, "web1").unwrap();
    assert_eq!((table.vm(), table.slots()), (VmId(5), 1 << 20));
    assert_eq!(table.record(Slot(70_000)).unwrap().entry.load(Ordering::Acquire), 77);
    assert!(table.record(Slot(0)).is_none());
    let first = u32::try_from(70_000 / CHUNK_SLOTS * CHUNK_SLOTS).unwrap();
    assert_eq!(table.backed_slots().next(), Some(Slot(first)));
    assert_eq!(table.backed_slots().count(), CHUNK_SLOTS);
    let chunks: Vec<_> = table.backed_chunks().collect();
    assert!(chunks.len() == 1 && chunks[0].first == Slot(first) && chunks[0].ages.len() == CHUNK_SLOTS);
    assert_eq!(chunks[0].entries[70_000 % CHUNK_SLOTS].load(Ordering::Acquire), 77);
}

#[test]
fn the_last_chunk_ends_with_the_device() {
    let dir = tempfile::tempdir().unwrap();
    let table = Table::create(&dir.path().join("web1.table"), VmId(5), "web1", 5000).unwrap();
    table.back(Slot(4999)).unwrap();
    let lengths: Vec<_> = table.backed_chunks().map(|chunk| (chunk.first, chunk.entries.len())).collect();
    assert_eq!(lengths, [(Slot(4096), 904)]);
    assert_eq!(table.backed_slots().count(), 904);
}

#[test]
fn a_table_of_the_version_before_becomes_one_of_this() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.table");
    drop(Table::create(&path, VmId(5), "web1", 100).unwrap());
    let current = fs::read(&path).unwrap();
    let old = |copies: &[usize]| {
        let mut bytes = current.clone();
        for at in copies {
            bytes[at + 8] = STATE_VERSION_MIN.to_le_bytes()[0];
            let checksum = crc32c::crc32c(&bytes[*at..at + CHECKSUM_AT]);
            bytes[at + CHECKSUM_AT..at + CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        }
        bytes
    };
    // Both copies, or the one that a killed daemon had not come to.
    for copies in [&[0, COPY_AT][..], &[0], &[COPY_AT]] {
        fs::write(&path, old(copies)).unwrap();
        assert_eq!(Table::open(&path, "web1").unwrap().vm(), VmId(5));
        assert!(fs::read(&path).unwrap() == current);
    }
}

#[test]
fn a_damaged_header_and_a_foreign_table_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web1.table");
    drop(Table::create(&path, VmId(5), "web1", 100).unwrap());
    assert!(matches!(Table::open(&path, "web2"), Err(TableError::Header)));
    let mut bytes = fs::read(&path).unwrap();
    let key = *Table::open(&path, "web1").unwrap().key();
    bytes[16] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let table = Table::open(&path, "web1").unwrap();
    assert_eq!((table.vm(), table.slots(), table.key()), (VmId(5), 100, &key), "there is a copy");
    bytes[COPY_AT + KEY_AT] ^= 1;
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Table::open(&path, "web1"), Err(TableError::Header)));
    bytes[16] ^= 1;
    bytes.pop();
    fs::write(&path, &bytes).unwrap();
    assert!(matches!(Table::open(&path, "web1"), Err(TableError::CutShort { .. })));
    fs::write(&path, b"short").unwrap();
    assert!(matches!(Table::open(&path, "web1"), Err(TableError::Header)));
}
