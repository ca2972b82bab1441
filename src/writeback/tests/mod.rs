//! The room as a whole, on a file in a temporary directory: what is written is read, whatever fails meanwhile.

mod failing;
mod model;
mod opening;
mod racing;
mod shape;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::file::Target;
use super::io::faulty::Faulty;
use super::io::{BackingFile, IoKind, Op, Request, Threads, Uring};
use super::*;
use crate::ids::{Owner, Slot, VmId};

/// Enough records of a page to fill more than half of a segment.
const MANY: u32 = 150;

fn options(dir: &Path, segments: u64) -> Options {
    Options {
        path: dir.join("file"),
        size_bytes: segments << 20,
        state_path: dir.join("writeback"),
        daily_bytes_max: None,
        lock_wait: Duration::from_secs(60),
    }
}

/// io_uring if `wanted` and allowed. A machine that forbids it is told so aloud, and CI must not be one.
fn start(target: Target, wanted: IoKind) -> std::io::Result<Arc<dyn BackingFile>> {
    if wanted == IoKind::IoUring {
        match Uring::new(target.clone()) {
            Ok(uring) => return Ok(Arc::new(uring)),
            Err(err) => {
                eprintln!("NOT TESTED with io_uring, which this machine refuses: {err}");
                assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI has to test with io_uring");
            }
        }
    }
    Ok(Arc::new(Threads::new(target)?))
}

fn open_empty(dir: &Path, segments: u64) -> (Writeback, Arc<Faulty>) {
    open_faulty(&options(dir, segments), [])
}

fn open_faulty(options: &Options, places: impl IntoIterator<Item = Place>) -> (Writeback, Arc<Faulty>) {
    let mut faulty = None;
    let writeback = Writeback::open_with(options, |target| {
        let file = Arc::new(Faulty::new(start(target, IoKind::Threads)?));
        faulty = Some(Arc::clone(&file));
        Ok(file)
    })
    .unwrap();
    for place in places {
        writeback.adopt(place).unwrap();
    }
    writeback.finish_adoption();
    (writeback, faulty.unwrap())
}

fn owner(slot: u32) -> Owner {
    Owner { vm: VmId(1 + slot % 3), slot: Slot(slot) }
}

fn cipher(owner: Owner) -> Cipher {
    Cipher::new(&[u8::try_from(owner.vm.0).unwrap(); 32])
}

/// What a slot holds: anything, as long as it differs.
fn object(slot: u32, bytes: usize) -> Vec<u8> {
    let mut object = slot.to_le_bytes().repeat(bytes.div_ceil(4));
    object.truncate(bytes);
    object
}

/// Appends an object of `bytes` for each slot.
fn append(
    writeback: &Writeback,
    slots: impl IntoIterator<Item = u32>,
    bytes: usize,
) -> Result<Vec<Place>, WriteError> {
    let pages: Vec<_> =
        slots.into_iter().map(|slot| (owner(slot), cipher(owner(slot)), object(slot, bytes))).collect();
    let outgoing: Vec<_> =
        pages.iter().map(|(owner, cipher, object)| Outgoing { owner: *owner, cipher, object }).collect();
    writeback.append(&outgoing)
}

fn read_pinned(writeback: &Writeback, pins: Vec<Pin>) -> Vec<Result<RecordBytes, ReadError>> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    writeback.read(pins, Box::new(move |results| sender.send(results).unwrap()));
    receiver.recv().unwrap()
}

fn read(writeback: &Writeback, places: &[Place]) -> Vec<Result<RecordBytes, ReadError>> {
    read_pinned(writeback, places.iter().map(|place| writeback.begin_read(*place).unwrap()).collect())
}

/// Every slot reads as what was appended for it.
fn assert_reads(writeback: &Writeback, slots: impl IntoIterator<Item = u32>, places: &[Place]) {
    for (slot, result) in slots.into_iter().zip(read(writeback, places)) {
        let opened = result.unwrap().open(owner(slot), &cipher(owner(slot))).unwrap();
        assert_eq!(opened, object(slot, opened.len()), "slot {slot}");
    }
}

