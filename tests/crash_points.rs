//! A short history of a store, played again and again by a process of its own that dies at the first, the second, the
//! third … of all points at which what outlives it changes (`ballast::crash_point`), until it gets to the end. After some
//! of these deaths its successors die at every point of their start. In the end every page is what it was before the step
//! at hand or is after it, all counts agree, and the store works on.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ballast::crash_point::CRASH_AFTER;
use ballast::ids::{Owner, Slot};
use ballast::page::{Page, ZERO_PAGE};
use ballast::store::Store;
use ballast::store::arena::compact;
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::lru::Age;
use ballast::store::vm::{Limits, Recompressed};
use ballast::writeback::Outgoing;
use support::file::{load_waiting, open_with_file};
use support::{page_of, records};

/// Says to the process that plays the history where to do so.
const HISTORY_DIR: &str = "BALLAST_HISTORY_DIR";
/// Says to it to do the first step alone, on what others have left.
const ONLY_START: &str = "BALLAST_HISTORY_ONLY_START";
/// After one death of so many the successors die, too: a prime, so that it meets all kinds.
const DYING_STARTS_EVERY: u64 = 13;
const POOL_BYTES: u64 = 8 << 20;
/// Processes at a time.
const PLAYERS: usize = 2;
/// Slots of VM a's disk, before and after it is made larger.
const SLOTS: [u32; 2] = [64, 96];
const NAMES: [&str; 2] = ["a", "b"];

#[derive(Clone, Debug)]
enum Step {
    /// A new daemon, in whose configuration a has so many slots.
    Open { slots: u32, file_mib: u64 },
    /// Stores a page of this kind in each slot of a VM.
    Store(usize, Range<u32>, u8),
    /// Stores pages of this kind, every twelfth the same.
    StoreAgain(usize, Range<u32>, u8),
    /// Loads pages, which brings those back from the file that were loaded before.
    Load(usize, Range<u32>),
    /// Drops every so-many-th page.
    Discard(usize, Range<u32>, usize),
    /// Moves pages to the file.
    Evict(usize, Range<u32>),
    /// Moves what lives in half-dead segments of the file elsewhere.
    Clean,
    /// Empties sparse spans; of shared objects, too, if that is said.
    Compact { shared: bool },
    /// Compresses a VM's pages anew.
    Recompress(usize),
    /// Gives a VM a dictionary, its first or another, and compresses its pages with that.
    Learn(usize, u16),
    /// Makes a VM's pages cold: those that are the same as another, so many, are kept as that.
    Cool(usize, usize),
    /// Drops a VM's pages.
    Clear(usize),
}

fn history() -> Vec<Step> {
    use Step::{
        Clean, Clear, Compact, Cool, Discard, Evict, Learn, Load, Open, Recompress, Store, StoreAgain,
    };
    let open = |slots, file_mib| Open { slots, file_mib };
    vec![
        open(SLOTS[0], 4),
        Store(0, 0..3, 2),
        Store(1, 0..2, 0),
        Store(0, 3..60, 2),
        Store(0, 60..62, 4),
        // Overwritten by what is larger, smaller, and same-filled.
        Store(0, 0..2, 3),
        Store(0, 0..1, 1),
        Store(0, 1..2, 0),
        Discard(0, 3..60, 2),
        Compact { shared: false },
        Evict(0, 0..20),
        Store(1, 2..5, 3),
        open(SLOTS[0], 4),
        Evict(1, 0..5),
        Discard(0, 10..12, 1),
        Store(0, 12..14, 2),
        Clean,
        Load(0, 0..40),
        Load(0, 0..40),
        Recompress(0),
        Recompress(1),
        Store(0, 20..24, RECORDS),
        Learn(0, 1),
        Evict(0, 22..23),
        Evict(0, 0..6),
        // Another dictionary, while pages in the arena and in the file are of the first.
        Store(0, 6..10, RECORDS),
        Learn(0, 2),
        Evict(0, 8..9),
        StoreAgain(0, 24..48, 3),
        Cool(0, 12),
        // A third page joins two that share.
        StoreAgain(0, 48..50, 3),
        Cool(0, 2),
        // Of three one is left, of three others two, of two one.
        Discard(0, 24..36, 1),
        Discard(0, 37..45, 1),
        Discard(0, 46..48, 1),
        Compact { shared: true },
        Store(0, 36..37, 2),
        Evict(0, 48..49),
        open(SLOTS[0], 6),
        Discard(0, 45..50, 1),
        Clear(1),
        Store(1, 0..2, 2),
        // It is out of service with another size, until it is cleared.
        open(SLOTS[1], 6),
        Clear(0),
        Store(0, 90..92, 2),
        Evict(0, 90..91),
        open(SLOTS[1], 6),
    ]
}

