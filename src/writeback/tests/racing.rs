//! Segments under several threads: what a pin promises, while records are written, freed and read at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

/// Slots with a lock each, as entries have, and who pins, frees and writes at once.
#[test]
fn a_pinned_segment_is_never_opened_anew() {
    let segments = Arc::new(Segments::new(4, 4));
    segments.finish_adoption(true);
    // Counts how often each segment was opened; only the writer changes it.
    let lives: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
    let life = |segment: SegmentIndex| lives[segment.index()].load(Ordering::SeqCst);
    let slots: Vec<Mutex<Option<(Place, u64)>>> = (0..8).map(|_| Mutex::new(None)).collect();
    let (reads, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for reader in 0..3 {
            let (slots, reads, over, segments) = (&slots, &reads, &over, &segments);
            scope.spawn(move || {
                for turn in (0..usize::MAX).take_while(|_| !over.load(Ordering::Relaxed)) {
                    let mut slot = slots[(turn * 5 + reader) % slots.len()].lock();
                    let Some((place, born)) = *slot else { continue };
                    let pin = segments.pin(place).unwrap();
                    if turn % 3 == reader {
                        segments.free(slot.take().unwrap().0);
                    }
                    drop(slot);
                    assert_eq!(life(pin.place().segment().unwrap()), born);
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // Threads begin when the machine lets them: it is over when many a record was read and freed.
        let enough = |turn: usize| turn >= 20_000 && reads.load(Ordering::Relaxed) >= 5000;
        for turn in (0usize..).take_while(|turn| !enough(*turn)) {
            let Some(segment) = segments.take(0) else { continue };
            let born = lives[segment.index()].fetch_add(1, Ordering::SeqCst) + 1;
            let place = Place::new(segment, 0, 1000);
            segments.add_live(segment, place.record_bytes());
            if let Some((old, _)) = slots[turn % slots.len()].lock().replace((place, born)) {
                segments.free(old);
            }
            segments.close(segment);
        }
        over.store(true, Ordering::Relaxed);
    });
    segments.validate(slots.iter().filter_map(|slot| slot.lock().map(|(place, _)| place)), true);
}
