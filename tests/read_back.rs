//! Pages that come back from the writeback file because their guest was given memory: the hottest first, as many as it has
//! room for, while there is room and nothing else to do; and whatever happens meanwhile, no page is lost or changed.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::reclaim::policy::Policy;
use ballast::reclaim::pressure::Level;
use ballast::reclaim::shrinker::{Options, Shrinker, Step as Turn};
use ballast::store::Store;
use ballast::store::codec::Scratch;
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, VmStore};
use ballast::writeback::io::faulty::{Fault, Faulty};
use proptest::prelude::*;
use rustix::io::Errno;
use support::file::{load_waiting, neutral_shrinker, open_with_faulty_file, place_of, settle, write_back};
use support::page_of;
use support::told::{listen, told};
use support::world::{NAMES, SLOTS, World};

const FILE_BYTES: u64 = 64 << 20;
const PAGES: u32 = 2000;

/// Takes steps until nothing is left to come.
fn come_back(store: &Store, shrinker: &mut Shrinker) {
    for _ in 0..100_000 {
        if shrinker.turn() == Turn::Rest {
            return;
        }
        store.shared().bell.wait(Duration::from_millis(2));
    }
    panic!("it never ends");
}

/// A VM with [`PAGES`] pages in the file, of which the one in the last slot was used last.
struct Guest {
    store: Arc<Store>,
    faulty: Arc<Faulty>,
    vm: Arc<VmStore>,
    shrinker: Shrinker,
    dir: tempfile::TempDir,
}

impl Guest {
    fn new(pool_bytes: u64, limits: Limits) -> Self {
        listen();
        let dir = tempfile::tempdir().unwrap();
        let vms = [("a", 40_000, limits), ("b", 40_000, Limits::NONE)];
        let (store, faulty) = open_with_faulty_file(dir.path(), &vms, pool_bytes, FILE_BYTES);
        let (store, mut scratch) = (Arc::new(store), Scratch::default());
        let vm = store.ready("a").unwrap();
        // Moments of the time since the machine was booted.
        let moment = Age::from_bits(0).until(Age::now()) / 10_000;
        for slots in (0..PAGES).collect::<Vec<_>>().chunks(200) {
            for n in slots {
                let age = Age::stored(moment * (*n + 1));
                vm.store(Slot(*n), &page_of(2, u64::from(*n)), age, &mut scratch).unwrap();
            }
            assert_eq!(write_back(&store, &vm, slots.iter().copied()), slots.len());
        }
        let shrinker = neutral_shrinker(&store);
        Self { store, faulty, vm, shrinker, dir }
    }

    fn given(&mut self, pages: u32) {
        self.shrinker.request_read_back(self.vm.id(), pages.into());
        come_back(&self.store, &mut self.shrinker);
        self.store.validate();
    }

    fn in_pool(&self) -> Vec<u32> {
        (0..PAGES).filter(|slot| place_of(&self.vm, *slot).is_none()).collect()
    }

    fn read_back_pages(&self) -> u64 {
        self.vm.accounting().events.read_back_pages
    }

    /// Every page is what was stored.
    fn check(&self) {
        let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
        for n in 0..PAGES {
            load_waiting(&self.vm, n, &mut page, &mut scratch).unwrap();
            assert!(page == page_of(2, u64::from(n)), "slot {n}");
        }
    }
}

#[test]
fn as_many_as_the_guest_has_room_for_come_back_and_the_hottest_first() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let now = Age::now();
    let ages: Vec<_> = (0..PAGES).map(|slot| guest.vm.age(Slot(slot), now)).collect();
    let reads = guest.faulty.submitted().0;
    guest.given(500);
    assert_eq!(guest.in_pool(), (PAGES - 500..PAGES).collect::<Vec<_>>());
    let reads = guest.faulty.submitted().0 - reads;
    assert!(reads < 100, "neighbours come together: {reads} reads");
    // It is no use of a page, and no load.
    assert!((0..PAGES).all(|slot| guest.vm.age(Slot(slot), now) == ages[slot as usize]));
    let events = guest.vm.accounting().events;
    assert_eq!((events.read_back_pages, events.loads, events.promoted_pages), (500, 0, 0));
    assert_eq!(events.refault_age_seconds.counts.iter().sum::<u64>(), 0);
    let said = told(|| guest.given(u32::MAX));
    assert!(said.contains("there are no more of them"), "{said}");
    assert_eq!((guest.in_pool().len(), guest.read_back_pages()), (PAGES as usize, PAGES.into()));
    guest.check();
}

