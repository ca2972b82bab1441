//! Whose file it is: what is opened, what is waited for, what is refused and left as it is.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::FlockOperation;

use super::*;
use crate::writeback::file::header::{FileId, Found};

fn open(options: &Options) -> Result<Writeback, OpenError> {
    Writeback::open(options).inspect(Writeback::finish_adoption)
}

#[test]
fn records_are_read_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 4);
    let mut places = append(&writeback, 0..400, 4000).unwrap();
    let dead = places.split_off(300);
    drop(writeback);
    let (writeback, _) = open_faulty(&options(dir.path(), 4), places.iter().copied());
    writeback.validate(places.iter().copied());
    assert_reads(&writeback, 0..300, &places);
    // What no entry named is overwritten; nothing else is.
    let more = append(&writeback, 300..450, 4000).unwrap();
    assert_reads(&writeback, 0..300, &places);
    assert_reads(&writeback, 300..450, &more);
    assert!(dead.iter().all(|place| place.segment().is_some()));
}

#[test]
fn a_file_that_is_in_use_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(&options(dir.path(), 2)).unwrap());
    let held = File::open(dir.path().join("file")).unwrap();
    rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();

    let impatient = Options { lock_wait: Duration::ZERO, ..options(dir.path(), 2) };
    assert!(matches!(open(&impatient), Err(OpenError::Busy { .. })));
    let patient = options(dir.path(), 2);
    let waiting = std::thread::spawn(move || open(&patient).map(drop));
    drop(held);
    waiting.join().unwrap().unwrap();
}

#[test]
fn a_file_is_held_until_its_last_read_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 2);
    let place = append(&writeback, [1], 100).unwrap()[0];
    faulty.fail_read(0, io::faulty::Fault::Hold);
    let (sender, receiver) = std::sync::mpsc::channel();
    let pins = vec![writeback.begin_read(place).unwrap()];
    writeback.read(pins, Box::new(move |results| sender.send(results.len()).unwrap()));
    drop(writeback);
    let impatient = Options { lock_wait: Duration::ZERO, ..options(dir.path(), 2) };
    assert!(matches!(open(&impatient), Err(OpenError::Busy { .. })));
    assert_eq!(faulty.release(), 1);
    assert_eq!(receiver.recv(), Ok(1));
    drop(faulty);
    open(&options(dir.path(), 2)).unwrap();
}

#[test]
fn a_state_accepts_no_other_file_than_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let other = tempfile::tempdir().unwrap();
    drop(open(&options(dir.path(), 2)).unwrap());
    drop(open(&options(other.path(), 2)).unwrap());
    let path = dir.path().join("file");
    let good = fs::read(&path).unwrap();

    fs::copy(other.path().join("file"), &path).unwrap();
    let err = open(&options(dir.path(), 2)).unwrap_err();
    assert!(matches!(err, OpenError::WrongFile { found: Found::Header(_), .. }), "{err}");
    assert!(err.to_string().contains("give the right file back, or clear the VMs"), "{err}");

    fs::remove_file(&path).unwrap();
    let err = open(&options(dir.path(), 2)).unwrap_err();
    assert!(matches!(err, OpenError::Unreadable { .. }) && !path.exists(), "{err}");

    for (held, found) in [(&b""[..], Found::Nothing), (b"somebody's letters", Found::Data)] {
        fs::write(&path, held).unwrap();
        let err = open(&options(dir.path(), 2)).unwrap_err();
        assert!(matches!(&err, OpenError::WrongFile { found: other, .. } if *other == found), "{err}");
        assert!(err.is_about_known_file() && !err.refuses_start());
        assert_eq!(fs::read(&path).unwrap(), held);
    }

    fs::write(&path, good).unwrap();
    open(&options(dir.path(), 2)).unwrap();
}

#[test]
fn a_failing_file_is_no_reason_not_to_start_and_a_wrong_path_is() {
    use std::io::ErrorKind::{IsADirectory, NotFound, PermissionDenied};
    let path = || PathBuf::from("file");
    let unknown = |source: std::io::Error| OpenError::Io { done: "opened", path: path(), source };
    let expected = FileId([1; 16]);
    let known =
        |source: std::io::Error| OpenError::Unreadable { done: "opened", path: path(), expected, source };
    let eio = || rustix::io::Errno::IO.into();
    assert!(!unknown(eio()).refuses_start() && !known(eio()).refuses_start());
    for kind in [NotFound, PermissionDenied] {
        assert!(unknown(kind.into()).refuses_start() && !known(kind.into()).refuses_start());
    }
    assert!(unknown(IsADirectory.into()).refuses_start() && known(IsADirectory.into()).refuses_start());
    assert!(OpenError::InUse { path: path() }.refuses_start());
    assert!(!OpenError::Busy { path: path(), expected }.refuses_start());
    assert!(OpenError::NotOurs { path: path(), found: Found::Data }.refuses_start());
}

