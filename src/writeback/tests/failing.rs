//! What fails: the file, the room in it, the day's bytes. Nothing that was written is lost by it.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::*;
use crate::writeback::io::faulty::Fault;

#[test]
fn a_failed_write_switches_writeback_off_and_reads_go_on() {
    for fault in [Fault::Error(Errno::IO), Fault::Torn(3, Errno::IO), Fault::Short(100)] {
        let dir = tempfile::tempdir().unwrap();
        let (writeback, faulty) = open_empty(dir.path(), 4);
        let places = append(&writeback, 0..20, 3000).unwrap();
        faulty.fail_write(0, fault);
        let failed = append(&writeback, 20..40, 3000);
        assert!(matches!(failed, Err(WriteError::Failed { .. })), "{fault:?}: {failed:?}");
        assert_eq!(append(&writeback, 40..41, 3000), failed, "it stays off");
        writeback.validate(places.iter().copied());
        assert_reads(&writeback, 0..20, &places);
        let status = writeback.status();
        assert!(matches!(status.state, WritebackState::Off { .. }));
        assert_eq!((status.write_errors, status.written_records), (1, 20));
        drop((writeback, faulty));
        // The next start tries again, over whatever the failed write left.
        let (writeback, _) = open_faulty(&options(dir.path(), 4), places.iter().copied());
        let more = append(&writeback, 40..60, 3000).unwrap();
        assert_reads(&writeback, 0..20, &places);
        assert_reads(&writeback, 40..60, &more);
    }
}

#[test]
fn no_room_in_the_file_system_passes() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    // Records in two segments, the second of which can't be written.
    faulty.fail_write(1, Fault::Error(Errno::NOSPC));
    assert_eq!(append(&writeback, 0..300, 4110), Err(WriteError::NoSpace));
    assert_eq!(writeback.status().state, WritebackState::NoSpace);
    writeback.validate([]);
    let places = append(&writeback, 0..300, 4110).unwrap();
    assert_reads(&writeback, 0..300, &places);
    let status = writeback.status();
    assert_eq!((status.state, status.no_space_errors), (WritebackState::On, 1));
}

#[test]
fn a_kernel_that_is_short_of_memory_says_nothing_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    for (n, errno) in (0..).zip([Errno::NOMEM, Errno::AGAIN, Errno::INTR]) {
        faulty.fail_write(n, Fault::Error(errno));
    }
    let places = append(&writeback, 0..20, 3000).unwrap();
    assert_eq!(faulty.submitted(), (0, 4));
    assert_reads(&writeback, 0..20, &places);
    let status = writeback.status();
    assert_eq!((status.state, status.write_errors, status.written_records), (WritebackState::On, 0, 20));
}

#[test]
fn a_write_that_does_not_end_shows() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    faulty.fail_write(0, Fault::Hold);
    let writeback = Arc::new(writeback);
    let writing = std::thread::spawn({
        let writeback = Arc::clone(&writeback);
        move || append(&writeback, 0..20, 3000)
    });
    while writeback.status().state == WritebackState::On {
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(matches!(writeback.status().state, WritebackState::Slow { for_seconds: 2.. }));
    while faulty.release() == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    let places = writing.join().unwrap().unwrap();
    assert_eq!(writeback.status().state, WritebackState::On);
    assert_reads(&writeback, 0..20, &places);
}

#[test]
fn short_transfers_are_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    faulty.fail_write(0, Fault::Short(5000));
    faulty.fail_write(1, Fault::Short(4096));
    let places = append(&writeback, 0..20, 3000).unwrap();
    assert_eq!(faulty.submitted(), (0, 3));
    faulty.fail_read(0, Fault::Short(9000));
    assert_reads(&writeback, 0..20, &places);
    assert_eq!(faulty.submitted(), (2, 3));
}

#[test]
fn a_read_that_fails_once_is_made_up_for() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    let places = append(&writeback, 0..200, 4000).unwrap();
    faulty.fail_read(1, Fault::Error(Errno::IO));
    assert_reads(&writeback, 0..200, &places);
    let status = writeback.status();
    assert_eq!((status.read_errors, status.read_records, status.state), (1, 200, WritebackState::On));
}

#[test]
fn a_bad_block_fails_the_records_in_it_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 4);
    let places = append(&writeback, 0..200, 4000).unwrap();
    let block = places[100].offset / 4096 * 4096;
    faulty.damage(block..block + 1);
    for (place, result) in places.iter().zip(read(&writeback, &places)) {
        let end = place.offset + place.record_bytes() as u64;
        let touched = place.offset < block + 4096 && block < end;
        assert_eq!(result.is_err(), touched, "{place:?}, bad {block:#x}");
    }
    faulty.heal();
    assert_reads(&writeback, 0..200, &places);
}

#[test]
fn a_segment_is_not_written_while_it_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, faulty) = open_empty(dir.path(), 3);
    let mut places = append(&writeback, 0..500, 4110).unwrap();
    assert_eq!(append(&writeback, 0..10, 4110), Err(WriteError::Full));
    // The read is on its way when its record and all others of the segment are freed.
    faulty.fail_read(0, Fault::Hold);
    let (sender, receiver) = std::sync::mpsc::channel();
    let pins = vec![writeback.begin_read(places[7]).unwrap()];
    writeback.read(pins, Box::new(move |results| sender.send(results).unwrap()));
    let first: Vec<Place> = places.extract_if(.., |place| place.segment() == Some(SegmentIndex(1))).collect();
    for place in &first {
        writeback.free(*place);
    }
    assert_eq!(append(&writeback, 500..510, 4110), Err(WriteError::Full), "its segment is being read");
    assert_eq!(faulty.release(), 1);
    let record = receiver.recv().unwrap().pop().unwrap().unwrap();
    assert_eq!(record.open(owner(7), &cipher(owner(7))), Ok(object(7, 4110)));
    let new = append(&writeback, 500..510, 4110).unwrap();
    assert_eq!(new[9].segment(), Some(SegmentIndex(1)));
    writeback.validate(places.iter().chain(&new).copied());
}