#[test]
fn what_comes_back_is_the_first_to_leave_again() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let other = guest.store.ready("b").unwrap();
    let mut scratch = Scratch::default();
    for n in 0..PAGES {
        other.store(Slot(n), &page_of(2, u64::from(n)), Age::now(), &mut scratch).unwrap();
    }
    guest.given(500);
    guest.shrinker.request_pressure(Level::Severe);
    settle(&mut guest.shrinker);
    let left = guest.shrinker.stats().get().evicted_pages;
    assert!(left > 100 && u64::from(PAGES - 500) + left == guest.vm.accounting().held.file_pages, "{left}");
    assert_eq!(other.accounting().held.file_pages, 0);
    guest.check();
}

#[test]
fn nobody_leaves_for_what_comes_back() {
    // As much room as half of it takes.
    let mut guest = Guest::new(1536 << 10, Limits::NONE);
    guest.given(u32::MAX);
    let (used, marks) = (guest.store.arena().used_bytes(), guest.store.shared().marks(1536 << 10));
    let came_back = guest.read_back_pages();
    assert!((500..u64::from(PAGES)).contains(&came_back), "{came_back}");
    assert!(used < marks.stop_bytes, "{used} bytes are used");
    assert_eq!(guest.shrinker.stats().get().evicted_pages, 0);

    let limits = Limits { limit_bytes: 1 << 20, ..Limits::NONE };
    let mut guest = Guest::new(1 << 30, limits);
    guest.given(u32::MAX);
    let (held, marks) = (guest.vm.accounting().held, guest.store.shared().marks(1 << 20));
    assert!(held.pool_bytes > marks.stop_bytes / 2 && held.pool_bytes < marks.stop_bytes, "{held:?}");
    assert_eq!(guest.shrinker.stats().get().evicted_pages, 0);
    // What was asked for is over: more room does not bring more of it.
    let came_back = guest.read_back_pages();
    guest.vm.set_limits(Limits::NONE);
    come_back(&guest.store, &mut guest.shrinker);
    assert_eq!(guest.read_back_pages(), came_back);
}

#[test]
fn a_guest_that_is_squeezed_again_or_a_host_that_runs_short_ends_it() {
    let ends: [fn(&Shrinker, &VmStore); 2] = [
        |shrinker, vm| shrinker.request_no_read_back(vm.id()),
        |shrinker, _| shrinker.request_pressure(Level::Severe),
    ];
    for end in ends {
        let mut guest = Guest::new(1 << 30, Limits::NONE);
        guest.vm.store(Slot(PAGES), &page_of(2, 1), Age::now(), &mut Scratch::default()).unwrap();
        guest.faulty.fail_read(0, Fault::Hold);
        guest.shrinker.request_read_back(guest.vm.id(), PAGES.into());
        assert_eq!(guest.shrinker.turn(), Turn::Later, "a batch is on its way");
        end(&guest.shrinker, &guest.vm);
        let _ = guest.shrinker.turn();
        assert_eq!(guest.faulty.release(), 1);
        come_back(&guest.store, &mut guest.shrinker);
        assert_eq!(guest.read_back_pages(), 0);
        guest.store.validate();
        // And not for good.
        guest.given(100);
        assert_eq!(guest.read_back_pages(), 100);
        guest.check();
    }
}

#[test]
fn a_vm_that_is_cleared_while_its_pages_come_back_keeps_none_of_them() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    guest.faulty.fail_read(0, Fault::Hold);
    guest.shrinker.request_read_back(guest.vm.id(), PAGES.into());
    assert_eq!(guest.shrinker.turn(), Turn::Later);
    guest.store.clear("a").unwrap();
    assert_eq!(guest.faulty.release(), 1);
    come_back(&guest.store, &mut guest.shrinker);
    guest.store.validate();
    assert_eq!(guest.store.past_events().read_back_pages, 0);
    assert_eq!(guest.store.ready("a").unwrap().accounting().held.stored_pages, 0);
}

