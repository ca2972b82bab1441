use super::*;
use std::collections::{BTreeMap, HashMap};

use crate::store::object::OBJECT_BYTES_MAX;
use proptest::prelude::*;

const REGION_BYTES: u64 = 16 << 20;

fn arena(max_bytes: u64) -> Arena {
    Arena::new(tempfile::tempfile().unwrap(), REGION_BYTES, max_bytes).unwrap()
}

#[test]
fn a_full_arena_refuses_and_recovers() {
    let arena = arena(256 << 10);
    let mut held = Vec::new();
    loop {
        match arena.allocate(1000, arena.max_bytes()) {
            Ok(allocation) => held.push(allocation.offset),
            Err(err) => break assert!(matches!(err, AllocateError::PoolFull)),
        }
    }
    assert!(arena.used_bytes() <= 256 << 10 && held.len() > 200);
    for offset in held {
        arena.free(offset, 1000);
    }
    assert_eq!((arena.used_bytes(), arena.validate()), (0, ArenaCount::default()));
    let allocation = arena.allocate(1000, arena.max_bytes()).unwrap();
    arena.free(allocation.offset, 1000);
}

#[test]
fn an_impossible_or_doubled_place_is_not_adopted() {
    let arena = arena(1 << 20);
    let offset = arena.allocate(1000, arena.max_bytes()).unwrap().offset;
    arena.free(offset, 1000);
    assert_eq!(arena.adopt(offset, 1000), Ok(()));
    assert_eq!(arena.adopt(offset, 1000), Err(AdoptError::Taken { offset }));
    for (offset, object_bytes) in [(offset + 16, 1000), (offset, 2000), (REGION_BYTES * 20, 1000)] {
        assert_eq!(
            arena.adopt(offset, object_bytes),
            Err(AdoptError::Misplaced { offset, object_bytes }),
            "{offset} {object_bytes}"
        );
    }
}

#[test]
fn an_object_that_can_not_be_moved_keeps_no_other_span_from_being_emptied() {
    let arena = arena(1 << 20);
    let mut spans: HashMap<u64, Vec<u64>> = HashMap::new();
    for _ in 0..64 {
        let allocation = arena.allocate(1000, arena.max_bytes()).unwrap();
        arena.write(&allocation, &[7; 1000]);
        spans.entry(allocation.offset / 4096).or_default().push(allocation.offset);
    }
    // One object is left in every span.
    let mut left: Vec<u64> = spans
        .into_values()
        .map(|mut objects| {
            objects
                .pop()
                .inspect(|_| {
                    objects.iter().for_each(|offset| arena.free(*offset, 1000));
                })
                .unwrap()
        })
        .collect();
    let fixed = left[0];
    assert_eq!(arena.gain_bytes(), 12 * 4096);
    let compacted = compact(&arena, usize::MAX, |object| {
        if object.from == fixed {
            return false;
        }
        let found = left.iter_mut().find(|offset| **offset == object.from).unwrap();
        *found = object.to.offset;
        arena.free(object.from, 1000);
        true
    });
    assert_eq!((compacted.refused, compacted.freed_bytes), (1, 12 * 4096));
    assert_eq!((arena.used_bytes(), arena.validate().objects), (4 * 4096, 16));
    assert!(arena.gain_bytes() == 0 && arena.slack_bytes() < 4096);
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(usize),
    Free(prop::sample::Index),
    /// Begins an evacuation, or goes on with it: moves the next object, or refuses to.
    Evacuate {
        refuse: bool,
    },
    EndEvacuation,
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Mostly of few classes, so that their spans fill.
    let size =
        prop_oneof![1 => 17..=OBJECT_BYTES_MAX, 4 => prop::sample::select(vec![100, 1000, 1500, 2700])];
    let step = prop_oneof![
        12 => size.prop_map(Step::Allocate),
        9 => any::<prop::sample::Index>().prop_map(Step::Free),
        8 => prop::bool::weighted(0.1).prop_map(|refuse| Step::Evacuate { refuse }),
        1 => Just(Step::EndEvacuation),
        1 => Just(Step::Restart),
    ];
    prop::collection::vec(step, 1..400)
}