/// The kind and seed of each page that is there, by VM and slot.
type Truth = HashMap<(usize, u32), (u8, u64)>;

/// What a step makes of the pages; `at` is its number.
fn follow(truth: &mut Truth, at: usize, step: &Step) {
    match step {
        Step::Store(vm, slots, kind) => {
            truth.extend(slots.clone().map(|slot| ((*vm, slot), (*kind, seed(at, slot)))));
        }
        Step::StoreAgain(vm, slots, kind) => {
            truth.extend(slots.clone().map(|slot| ((*vm, slot), (*kind, seed_again(slot)))));
        }
        Step::Discard(vm, slots, every) => {
            for slot in slots.clone().step_by(*every) {
                truth.remove(&(*vm, slot));
            }
        }
        Step::Clear(vm) => truth.retain(|(other, _), _| other != vm),
        _ => {}
    }
}

/// A kind of page that a dictionary is good for.
const RECORDS: u8 = 9;

fn page_of_kind(kind: u8, seed: u64) -> Page {
    if kind == RECORDS { records(seed) } else { page_of(kind, seed) }
}

fn seed(at: usize, slot: u32) -> u64 {
    1 + at as u64 * 1000 + u64::from(slot)
}

fn seed_again(slot: u32) -> u64 {
    1_000_000 + u64::from(slot % 12)
}

/// The process that plays the history.
struct Player<'dir> {
    dir: &'dir Path,
    store: Option<Arc<Store>>,
    scratch: Scratch,
}

impl Player<'_> {
    fn play(&mut self, at: usize, step: &Step) {
        if let Step::Open { slots, file_mib } = step {
            self.store = None;
            self.store = Some(open(self.dir, *slots, *file_mib));
            return;
        }
        let store = Arc::clone(self.store.as_ref().unwrap());
        let vm = |vm: &usize| store.ready(NAMES[*vm]).unwrap();
        let scratch = &mut self.scratch;
        match step {
            Step::Open { .. } => {}
            Step::Store(of, slots, kind) => slots.clone().for_each(|slot| {
                vm(of).store(Slot(slot), &page_of_kind(*kind, seed(at, slot)), Age::now(), scratch).unwrap();
            }),
            Step::StoreAgain(of, slots, kind) => slots.clone().for_each(|slot| {
                vm(of)
                    .store(Slot(slot), &page_of_kind(*kind, seed_again(slot)), Age::now(), scratch)
                    .unwrap();
            }),
            Step::Load(of, slots) => slots.clone().for_each(|slot| {
                load_waiting(&vm(of), slot, &mut ZERO_PAGE.clone(), scratch).unwrap();
            }),
            Step::Discard(of, slots, every) => {
                slots.clone().step_by(*every).for_each(|slot| vm(of).invalidate(Slot(slot)));
            }
            Step::Evict(of, slots) => evict(&store, *of, slots.clone()),
            Step::Clean => clean(&store),
            Step::Compact { shared } => {
                let mut moved_shared = false;
                let done = compact(store.arena(), usize::MAX, |planned| {
                    let owner = NAMES.iter().filter_map(|name| store.ready(name));
                    let moved = owner
                        .into_iter()
                        .any(|vm| vm.id() == planned.owner.vm && vm.relocate(planned, scratch));
                    moved_shared |= moved && planned.owner.is_shared();
                    moved
                });
                assert!(done.moved > 0 && moved_shared >= *shared, "{done:?}");
            }
            Step::Recompress(of) => {
                store.shared().pools.set_current(Compressor::Zstd(1)).unwrap();
                for slot in (0..SLOTS[0]).map(Slot) {
                    let _ = vm(of).recompress(slot, store.shared().pools.current(), scratch);
                }
            }
            Step::Learn(of, nth) => {
                let seeds = u64::from(*nth) * 100;
                let sample: Vec<u8> = (seeds..seeds + 100).flat_map(records).collect();
                let number = vm(of).dictionaries().add(train(&sample).unwrap()).unwrap();
                assert_eq!(number.get(), *nth);
                store.shared().pools.set_cold(Some(Compressor::ZstdWithDictionary(1))).unwrap();
                let cold = store.shared().pools.cold().unwrap();
                let moved = (0..SLOTS[0])
                    .filter(|slot| {
                        matches!(vm(of).recompress(Slot(*slot), cold, scratch), Recompressed::Moved(_))
                    })
                    .count();
                assert!(moved > 0);
            }
            Step::Cool(of, equal) => {
                let cold = store.shared().pools.cold().unwrap();
                let all = (0..SLOTS[0]).map(|slot| vm(of).recompress(Slot(slot), cold, scratch));
                let shared = all.filter(|outcome| *outcome == Recompressed::Shared).count();
                assert_eq!(shared, *equal);
            }
            Step::Clear(of) => store.clear(NAMES[*of]).unwrap(),
        }
    }
}