#[test]
fn what_changes_on_its_way_stays_changed_and_loads_do_not_wait_for_it() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
    guest.faulty.fail_read(0, Fault::Hold);
    guest.shrinker.request_read_back(guest.vm.id(), 32);
    assert_eq!(guest.shrinker.turn(), Turn::Later);
    // Those that are on their way are the last 32.
    let [stored, dropped] = [PAGES - 1, PAGES - 2];
    guest.vm.store(Slot(stored), &page_of(1, 77), Age::now(), &mut scratch).unwrap();
    guest.vm.invalidate(Slot(dropped));
    load_waiting(&guest.vm, PAGES - 3, &mut page, &mut scratch).unwrap();
    load_waiting(&guest.vm, 0, &mut page, &mut scratch).unwrap();
    assert_eq!(guest.faulty.release(), 1);
    come_back(&guest.store, &mut guest.shrinker);
    guest.store.validate();
    assert_eq!(guest.read_back_pages(), 30);
    for (slot, right) in [(stored, page_of(1, 77)), (dropped, ZERO_PAGE)] {
        load_waiting(&guest.vm, slot, &mut page, &mut scratch).unwrap();
        assert!(page == right, "slot {slot}");
    }
}

#[test]
fn what_the_guest_loads_itself_counts_and_stays_where_it_is() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let (mut page, mut scratch) = (ZERO_PAGE, Scratch::default());
    // The first batch is on its way when the guest loads what would have come next.
    guest.faulty.fail_read(0, Fault::Hold);
    guest.shrinker.request_read_back(guest.vm.id(), 1000);
    assert_eq!(guest.shrinker.turn(), Turn::Later);
    for slot in 1500..1900 {
        load_waiting(&guest.vm, slot, &mut page, &mut scratch).unwrap();
    }
    guest.faulty.release();
    come_back(&guest.store, &mut guest.shrinker);
    assert_eq!(guest.read_back_pages(), 600);
    assert!((1500..1900).all(|slot| place_of(&guest.vm, slot).is_some()), "its guest has a copy");
}

#[test]
fn what_would_leave_again_at_once_does_not_come_back() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let younger = guest.vm.age(Slot(PAGES - 100), Age::now()).unwrap();
    let options = Options {
        policy: Policy::NEUTRAL,
        idle: Some(younger + Duration::from_secs(60)),
        ..Options::default()
    };
    guest.shrinker = Shrinker::new(Arc::clone(&guest.store), options, || {});
    let idle = |slot: u32, now| guest.vm.age(Slot(slot), now) > options.idle;
    let now = Age::now();
    let expected: Vec<u32> = (0..PAGES).filter(|slot| !idle(*slot, now)).collect();
    let said = told(|| {
        guest.shrinker.request_read_back(guest.vm.id(), PAGES.into());
        for _ in 0..200 {
            let _ = guest.shrinker.turn();
            guest.store.shared().bell.wait(Duration::from_millis(1));
        }
    });
    // There are more of them in the file.
    assert!(said.contains("would leave again at once"), "{said}");
    let in_pool = guest.in_pool();
    assert!(in_pool.len() >= 100 && in_pool.iter().all(|slot| expected.contains(slot)), "{in_pool:?}");
    assert_eq!(guest.shrinker.stats().get().evicted_pages, 0);
}

#[test]
fn a_file_that_does_not_give_them_is_not_asked_again_and_again() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    guest.faulty.damage(0..FILE_BYTES);
    let (before, _) = guest.faulty.submitted();
    let said = told(|| guest.given(u32::MAX));
    assert!(said.contains("the file doesn't give them"), "{said}");
    assert_eq!((guest.read_back_pages(), guest.in_pool().len()), (0, 0));
    let (after, _) = guest.faulty.submitted();
    assert!(after - before < u64::from(2 * PAGES), "{}", after - before);
    guest.faulty.heal();
    guest.check();
}

#[test]
fn damaged_records_are_left_where_they_are_and_all_others_come() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let file = File::options().read(true).write(true).open(guest.dir.path().join("writeback-file")).unwrap();
    // More than a batch of those that would come first.
    let damaged = PAGES - 100..PAGES;
    let places: Vec<_> = damaged.clone().map(|slot| place_of(&guest.vm, slot).unwrap().offset + 30).collect();
    let flip = |at: &u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, *at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], *at).unwrap();
    };
    places.iter().for_each(flip);
    let said = told(|| guest.given(u32::MAX));
    assert!(said.contains("the others are damaged"), "{said}");
    assert_eq!(guest.in_pool(), (0..damaged.start).collect::<Vec<_>>());
    places.iter().for_each(flip);
    guest.check();
}

