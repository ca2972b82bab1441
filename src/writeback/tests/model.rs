//! The room against a map: append, free, read, clean and restart in any order, while the file fails in every way it
//! can. What the map says lives can always be read, and nothing else is counted.

use proptest::prelude::*;
use rustix::io::Errno;
use tempfile::TempDir;

use super::*;
use crate::writeback::io::faulty::Fault;

/// Few, so that they fill up and are written anew.
const SEGMENTS: u64 = 3;

#[derive(Clone, Debug)]
enum Step {
    Append { first: u32, count: u32, bytes: usize },
    Free { first: u32, count: u32 },
    Read { first: u32, count: u32 },
    Clean,
    Restart,
    FailWrite(u64, Fault),
    FailRead(u64, Fault),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        Just(Fault::Error(Errno::IO)),
        Just(Fault::Error(Errno::NOSPC)),
        (0usize..20_000).prop_map(Fault::Short),
        (0usize..40).prop_map(|blocks| Fault::Torn(blocks, Errno::IO)),
        (0usize..40).prop_map(|blocks| Fault::Torn(blocks, Errno::NOSPC)),
        (0u64..2000).prop_map(|us| Fault::Delay(Duration::from_micros(us))),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let range = || (0u32..400, 1u32..120);
    let step = prop_oneof![
        10 => (range(), 17usize..=4110).prop_map(|((first, count), bytes)| Step::Append { first, count, bytes }),
        6 => range().prop_map(|(first, count)| Step::Free { first, count }),
        3 => range().prop_map(|(first, count)| Step::Read { first, count }),
        5 => Just(Step::Clean),
        2 => Just(Step::Restart),
        1 => (0u64..4, fault()).prop_map(|(later, fault)| Step::FailWrite(later, fault)),
        1 => (0u64..4, fault()).prop_map(|(later, fault)| Step::FailRead(later, fault)),
    ];
    prop::collection::vec(step, 1..60)
}

/// The room and what it should hold.
struct Model {
    dir: TempDir,
    kind: IoKind,
    counters: Counters,
    open: Option<(Writeback, Arc<Faulty>)>,
    truth: HashMap<u32, (Place, Vec<u8>)>,
    stamp: u32,
    /// A fault was planned since the file was last known to be well.
    faults: bool,
}

impl Model {
    fn new(kind: IoKind) -> Self {
        let mut model = Self {
            dir: tempfile::tempdir().unwrap(),
            kind,
            counters: Counters::default(),
            open: None,
            truth: HashMap::new(),
            stamp: 0,
            faults: false,
        };
        model.restart();
        model
    }

    fn restart(&mut self) {
        self.open = None;
        self.faults = false;
        let mut faulty = None;
        let writeback = Writeback::open_with(&options(self.dir.path(), SEGMENTS), |target| {
            let file = Arc::new(Faulty::new(start(target, self.kind)?));
            faulty = Some(Arc::clone(&file));
            Ok(Arc::new(Spy { inner: file, counters: self.counters.clone() }))
        })
        .unwrap();
        for (place, _) in self.truth.values() {
            writeback.adopt(*place).unwrap();
        }
        writeback.finish_adoption();
        self.open = Some((writeback, faulty.unwrap()));
    }

    fn writeback(&self) -> &Writeback {
        &self.open.as_ref().unwrap().0
    }

    fn append(&mut self, first: u32, count: u32, bytes: usize) {
        self.stamp += 1;
        let pages: Vec<_> = (first..first + count)
            .map(|slot| (owner(slot), cipher(owner(slot)), object(slot + self.stamp * 1000, bytes)))
            .collect();
        let outgoing: Vec<_> =
            pages.iter().map(|(owner, cipher, object)| Outgoing { owner: *owner, cipher, object }).collect();
        match self.writeback().append(&outgoing) {
            Ok(places) => {
                for (place, (owner, _, object)) in places.into_iter().zip(pages) {
                    if let Some((old, _)) = self.truth.insert(owner.slot.0, (place, object)) {
                        self.writeback().free(old);
                    }
                }
            }
            Err(WriteError::Full) => {}
            Err(err) => assert!(self.faults, "{err}"),
        }
    }

    fn free(&mut self, first: u32, count: u32) {
        for slot in first..first + count {
            if let Some((place, _)) = self.truth.remove(&slot) {
                self.writeback().free(place);
            }
        }
    }

    fn read(&self, slots: impl Iterator<Item = u32>) {
        let slots: Vec<u32> = slots.filter(|slot| self.truth.contains_key(slot)).collect();
        let places: Vec<Place> = slots.iter().map(|slot| self.truth[slot].0).collect();
        for (slot, result) in slots.iter().zip(read(self.writeback(), &places)) {
            match result {
                Ok(record) => {
                    let opened = record.open(owner(*slot), &cipher(owner(*slot)));
                    assert_eq!(opened.as_ref(), Ok(&self.truth[slot].1), "slot {slot}");
                }
                Err(err) => assert!(self.faults, "{err}"),
            }
        }
    }

    fn clean(&mut self) {
        let Some(segment) = self.writeback().half_dead(80) else { return };
        let Ok(mut records) = self.writeback().read_segment(segment) else {
            return assert!(self.faults);
        };
        let live = |record: &RecordRef| {
            let named = self.truth.get(&record.owner.slot.0).is_some_and(|(place, _)| *place == record.place);
            named && record.owner == owner(record.owner.slot.0)
        };
        records.retain(live);
        let found = records.len();
        let lived = self.truth.values().filter(|(place, _)| place.segment() == Some(segment)).count();
        assert_eq!(found, lived, "every live record is found");
        let Ok(places) = self.writeback().append_raw(&records) else { return };
        for (record, place) in records.into_iter().zip(places) {
            let entry = self.truth.get_mut(&record.owner.slot.0).unwrap();
            let old = std::mem::replace(&mut entry.0, place);
            self.writeback().free(old);
        }
    }

    fn fault(&mut self, plan: impl FnOnce(&Faulty)) {
        self.faults = true;
        plan(&self.open.as_ref().unwrap().1);
    }

    fn apply(&mut self, step: Step) {
        match step {
            Step::Append { first, count, bytes } => self.append(first, count, bytes),
            Step::Free { first, count } => self.free(first, count),
            Step::Read { first, count } => self.read(first..first + count),
            Step::Clean => self.clean(),
            Step::Restart => self.restart(),
            Step::FailWrite(later, fault) => self.fault(|faulty| faulty.fail_write(later, fault)),
            Step::FailRead(later, fault) => self.fault(|faulty| faulty.fail_read(later, fault)),
        }
        self.writeback().validate(self.truth.values().map(|(place, _)| *place));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]
    #[test]
    fn what_lives_can_be_read_whatever_happens(steps in steps(), uring: bool) {
        let mut model = Model::new(if uring { IoKind::IoUring } else { IoKind::Threads });
        for step in steps {
            model.apply(step);
        }
        model.open.as_ref().unwrap().1.heal();
        model.faults = false;
        model.read(0..1000);
    }
}