#[test]
fn a_damaged_record_is_noticed_and_does_not_stop_cleaning() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 3);
    let places = append(&writeback, 0..MANY, 4110).unwrap();
    append(&writeback, 200..320, 4110).unwrap().into_iter().for_each(|place| writeback.free(place));
    let live = &places[..2];
    places[2..].iter().for_each(|place| writeback.free(*place));
    let file = OpenOptions::new().read(true).write(true).open(dir.path().join("file")).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, live[0].offset + 1000).unwrap();
    file.write_all_at(&[byte[0] ^ 1], live[0].offset + 1000).unwrap();

    let read = read(&writeback, &live[..1]).pop().unwrap().unwrap();
    assert_eq!(read.open(owner(0), &cipher(owner(0))), Err(BadRecord::Checksum));
    let segment = writeback.half_dead(100).unwrap();
    let records = writeback.read_segment(segment).unwrap();
    assert!(records.iter().all(|record| record.place != live[0]));
    let second: Vec<_> = records.into_iter().filter(|record| record.place == live[1]).collect();
    let moved = writeback.append_raw(&second).unwrap();
    writeback.free(live[1]);
    drop(second);
    assert_reads(&writeback, [1], &moved);
    assert_eq!(writeback.half_dead(100), Some(segment), "it has lost a record since it was read");
    writeback.read_segment(segment).unwrap();
    assert_eq!(writeback.half_dead(100), None, "what is left can't be moved");
    writeback.validate([live[0], moved[0]]);
}

#[test]
fn a_full_file_can_still_be_cleaned() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 6);
    let mut live: Vec<(u32, Place)> = Vec::new();
    for first in (0..).step_by(50) {
        let Ok(places) = append(&writeback, first..first + 50, 4110) else { break };
        live.extend((first..).zip(places));
    }
    assert_eq!(writeback.status().state, WritebackState::Full);
    for (_, place) in live.extract_if(.., |(slot, _)| *slot % 5 > 1) {
        writeback.free(place);
    }
    let segment = writeback.half_dead(100).unwrap();
    let mut records = writeback.read_segment(segment).unwrap();
    let named = |record: &RecordRef| live.iter().position(|(_, place)| *place == record.place);
    records.retain(|record| named(record).is_some());
    let moved = writeback.append_raw(&records).unwrap();
    for (record, place) in records.into_iter().zip(moved) {
        let at = live.iter().position(|(_, old)| *old == record.place).unwrap();
        writeback.free(std::mem::replace(&mut live[at].1, place));
    }
    let more = append(&writeback, 10_000..10_050, 4110).unwrap();
    live.extend((10_000..).zip(more));
    let (slots, places): (Vec<u32>, Vec<Place>) = live.into_iter().unzip();
    assert_reads(&writeback, slots, &places);
    writeback.validate(places);
}

#[test]
fn records_that_are_being_moved_keep_their_segment() {
    let dir = tempfile::tempdir().unwrap();
    let (writeback, _) = open_empty(dir.path(), 3);
    let places = append(&writeback, 0..250, 4110).unwrap();
    let full = append(&writeback, 250..490, 4110).unwrap();
    let segment = SegmentIndex(1);
    let (first, second): (Vec<Place>, Vec<Place>) =
        places.into_iter().chain(full).partition(|place| place.segment() == Some(segment));
    let records = writeback.read_segment(segment).unwrap();
    assert_eq!(records.len(), first.len());
    first.iter().for_each(|place| writeback.free(*place));
    assert_eq!(append(&writeback, 500..600, 4110), Err(WriteError::Full));
    drop(records);
    let new = append(&writeback, 500..600, 4110).unwrap();
    writeback.validate(second.into_iter().chain(new));
}

#[test]
fn the_days_bytes_are_not_exceeded_and_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let limited = Options { daily_bytes_max: Some(40 << 10), ..options(dir.path(), 4) };
    let owner = owner(1);
    let (cipher, object) = (cipher(owner), object(1, 4000));
    let batch = [Outgoing { owner, cipher: &cipher, object: &object }; 4];
    let (writeback, _) = open_faulty(&limited, []);
    let mut places = Vec::new();
    for _ in 0..2 {
        places.extend(writeback.append_on(9, &batch).unwrap());
    }
    // Two batches of 16 KiB fit into 40 KiB, a third does not.
    assert_eq!(writeback.append_on(9, &batch), Err(WriteError::Budget));
    assert_eq!(writeback.status().state, WritebackState::Budget);
    drop(writeback);
    let (writeback, _) = open_faulty(&limited, places.iter().copied());
    assert_eq!(writeback.append_on(9, &batch), Err(WriteError::Budget));
    places.extend(writeback.append_on(10, &batch).unwrap());
    writeback.set_daily_bytes_max(None);
    places.extend(writeback.append_on(10, &[batch[0]; 20]).unwrap());
    writeback.validate(places);
}