#[test]
fn nothing_comes_back_from_a_file_that_is_switched_off_and_every_page_is_there() {
    let mut guest = Guest::new(1 << 30, Limits::NONE);
    let page = page_of(2, 1);
    guest.vm.store(Slot(PAGES), &page, Age::now(), &mut Scratch::default()).unwrap();
    // It fails while a batch is on its way.
    guest.faulty.fail_read(0, Fault::Hold);
    guest.shrinker.request_read_back(guest.vm.id(), PAGES.into());
    assert_eq!(guest.shrinker.turn(), Turn::Later);
    guest.faulty.fail_write(0, Fault::Error(Errno::IO));
    guest.shrinker.request_pressure(Level::Severe);
    settle(&mut guest.shrinker);
    let file_is_on = || guest.store.shared().file.as_ref().unwrap().is_on();
    assert!(!file_is_on());
    assert_eq!(guest.faulty.release(), 1);
    come_back(&guest.store, &mut guest.shrinker);
    assert_eq!(guest.read_back_pages(), 0);
    // And no later one begins.
    let (before, _) = guest.faulty.submitted();
    let said = told(|| guest.given(100));
    assert!(said.contains("the file failed"), "{said}");
    assert_eq!((guest.read_back_pages(), guest.faulty.submitted().0), (0, before));
    guest.check();
    let mut read = ZERO_PAGE;
    load_waiting(&guest.vm, PAGES, &mut read, &mut Scratch::default()).unwrap();
    assert!(read == page);
}

#[derive(Clone, Debug)]
enum Step {
    Use(u32),
    Evict,
    Given { vm: usize, pages: u64 },
    Taken(usize),
    Turn(u32),
    Clear(usize),
    Restart,
    FailRead(u64, Fault),
    FailWrite(u64, Fault),
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        1 => Just(Fault::Error(Errno::IO)),
        3 => (0usize..200_000).prop_map(Fault::Short),
        1 => (0usize..40).prop_map(|blocks| Fault::Torn(blocks, Errno::IO)),
        4 => (0u64..3000).prop_map(|us| Fault::Delay(Duration::from_micros(us))),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (1..300u32).prop_map(Step::Use),
        6 => Just(Step::Evict),
        6 => (0..NAMES.len(), 1..2000u64).prop_map(|(vm, pages)| Step::Given { vm, pages }),
        1 => (0..NAMES.len()).prop_map(Step::Taken),
        12 => (1..30u32).prop_map(Step::Turn),
        1 => (0..NAMES.len()).prop_map(Step::Clear),
        1 => Just(Step::Restart),
        3 => (0u64..9, fault()).prop_map(|(later, fault)| Step::FailRead(later, fault)),
        1 => (0u64..3, fault()).prop_map(|(later, fault)| Step::FailWrite(later, fault)),
    ];
    prop::collection::vec(step, 1..50)
}

fn apply(world: &mut World, step: Step) {
    match step {
        Step::Use(uses) => world.use_pages(uses),
        Step::Evict => {
            world.shrinker().request_pressure(Level::Severe);
            settle(world.shrinker());
        }
        Step::Given { vm, pages } => {
            let id = world.vm(vm).id();
            world.shrinker().request_read_back(id, pages);
        }
        Step::Taken(vm) => {
            let id = world.vm(vm).id();
            world.shrinker().request_no_read_back(id);
        }
        Step::Turn(turns) => {
            for _ in 0..turns {
                let _ = world.shrinker().turn();
                world.store().shared().bell.wait(Duration::from_micros(200));
            }
        }
        Step::Clear(vm) => world.clear(vm),
        Step::Restart => world.restart(),
        Step::FailRead(later, fault) => {
            world.failing_reads += 1;
            world.faulty().fail_read(later, fault);
        }
        Step::FailWrite(later, fault) => world.faulty().fail_write(later, fault),
    }
    world.store().validate();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn pages_are_what_was_stored_whatever_happens_while_they_come_back(steps in steps()) {
        // Room for all, should they be there at once.
        listen();
        let mut world = World::new(8 << 20, 16 << 20);
        for slot in 0..SLOTS {
            (0..NAMES.len()).for_each(|vm| world.put(vm, slot, u8::try_from(slot % 5).unwrap()));
        }
        for _ in 0..5 {
            apply(&mut world, Step::Evict);
        }
        prop_assert!(world.file_pages() > 500);
        for step in steps {
            apply(&mut world, step);
        }
        world.faulty().heal();
        world.failing_reads = 0;
        world.check();
        world.restart();
        // Whatever is in the file can come back, but for what counts as loaded since: ages have ticks of 32 ms.
        std::thread::sleep(Duration::from_millis(100));
        for vm in 0..NAMES.len() {
            apply(&mut world, Step::Given { vm, pages: u64::from(SLOTS) });
        }
        let store = Arc::clone(world.store());
        come_back(&store, world.shrinker());
        prop_assert_eq!(world.file_pages(), 0);
        world.store().validate();
        world.check();
    }
}