/// Remembers what was written under each write counter, over restarts. A counter may be seen again with the very
/// same record (resubmitted, or moved by cleaning), never with another.
#[derive(Clone, Debug, Default)]
struct Counters(Arc<Mutex<HashMap<[u8; 8], Vec<u8>>>>);

#[derive(Debug)]
struct Spy {
    inner: Arc<dyn BackingFile>,
    counters: Counters,
}

impl BackingFile for Spy {
    fn submit(&self, request: Request) {
        if request.op == Op::Write {
            let bytes = &request.buffer.bytes()[request.range.clone()];
            for (_, place) in find::find(bytes, 1 << 20) {
                let record = bytes[place.start()..place.start() + place.record_bytes()].to_vec();
                let counter: [u8; 8] = record[..8].try_into().unwrap();
                let mut counters = self.counters.0.lock();
                let before = counters.entry(counter).or_insert_with(|| record.clone());
                assert_eq!(*before, record, "a write counter was used twice");
            }
        }
        self.inner.submit(request);
    }

    fn discard(&self, offset: u64, bytes: u64) -> std::io::Result<()> {
        self.inner.discard(offset, bytes)
    }

    fn shorten(&self, bytes: u64) -> std::io::Result<()> {
        self.inner.shorten(bytes)
    }

    fn kind(&self) -> IoKind {
        self.inner.kind()
    }
}

#[test]
fn both_ways_of_io_write_and_read_directly_and_not() {
    let ways = [IoKind::IoUring, IoKind::Threads].map(|kind| [(kind, true), (kind, false)]);
    for (kind, direct) in ways.into_iter().flatten() {
        let dir = tempfile::tempdir().unwrap();
        let start = |target: Target| start(if direct { target } else { target.buffered() }, kind);
        let writeback = Writeback::open_with(&options(dir.path(), 4), start).unwrap();
        writeback.finish_adoption();
        let mut places = append(&writeback, 0..40, 1300).unwrap();
        places.extend(append(&writeback, 40..41, 4110).unwrap());
        places.extend(append(&writeback, 41..500, 2500).unwrap());
        assert_reads(&writeback, 0..500, &places);
        writeback.validate(places.iter().copied());
        let status = writeback.status();
        assert_eq!((status.written_records, status.read_records), (500, 500));
        assert_eq!(status.state, WritebackState::On);
        assert!(status.written_bytes_today > status.segments.live_bytes);
    }
}

#[test]
fn many_reads_at_a_time_are_all_answered() {
    for kind in [IoKind::IoUring, IoKind::Threads] {
        let dir = tempfile::tempdir().unwrap();
        let writeback = Writeback::open_with(&options(dir.path(), 4), |target| start(target, kind)).unwrap();
        writeback.finish_adoption();
        let places = append(&writeback, 0..500, 4110).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        // Far more than a ring holds.
        for (slot, place) in (0u32..).zip(&places) {
            let sender = sender.clone();
            let pins = vec![writeback.begin_read(*place).unwrap()];
            writeback.read(pins, Box::new(move |results| sender.send((slot, results)).unwrap()));
        }
        // The room may be dropped meanwhile: what was submitted ends.
        drop((writeback, sender));
        let answered = receiver.into_iter().map(|(slot, results)| {
            let record = results.into_iter().next().unwrap().unwrap();
            assert_eq!(record.open(owner(slot), &cipher(owner(slot))), Ok(object(slot, 4110)));
        });
        assert_eq!(answered.count(), places.len());
    }
}

#[test]
fn an_empty_batch_is_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 2);
    assert_eq!(writeback.append(&[]), Ok(Vec::new()));
    assert!(read(&writeback, &[]).is_empty());
    writeback.validate([]);
}
