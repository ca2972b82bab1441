//! The file's shape: what is dead is given back, a file that was configured smaller becomes so, and segments are chosen
//! for cleaning when there is something to gain and it may be written.

use std::fs;
use std::os::unix::fs::MetadataExt;

use rustix::io::Errno;

use super::*;

fn blocks(dir: &Path) -> u64 {
    fs::metadata(dir.join("file")).unwrap().blocks()
}

/// Moves what lives in `segment`, as the shrinker does.
fn empty(writeback: &Writeback, segment: SegmentIndex, live: &mut [(u32, Place)]) {
    let mut records = writeback.read_segment(segment).unwrap();
    records.retain(|record| live.iter().any(|(_, place)| *place == record.place));
    let places = writeback.append_raw(&records).unwrap();
    for (record, to) in records.iter().zip(places) {
        let (_, place) = live.iter_mut().find(|(_, place)| *place == record.place).unwrap();
        writeback.free(std::mem::replace(place, to));
    }
}

fn assert_all_read(writeback: &Writeback, live: &[(u32, Place)]) {
    let (slots, places): (Vec<u32>, Vec<Place>) = live.iter().copied().unzip();
    assert_reads(writeback, slots, &places);
    writeback.validate(places);
}

#[test]
fn a_segment_that_could_not_be_given_back_is_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 8);
    for place in append(&writeback, 0..1000, 4000).unwrap() {
        writeback.free(place);
    }
    let before = blocks(dir.path());
    faulty.fail_discards(&[Errno::IO]);
    writeback.give_back();
    assert_eq!((writeback.status().discard_errors, blocks(dir.path())), (1, before));
    writeback.validate([]);
    writeback.give_back();
    assert_eq!(writeback.status().discard_errors, 1);
    assert!(blocks(dir.path()) < before);
    writeback.validate([]);
}

#[test]
fn a_file_system_that_takes_nothing_back_is_asked_once() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 8);
    for place in append(&writeback, 0..1000, 4000).unwrap() {
        writeback.free(place);
    }
    let before = blocks(dir.path());
    faulty.fail_discards(&[Errno::OPNOTSUPP]);
    for _ in 0..3 {
        assert!(!writeback.give_back());
    }
    assert_eq!((writeback.status().discard_errors, blocks(dir.path())), (1, before));
    append(&writeback, 0..1000, 4000).unwrap();
}

#[test]
fn a_file_that_was_configured_smaller_becomes_so_whenever_it_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (file, state) = (dir.path().join("file"), dir.path().join("writeback"));
    let (writeback, _) = open_empty(dir.path(), 8);
    let mut live: Vec<(u32, Place)> = (0..).zip(append(&writeback, 0..1500, 4110).unwrap()).collect();
    for (_, place) in live.extract_if(.., |(slot, _)| *slot % 4 > 0) {
        writeback.free(place);
    }
    drop(writeback);
    let places = |live: &[(u32, Place)]| live.iter().map(|(_, place)| *place).collect::<Vec<_>>();
    let (writeback, _) = open_faulty(&options(dir.path(), 4), places(&live));
    assert!(writeback.is_oversized() && !writeback.give_back());
    // There is no room within the size before something is cleaned there.
    assert_eq!(writeback.beyond_size(), None);
    assert_eq!(append(&writeback, 0..10, 4110), Err(WriteError::Full), "what is new goes nowhere else");
    while let Some(segment) = writeback.beyond_size().or_else(|| writeback.emptiest()) {
        assert_eq!(fs::metadata(&file).unwrap().len(), 8 << 20, "something lives there");
        empty(&writeback, segment, &mut live);
        writeback.give_back();
        if !writeback.is_oversized() {
            break;
        }
    }
    assert!(!writeback.is_oversized());
    let longer = fs::read(&state).unwrap();
    writeback.give_back();
    assert_eq!(fs::metadata(&file).unwrap().len(), 4 << 20);
    assert_all_read(&writeback, &live);
    drop(writeback);
    let shorter = fs::read(&state).unwrap();
    // The file was shortened, and the state has not been told.
    for known in [longer, shorter] {
        fs::write(&state, known).unwrap();
        let (writeback, _) = open_faulty(&options(dir.path(), 4), places(&live));
        assert_all_read(&writeback, &live);
        writeback.give_back();
        assert_eq!(fs::metadata(&file).unwrap().len(), 4 << 20);
    }
    let (writeback, _) = open_faulty(&options(dir.path(), 9), places(&live));
    assert_eq!(fs::metadata(&file).unwrap().len(), 9 << 20);
    live.extend((2000..).zip(append(&writeback, 2000..2900, 4110).unwrap()));
    assert_all_read(&writeback, &live);
}

#[test]
fn a_full_file_is_cleaned_until_there_is_nothing_to_gain() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 8);
    let mut live: Vec<(u32, Place)> = Vec::new();
    for first in (0..).step_by(120) {
        let Ok(places) = append(&writeback, first..first + 120, 4110) else { break };
        live.extend((first..).zip(places));
    }
    assert_eq!(writeback.emptiest(), None, "all of it lives");
    // An eighth of each: no segment is half dead, nor as dead as is asked of one when hardly any is free.
    for (_, place) in live.extract_if(.., |(slot, _)| *slot % 10 == 0) {
        writeback.free(place);
    }
    assert_eq!((writeback.half_dead(100), append(&writeback, 0..120, 4110)), (None, Err(WriteError::Full)));
    let mut cleaned = 0;
    let more = loop {
        let segment = writeback.emptiest().expect("there is something to gain");
        empty(&writeback, segment, &mut live);
        cleaned += 1;
        if let Ok(places) = append(&writeback, 5000..5120, 4110) {
            break places;
        }
    };
    live.extend((5000..).zip(more));
    while let Some(segment) = writeback.emptiest() {
        empty(&writeback, segment, &mut live);
        cleaned += 1;
        assert!(cleaned < 30, "it comes to an end");
    }
    assert_all_read(&writeback, &live);
}

#[test]
fn no_segment_is_chosen_whose_records_may_not_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 8);
    let mut places = append(&writeback, 0..1000, 4110).unwrap();
    places.extract_if(.., |place| place.start() > 100_000).for_each(|place| writeback.free(place));
    let chosen = || [writeback.half_dead(100).is_some(), writeback.emptiest().is_some()];
    assert_eq!(chosen(), [true; 2]);
    let status = writeback.status();
    writeback.set_daily_bytes_max(Some(status.written_bytes_today + (64 << 10)));
    assert_eq!(chosen(), [false; 2], "the day's bytes are used up");
    writeback.set_daily_bytes_max(None);
    assert_eq!(chosen(), [true; 2]);
    faulty.fail_write(0, io::faulty::Fault::Error(Errno::NOSPC));
    assert_eq!(append(&writeback, 0..10, 4110), Err(WriteError::NoSpace));
    assert_eq!(chosen(), [false; 2], "the file system has no room");
    append(&writeback, 0..10, 4110).unwrap();
    assert_eq!(chosen(), [true; 2]);
    faulty.fail_write(0, io::faulty::Fault::Error(Errno::IO));
    assert!(append(&writeback, 0..10, 4110).is_err());
    assert_eq!(chosen(), [false; 2], "nothing is written any more");
}