#[test]
fn somebodys_data_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    // Some file systems keep their marks far behind the start.
    for at in [0, 1, 4096, 65600, (1 << 20) - 1] {
        let file = File::create(&path).unwrap();
        file.write_all_at(b"x", at).unwrap();
        let err = open(&options(dir.path(), 2)).unwrap_err();
        assert!(matches!(err, OpenError::NotOurs { found: Found::Data, .. }), "{at}: {err}");
        assert_eq!(fs::metadata(&path).unwrap().len(), at + 1);
    }
    fs::write(&path, [0; 9000]).unwrap();
    open(&options(dir.path(), 2)).unwrap();
}

#[test]
fn a_file_of_a_lost_state_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 3);
    append(&writeback, 0..10, 4000).unwrap();
    drop(writeback);
    fs::remove_file(dir.path().join("writeback")).unwrap();
    let (writeback, _) = open_empty(dir.path(), 3);
    assert_eq!(writeback.status().segments, SegmentCount { total: 2, free: 2, live_bytes: 0 });
    let places = append(&writeback, 10..20, 4000).unwrap();
    assert_reads(&writeback, 10..20, &places);
}

#[test]
fn a_forgotten_file_is_replaced_and_counters_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let counters = Counters::default();
    let run = || {
        let writeback = Writeback::open_with(&options(dir.path(), 2), |target| {
            let inner = start(target, IoKind::Threads)?;
            Ok(Arc::new(Spy { inner, counters: counters.clone() }))
        })
        .unwrap();
        writeback.finish_adoption();
        append(&writeback, 0..5, 100).unwrap();
    };
    run();
    fs::remove_file(dir.path().join("file")).unwrap();
    assert!(forget_file(&dir.path().join("writeback")).unwrap());
    assert!(!forget_file(&dir.path().join("writeback")).unwrap());
    run();
    assert_eq!(counters.0.lock().len(), 10);
}

#[test]
fn a_file_can_be_configured_larger_and_smaller() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 2);
    let places = append(&writeback, 0..MANY, 4110).unwrap();
    assert_eq!(append(&writeback, 0..MANY, 4110), Err(WriteError::Full));
    drop(writeback);

    let (writeback, _) = open_faulty(&options(dir.path(), 4), places.iter().copied());
    let more = append(&writeback, 200..500, 4110).unwrap();
    assert!(more.iter().any(|place| place.segment() == Some(SegmentIndex(3))));
    drop(writeback);

    let all = || places.iter().chain(&more).copied();
    let (writeback, _) = open_faulty(&options(dir.path(), 2), all());
    assert_eq!(append(&writeback, [1], 100), Err(WriteError::Full));
    assert_reads(&writeback, 200..500, &more);
    for place in all() {
        writeback.free(place);
    }
    writeback.validate([]);
    assert_eq!(writeback.status().segments, SegmentCount { total: 1, free: 1, live_bytes: 0 });
    let places = append(&writeback, [1], 100).unwrap();
    assert_eq!(places[0].segment(), Some(SegmentIndex(1)));
}

#[test]
fn a_file_without_room_for_a_segment_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(open(&options(dir.path(), 1)), Err(OpenError::TooSmall { .. })));
}

#[test]
fn dead_segments_take_no_room_in_the_file_system() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 8);
    for place in append(&writeback, 0..1000, 4000).unwrap() {
        writeback.free(place);
    }
    let before = fs::metadata(dir.path().join("file")).unwrap().blocks();
    append(&writeback, [1], 100).unwrap();
    let after = fs::metadata(dir.path().join("file")).unwrap().blocks();
    if writeback.status().discard_errors > 0 {
        eprintln!("NOT TESTED: this file system can't punch holes");
        return;
    }
    assert!(after < before, "{after} blocks after, {before} before");
}