fn open(dir: &Path, slots: u32, file_mib: u64) -> Arc<Store> {
    let vms = [(NAMES[0], slots, Limits::NONE), (NAMES[1], SLOTS[0], Limits::NONE)];
    Arc::new(open_with_file(dir, &vms, POOL_BYTES, file_mib << 20))
}

fn evict(store: &Store, of: usize, slots: Range<u32>) {
    let vm = store.ready(NAMES[of]).unwrap();
    let file = store.shared().file.as_ref().unwrap();
    for slot in slots.map(Slot) {
        let Some(record) = vm.table().record(slot) else { continue };
        let age = Age::from_bits(record.age.load(Ordering::Relaxed));
        let mut object = Vec::new();
        let Some((generation, _)) = vm.isolate(slot, age, &mut object) else { continue };
        let owner = Owner { vm: vm.id(), slot };
        let places = file.append(&[Outgoing { owner, cipher: vm.cipher(), object: &object }]).unwrap();
        assert!(vm.write_back(slot, generation, places[0]));
    }
}

fn clean(store: &Store) {
    let file = store.shared().file.as_ref().unwrap();
    let vms: Vec<_> = NAMES.iter().filter_map(|name| store.ready(name)).collect();
    let segment = file.half_dead(101).unwrap();
    let mut moved = 0;
    for record in file.read_segment(segment).unwrap() {
        let Some(vm) = vms.iter().find(|vm| vm.id() == record.owner.vm) else { continue };
        let (slot, place) = (record.owner.slot, record.place);
        let Some(generation) = vm.generation_in_file(slot, place) else { continue };
        let places = file.append_raw(&[record]).unwrap();
        moved += u32::from(vm.move_in_file(slot, generation, places[0]));
    }
    assert!(moved > 0);
}

/// Plays the history and notes each step that is done. The process may die of it.
fn play(dir: &Path) {
    let mut player = Player { dir, store: None, scratch: Scratch::default() };
    let steps = history();
    if std::env::var_os(ONLY_START).is_some() {
        return player.play(0, &steps[0]);
    }
    let mut journal = File::create(dir.join("journal")).unwrap();
    for (at, step) in steps.iter().enumerate() {
        player.play(at, step);
        journal.write_all(b".").unwrap();
    }
}