/// What was written at which offset.
#[derive(Default)]
struct Truth {
    objects: BTreeMap<u64, Vec<u8>>,
    stamp: u8,
}

impl Truth {
    fn allocate(&mut self, arena: &Arena, object_bytes: usize) {
        let Ok(allocation) = arena.allocate(object_bytes, arena.max_bytes()) else { return };
        self.stamp = self.stamp.wrapping_add(1);
        let object = vec![self.stamp; object_bytes];
        arena.write(&allocation, &object);
        assert!(self.objects.insert(allocation.offset, object).is_none());
    }

    fn free(&mut self, arena: &Arena, which: prop::sample::Index) {
        if self.objects.is_empty() {
            return;
        }
        let offset = *self.objects.keys().nth(which.index(self.objects.len())).unwrap();
        let object = self.objects.remove(&offset).unwrap();
        arena.free(offset, object.len());
    }

    fn relocate(&mut self, arena: &Arena, object: &Move) {
        let content = self.objects.remove(&object.from).unwrap();
        let stamps = u32::from_le_bytes([content[0]; 4]);
        assert_eq!(object.owner, object::owner_of([stamps; 2]));
        arena.write(&object.to, &content);
        arena.free(object.from, content.len());
        assert!(self.objects.insert(object.to.offset, content).is_none());
    }

    /// The steps between two starts. An evacuation that has not ended is forgotten, as when the daemon is killed.
    fn run(&mut self, arena: &Arena, steps: &[Step]) {
        let mut evacuation: Option<Evacuation<'_>> = None;
        for step in steps {
            match step {
                Step::Allocate(object_bytes) => self.allocate(arena, *object_bytes),
                Step::Free(which) => self.free(arena, *which),
                Step::Evacuate { refuse } => match evacuation.as_mut().map(Evacuation::next_move) {
                    None => evacuation = arena.evacuate(),
                    Some(None) => evacuation = None,
                    Some(Some(object)) if *refuse => arena.discard(object.to),
                    Some(Some(object)) => self.relocate(arena, &object),
                },
                Step::EndEvacuation => {
                    if let Some(evacuation) = evacuation.take() {
                        let used_bytes = arena.used_bytes();
                        assert_eq!(evacuation.end(), used_bytes - arena.used_bytes());
                    }
                }
                Step::Restart => unreachable!("the steps were split there"),
            }
            self.check(arena);
        }
        std::mem::forget(evacuation);
    }

    fn check(&self, arena: &Arena) {
        assert_eq!(arena.validate().objects, self.objects.len() as u64);
        for (offset, object) in &self.objects {
            let mut found = vec![0; object.len()];
            arena.read(*offset, &mut found);
            assert_eq!(&found, object);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn objects_keep_to_themselves_through_evacuations_and_restarts(steps in steps()) {
        let file = tempfile::tempfile().unwrap();
        let open = || Arena::new(file.try_clone().unwrap(), REGION_BYTES, 2 << 20).unwrap();
        let mut truth = Truth::default();
        let mut arena = open();
        for steps in steps.split(|step| matches!(step, Step::Restart)) {
            truth.run(&arena, steps);
            arena = open();
            for (offset, object) in &truth.objects {
                arena.adopt(*offset, object.len()).unwrap();
            }
            arena.finish_adoption().unwrap();
            truth.check(&arena);
        }
        let compacted = compact(&arena, usize::MAX, |object| {
            truth.relocate(&arena, object);
            true
        });
        truth.check(&arena);
        prop_assert_eq!((compacted.refused, arena.gain_bytes()), (0, 0));
        prop_assert!(arena.evacuate().is_none(), "nothing is left to be gained");
    }
}