/// Has a process play in `dir` that dies at the `point`-th point. Whether it got to the end.
fn survives(point: u64, dir: &Path, only_start: bool) -> bool {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["after_a_death_at_any_point_every_page_is_there", "--exact", "--nocapture"]);
    command.env(HISTORY_DIR, dir).env(CRASH_AFTER, point.to_string()).stdout(Stdio::null());
    if only_start {
        command.env(ONLY_START, "1");
    }
    let output = command.output().unwrap();
    let (status, stderr) = (output.status, String::from_utf8_lossy(&output.stderr));
    let died = status.signal() == Some(libc::SIGKILL);
    assert!(died || status.success(), "point {point}, only the start: {only_start}: {status}: {stderr}");
    !died
}

/// Plays the history until the `point`-th point and compares what is left. Whether it got to the end, and how often
/// successors died at their start.
fn die_at(point: u64) -> (bool, u64) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let ended = survives(point, dir.path(), false);
    let done = fs::read(dir.path().join("journal")).map_or(0, |journal| journal.len());
    assert_eq!(ended, done == history().len());
    let starts = if point.is_multiple_of(DYING_STARTS_EVERY) {
        (1..).find(|start| survives(*start, dir.path(), true)).unwrap() - 1
    } else {
        0
    };
    assert_whole(dir.path(), done, point);
    (ended, starts)
}

/// Compares what is in `dir` with the history after so many steps.
fn assert_whole(dir: &Path, done: usize, point: u64) {
    let steps = history();
    let mut before = Truth::new();
    steps.iter().enumerate().take(done).for_each(|(at, step)| follow(&mut before, at, step));
    let mut after = before.clone();
    steps.iter().enumerate().skip(done).take(1).for_each(|(at, step)| follow(&mut after, at, step));

    let at = format!("point {point}, {:?}", steps.get(done));
    let opened =
        SLOTS.into_iter().map(|slots| open(dir, slots, 6)).find(|store| store.ready(NAMES[0]).is_some());
    let store = opened.unwrap_or_else(|| panic!("{at}: a has neither size"));
    store.validate();
    let mut scratch = Scratch::default();
    let mut page = ZERO_PAGE;
    for (number, name) in NAMES.into_iter().enumerate() {
        let vm = store.ready(name).unwrap_or_else(|| panic!("{at}: {name} is out of service"));
        for slot in 0..vm.slots() {
            load_waiting(&vm, slot, &mut page, &mut scratch).unwrap();
            let is = |truth: &Truth| {
                page == truth
                    .get(&(number, slot))
                    .map_or(ZERO_PAGE, |(kind, seed)| page_of_kind(*kind, *seed))
            };
            assert!(is(&before) || is(&after), "{at}: slot {slot} of {name}");
        }
        vm.store(Slot(5), &page_of(2, point), Age::now(), &mut scratch).unwrap();
        evict(&store, number, 5..6);
        load_waiting(&vm, 5, &mut page, &mut scratch).unwrap();
        assert!(page == page_of(2, point), "{at}: it doesn't work on");
    }
    store.validate();
}

#[test]
fn after_a_death_at_any_point_every_page_is_there() {
    if let Some(dir) = std::env::var_os(HISTORY_DIR) {
        return play(Path::new(&dir));
    }
    let next = AtomicU64::new(1);
    let player = || {
        let mut starts = 0;
        loop {
            let point = next.fetch_add(1, Ordering::Relaxed);
            let (ended, more) = die_at(point);
            starts += more;
            if ended {
                return (point, starts);
            }
        }
    };
    let ends = std::thread::scope(|scope| {
        let players = [(); PLAYERS].map(|()| scope.spawn(player));
        players.map(|player| player.join().unwrap())
    });
    // The first one that got to the end passed one more.
    let points = ends.iter().map(|(end, _)| end - 1).min().unwrap();
    let starts: u64 = ends.iter().map(|(_, starts)| starts).sum();
    let line = format!(
        "{points} deaths, one at each point of a history, and {starts} of successors at their start\n"
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
    assert!(points > 1000 && starts > 1000, "{line}");
}
