//! Reports: pages by age, what compressors would make of them, what is saved and what limit is needed, as numbers that
//! are known beforehand; and that a report is no use of any page.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ballast::ids::Slot;
use ballast::page::ZERO_PAGE;
use ballast::store::Store;
use ballast::store::accounting::Held;
use ballast::store::codec::{Compressor, Scratch, train};
use ballast::store::lru::Age;
use ballast::store::vm::{Loaded, VmStore};
use ballast::survey::{self, Ages, Pages, Walked};
use proptest::prelude::*;
use serde_json::Value;
use support::daemon::Daemon;
use support::world::{NAMES, World};
use support::{SLOTS, open_store, page_of, records};

const POOL_BYTES: u64 = 1 << 30;

fn at(seconds: u64) -> Age {
    Age::stored(Duration::from_secs(seconds))
}

fn open(dir: &Path, compressor: Compressor) -> Store {
    open_store(dir, &["web1"], compressor, POOL_BYTES, POOL_BYTES)
}

fn walk(store: &Store, name: &str, now: Age, sample_max: usize) -> Walked {
    survey::walk(&store.ready(name).unwrap(), store.arena(), now, sample_max, 7)
}

/// What a VM's numbers say, in the words of a survey.
fn counted(held: &Held) -> (u64, u64, u64, u64) {
    (held.stored_pages - held.file_pages, held.same_filled_pages, held.file_pages, held.pool_bytes)
}

fn found(ages: &Ages) -> (u64, u64, u64, u64) {
    let Pages { memory_pages, same_filled_pages, file_pages, pool_bytes, .. } = ages.total();
    (memory_pages, same_filled_pages, file_pages, pool_bytes)
}

/// Everything that a use would change: ages, generations and pools, entries.
fn marks(vm: &VmStore) -> Vec<(u64, u32, u32)> {
    use std::sync::atomic::Ordering::Relaxed;
    let records = vm.table().backed_slots().filter_map(|slot| vm.table().record(slot));
    records
        .map(|record| (record.entry.load(Relaxed), record.age.load(Relaxed), record.tag.load(Relaxed)))
        .collect()
}

/// Half of the pages don't shrink, the others well; some repeat a word, and some are the same as another.
fn store_known_pages(vm: &VmStore, now: impl Fn(u32) -> Age) {
    let mut scratch = Scratch::default();
    for slot in 0..100 {
        vm.store(Slot(slot), &page_of(4, slot.into()), now(slot), &mut scratch).unwrap();
        let seed = slot.min(89);
        vm.store(Slot(1000 + slot), &page_of(2, seed.into()), now(slot), &mut scratch).unwrap();
        if slot < 20 {
            // An even seed is a word that fits its entry.
            vm.store(Slot(2000 + slot), &page_of(0, u64::from(slot) * 2), now(slot), &mut scratch).unwrap();
        }
    }
}

#[test]
fn pages_are_in_the_buckets_of_their_last_use() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    let vm = store.ready("web1").unwrap();
    // Of each hundred the first forty a day and a half ago, the others two minutes before now.
    let now = 1_000_000;
    store_known_pages(&vm, |slot| if slot < 40 { at(now - 129_600) } else { at(now - 120) });
    // Five of them are used again.
    for slot in 0..5 {
        let mut page = ZERO_PAGE;
        let loaded = vm.load(Slot(slot), None, &mut page, at(now - 59), &mut Scratch::default());
        assert!(matches!(loaded.unwrap(), Loaded::Page(_)));
    }
    let before = (marks(&vm), vm.accounting());
    let ages = walk(&store, "web1", at(now), 0).ages;
    assert_eq!(before, (marks(&vm), vm.accounting()));

    let raw_bytes = store.arena().charged_bytes(4096 + 14) as u64;
    // What each of the others takes is what is left.
    let total_bytes = vm.accounting().held.pool_bytes;
    let shrunk_bytes = (total_bytes - 100 * raw_bytes) / 100;
    assert!(total_bytes == 100 * (raw_bytes + shrunk_bytes) && shrunk_bytes < 1400, "{shrunk_bytes}");
    let pages = |bucket: usize| {
        let Pages { memory_pages, same_filled_pages, pool_bytes, .. } = ages.buckets[bucket];
        (memory_pages, same_filled_pages, pool_bytes)
    };
    assert_eq!(pages(0), (5, 0, 5 * raw_bytes));
    assert_eq!(pages(2), (120, 0, 60 * (raw_bytes + shrunk_bytes)), "from two minutes on");
    assert_eq!(pages(7), (95, 20, 35 * raw_bytes + 40 * shrunk_bytes));
    for bucket in [1, 3, 4, 5, 6, 8] {
        assert_eq!(ages.buckets[bucket], Pages::default(), "{bucket}");
    }
    assert_eq!((ages.oldest, ages.within(300).pages()), (Some(Duration::from_secs(129_600)), 125));

    let need = survey::Need::of(&ages, true);
    let used_bytes = 65 * raw_bytes + 60 * shrunk_bytes;
    assert_eq!((need.used_bytes, need.limit_bytes, need.rest_pages), (used_bytes, 1 << 20, 95));
    assert_eq!(survey::Need::of(&ages, false).used_bytes, total_bytes);
}

#[test]
fn a_compressor_makes_of_a_sample_what_it_makes_of_the_pages() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir.path().join("lz4"), Compressor::Lz4);
    let vm = store.ready("web1").unwrap();
    store_known_pages(&vm, at_slot);
    let before = (marks(&vm), vm.accounting());
    let slots = walk(&store, "web1", at(200), SLOTS as usize).sample;
    let expected: Vec<_> = (0..100).chain(1000..1100).map(Slot).collect();
    assert_eq!(slots, expected, "all pages of the arena, and none that is only a word");
    let tried = survey::compressors([Compressor::Zstd(19), Compressor::ZstdWithDictionary(9)]);
    let sample = survey::sample(&vm, store.arena(), &slots, &tried, || true);
    assert_eq!(before, (marks(&vm), vm.accounting()), "a report is no use");

    assert_eq!((sample.pages, sample.equal_pages, sample.bad.len()), (200, 10, 0));
    assert_eq!(sample.pool_bytes, vm.accounting().held.pool_bytes);
    assert_eq!(sample.trials.len(), 6, "without a dictionary none is tried");
    for trial in &sample.trials {
        // The same pages, stored by somebody who uses this compressor.
        let other = open(&dir.path().join(format!("with {}", trial.compressor)), trial.compressor);
        let pages = other.ready("web1").unwrap();
        store_known_pages(&pages, at_slot);
        let held = pages.accounting().held;
        assert_eq!(
            (trial.pool_bytes, trial.incompressible_pages),
            (held.pool_bytes, held.incompressible_pages),
            "{}",
            trial.compressor
        );
        assert!(
            trial.incompressible_pages == 100 && trial.compress_ns_p50 > 0 && trial.decompress_ns_p50 > 0
        );
    }
    let few = survey::sample(&vm, store.arena(), &slots, &tried, || false);
    assert_eq!((few.pages, few.pool_bytes), (0, 0), "there is no time");
}

fn at_slot(slot: u32) -> Age {
    at(slot.into())
}

#[test]
fn a_compressor_that_learns_is_tried_with_what_it_learned() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    store.shared().pools.set_cold(Some(Compressor::ZstdWithDictionary(9))).unwrap();
    let (vm, cold) = (store.ready("web1").unwrap(), store.shared().pools.cold().unwrap());
    let mut scratch = Scratch::default();
    for slot in 0..300 {
        vm.store(Slot(slot), &records(slot.into()), at_slot(slot), &mut scratch).unwrap();
    }
    let pages: Vec<u8> = (1000..1300).flat_map(records).collect();
    vm.dictionaries().add(train(&pages).unwrap()).unwrap();
    let slots = walk(&store, "web1", at(1000), SLOTS as usize).sample;
    let before = vm.metadata_bytes();
    let tried = [Compressor::Zstd(9), Compressor::ZstdWithDictionary(9)];
    let sample = survey::sample(&vm, store.arena(), &slots, &tried, || true);
    assert_eq!(vm.metadata_bytes(), before, "nothing is left of it");
    let [plain, learned] = sample.trials[..] else { panic!("{:?}", sample.trials) };
    assert!(learned.pool_bytes * 10 < plain.pool_bytes * 9, "{learned:?}, {plain:?}");
    for slot in slots {
        vm.recompress(slot, cold, &mut scratch);
    }
    assert_eq!(vm.accounting().held.pool_bytes, learned.pool_bytes, "it is what the pages become");
}

#[test]
fn pages_that_are_kept_as_one_are_charged_once_and_as_young_as_the_youngest() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    store.shared().pools.set_cold(Some(Compressor::Zstd(1))).unwrap();
    let (vm, cold) = (store.ready("web1").unwrap(), store.shared().pools.cold().unwrap());
    let (now, mut scratch) = (1_000_000, Scratch::default());
    // Of four kinds of pages 16 each; the last of the first kind was used a minute ago, all others two days.
    for slot in 0..64 {
        let age = if slot == 60 { at(now - 60) } else { at(now - 172_800) };
        vm.store(Slot(slot), &page_of(2, u64::from(slot % 4)), age, &mut scratch).unwrap();
    }
    for slot in 0..64 {
        vm.recompress(Slot(slot), cold, &mut scratch);
    }
    let held = vm.accounting().held;
    assert_eq!((held.shared_pages, held.shared_objects), (64, 4));
    let walked = walk(&store, "web1", at(now), SLOTS as usize);
    assert_eq!(found(&walked.ages), counted(&held));
    let object_bytes = held.pool_bytes / 4;
    assert_eq!((walked.ages.buckets[1].memory_pages, walked.ages.buckets[1].pool_bytes), (1, object_bytes));
    assert_eq!(
        (walked.ages.buckets[7].memory_pages, walked.ages.buckets[7].pool_bytes),
        (63, 3 * object_bytes)
    );
    let sample = survey::sample(&vm, store.arena(), &walked.sample, &[Compressor::Lz4], || true);
    assert_eq!((sample.pages, sample.equal_pages, sample.pool_bytes), (4, 0, held.pool_bytes));
    assert_eq!(survey::Need::of(&walked.ages, true).used_bytes, object_bytes);
}

#[test]
fn a_sample_is_as_large_as_wanted_and_of_pages_of_the_pool_alone() {
    let mut world = World::new(1 << 20, 24 << 20);
    while world.store().in_use().iter().any(|vm| vm.accounting().held.file_pages < 50) {
        world.use_pages(500);
    }
    let store = world.store();
    for name in NAMES {
        let vm = store.ready(name).unwrap();
        let before = (marks(&vm), vm.accounting());
        let walked = walk(store, name, Age::now(), 40);
        assert_eq!(found(&walked.ages), counted(&before.1.held), "{name}");
        assert_eq!((walked.ages.total().file_pages > 0, walked.sample.len()), (true, 40), "{name}");
        let sample = survey::sample(&vm, store.arena(), &walked.sample, &[Compressor::Lz4], || true);
        assert_eq!(before, (marks(&vm), vm.accounting()));
        assert_eq!((sample.pages, sample.trials[0].pool_bytes), (40, sample.pool_bytes));
    }
    world.check();
    world.store().validate();
}

#[test]
fn a_page_that_is_bad_is_told_and_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path(), Compressor::Lz4);
    let vm = store.ready("web1").unwrap();
    store_known_pages(&vm, at_slot);
    let slots = walk(&store, "web1", at(200), SLOTS as usize).sample;
    let file = OpenOptions::new().read(true).write(true).open(dir.path().join("arena")).unwrap();
    let entry = vm.table().record(Slot(1001)).unwrap().entry.load(std::sync::atomic::Ordering::Relaxed);
    let ballast::store::entry::Entry::Arena(location) =
        ballast::store::entry::Entry::unpack(entry, Slot(1001)).unwrap()
    else {
        panic!("it is in the arena")
    };
    let mut byte = [0];
    file.read_exact_at(&mut byte, location.offset + 20).unwrap();
    file.write_all_at(&[byte[0] ^ 4], location.offset + 20).unwrap();
    let sample = survey::sample(&vm, store.arena(), &slots, &[Compressor::Lz4], || true);
    let bad: Vec<_> = sample.bad.iter().map(|bad| (bad.slot, bad.reason.as_str())).collect();
    assert_eq!(bad, [(Slot(1001), "the checksum of the stored page does not match")]);
    assert_eq!(sample.pages, 199);
}

#[derive(Clone, Debug)]
enum Step {
    Store { slot: u32, kind: u8, seed: u64 },
    Load { slot: u32 },
    Invalidate { slot: u32 },
    Wait { seconds: u64 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let slots = || prop_oneof![0..20u32, 4090..4100u32];
    let step = prop_oneof![
        6 => (slots(), any::<u8>(), 0..1000u64).prop_map(|(slot, kind, seed)| Step::Store { slot, kind, seed }),
        3 => slots().prop_map(|slot| Step::Load { slot }),
        1 => slots().prop_map(|slot| Step::Invalidate { slot }),
        3 => prop_oneof![Just(30), Just(60), Just(4000), Just(100_000)].prop_map(|seconds| Step::Wait { seconds }),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn ages_are_those_of_the_last_uses_and_their_sums_are_the_vms_numbers(steps in steps()) {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path(), Compressor::Lz4);
        let vm = store.ready("web1").unwrap();
        let mut scratch = Scratch::default();
        // When each page was used last, and whether a load counts.
        let mut truth: std::collections::HashMap<u32, (u64, bool)> = std::collections::HashMap::new();
        let mut now = 1_000_000;
        for step in steps {
            match step {
                Step::Store { slot, kind, seed } => {
                    let same_filled = kind % 5 == 0 && seed.is_multiple_of(2);
                    vm.store(Slot(slot), &page_of(kind, seed), at(now), &mut scratch).unwrap();
                    truth.insert(slot, (now, !same_filled));
                }
                Step::Load { slot } => {
                    vm.load(Slot(slot), None, &mut ZERO_PAGE.clone(), at(now), &mut scratch).map(drop).unwrap();
                    if let Some((used, true)) = truth.get_mut(&slot) {
                        *used = now;
                    }
                }
                Step::Invalidate { slot } => {
                    vm.invalidate(Slot(slot));
                    truth.remove(&slot);
                }
                Step::Wait { seconds } => now += seconds,
            }
            let walked = walk(&store, "web1", at(now), 5);
            prop_assert_eq!(found(&walked.ages), counted(&vm.accounting().held));
            let objects = usize::try_from(vm.accounting().held.objects()).unwrap();
            prop_assert_eq!(walked.sample.len(), objects.min(5));
            for bound in [60, 120, 3600, 86_400] {
                // An age has a grain of 32 ms, so a page is never younger than it is.
                let within = truth.values().filter(|(used, _)| now - used < bound).count();
                prop_assert_eq!(walked.ages.within(bound).pages(), within as u64, "within {}", bound);
            }
        }
        store.validate();
    }
}

const CONFIG: &str = "workers = 1\n[pool]\nmax = \"64MiB\"\npressure = false\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\nlimit = \"8MiB\"\n\
    [[vm]]\nname = \"idle\"\nsize = \"16MiB\"\n\
    [[vm]]\nname = \"bad\"\nsize = \"16MiB\"\n\
    [[vm]]\nname = \"held\"\nsize = \"16MiB\"\n";

/// A daemon with 300 pages of one VM, one VM without pages, one that is damaged and one in quarantine.
fn daemon(dir: &Path) -> Daemon {
    let mut daemon = Daemon::start(dir, CONFIG);
    {
        let (_device, mut queue) = daemon.attach("web1");
        for slot in 0..100 {
            let seed = slot * 2;
            queue.write_pages(10 + slot, &[page_of(4, seed)]).unwrap();
            queue.write_pages(1000 + slot, &[page_of(2, seed)]).unwrap();
            queue.write_pages(2000 + slot, &[page_of(0, seed)]).unwrap();
        }
        queue.read_pages(10, 7).unwrap();
    }
    daemon.kill();
    fs::write(daemon.table("bad"), "no table").unwrap();
    let table = OpenOptions::new().write(true).open(daemon.table("held")).unwrap();
    // Three crashes in a row.
    table.write_all_at(&[3, 3, 3, 3], 164).unwrap();
    daemon.restart();
    daemon
}

fn report(daemon: &Daemon, args: &[&str]) -> Value {
    let output = daemon.ask(&[&["report", "--json"], args].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn numbers(value: &Value, field: &str) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|item| item[field].as_u64().unwrap()).collect()
}

#[test]
fn a_daemon_reports_what_its_status_counts_and_uses_no_page() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = daemon(dir.path());
    let (table, status) = (fs::read(daemon.table("web1")).unwrap(), daemon.status());
    let report = report(&daemon, &[]);
    assert_eq!(fs::read(daemon.table("web1")).unwrap(), table, "no age and no entry is another");
    assert_eq!(daemon.status()["vms"], status["vms"]);

    let names: Vec<_> =
        report["vms"].as_array().unwrap().iter().map(|vm| vm["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["web1", "idle", "bad", "held"]);
    let (vm, survey) = (daemon.vm("web1"), &report["vms"][0]["survey"]);
    // The swap header is a page, too.
    assert_eq!((&vm["stored_pages"], &survey["guest_pages"]), (&301.into(), &300.into()));
    for field in ["stored_pages", "same_filled_pages", "file_pages", "pool_bytes"] {
        assert_eq!(
            numbers(&survey["ages"], field).iter().sum::<u64>(),
            vm[field].as_u64().unwrap(),
            "{field}"
        );
        assert_eq!(survey[field], vm[field], "{field}");
    }
    let used = numbers(&survey["working_set"], "used_bytes");
    assert_eq!((used.len(), used.last()), (9, Some(&(301 * 4096))));
    let sample = &survey["sample"];
    assert_eq!(
        (&sample["pages"], &sample["equal_pages"], &sample["bad_pages"]),
        (&201.into(), &0.into(), &0.into())
    );
    assert_eq!(sample["pool_bytes"], vm["pool_bytes"], "all of it was tried");
    assert_eq!(sample["compressors"][0]["compressor"], "lz4");
    assert_eq!(sample["compressors"][0]["estimated_pool_bytes"], vm["pool_bytes"]);
    let raw = numbers(&sample["compressors"], "incompressible_pages");
    assert_eq!(raw, [100; 5]);

    let need = &survey["need"];
    assert_eq!((&need["within_seconds"], &need["rest_pages"]), (&Value::Null, &0.into()), "there is no file");
    assert_eq!(need["used_bytes"], vm["pool_bytes"]);
    let needed = (vm["pool_bytes"].as_u64().unwrap() * 9).div_ceil(8).next_multiple_of(1 << 20);
    assert_eq!((&need["limit_bytes"], &need["current_limit_bytes"]), (&needed.into(), &(8u64 << 20).into()));
    assert_eq!(need["fit"], "far_above");

    let sum = |field: &str| {
        let surveys = report["vms"].as_array().unwrap().iter().filter(|vm| !vm["survey"].is_null());
        surveys.map(|vm| vm["survey"]["savings"][field].as_u64().unwrap()).sum::<u64>()
    };
    let pool = &status["pool"];
    let pool = |field: &str| pool[field].as_u64().unwrap();
    // The quarantined VM's pages have their part, which is shown nowhere.
    let (arena, metadata) = (sum("arena_bytes"), sum("metadata_bytes"));
    assert!(arena <= pool("used_bytes") && arena * 100 > pool("used_bytes") * 95, "{arena}");
    assert!(metadata <= pool("metadata_bytes") && metadata * 2 > pool("metadata_bytes"), "{metadata}");
    let savings = &survey["savings"];
    let parts =
        ["arena_bytes", "metadata_bytes", "daemon_bytes"].map(|field| savings[field].as_i64().unwrap());
    assert_eq!(savings["stored_bytes"].as_i64(), Some(301 * 4096));
    assert_eq!(savings["saved_bytes"].as_i64().unwrap(), 301 * 4096 - parts.iter().sum::<i64>());
    assert!(parts[2] > 0);
}

#[test]
fn what_a_daemon_reports_of_pages_that_are_kept_as_one_is_what_its_status_counts() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let cold =
        CONFIG.replace("pressure = false", "pressure = false\ncold_after = \"1s\"\ncold_cpu = \"100%\"");
    let daemon = Daemon::start(dir.path(), &cold);
    let (_device, mut queue) = daemon.attach("web1");
    for slot in 0..400 {
        queue.write_pages(10 + slot, &[page_of(2, slot % 4)]).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.vm("web1")["shared_pages"].as_u64() < Some(400) {
        assert!(Instant::now() < deadline, "{}", daemon.vm("web1"));
        std::thread::sleep(Duration::from_millis(50));
    }
    let (report, vm, pool) = (report(&daemon, &[]), daemon.vm("web1"), daemon.status()["pool"].clone());
    let (survey, number) = (&report["vms"][0]["survey"], |value: &Value| value.as_u64().unwrap());
    assert_eq!(survey["pool_bytes"], vm["pool_bytes"]);
    assert_eq!(numbers(&survey["ages"], "pool_bytes").iter().sum::<u64>(), number(&vm["pool_bytes"]));
    assert_eq!(survey["need"]["used_bytes"], vm["pool_bytes"], "all of it, as there is no file");
    assert!(number(&survey["savings"]["arena_bytes"]) <= number(&pool["used_bytes"]), "{survey}");
    assert_eq!(survey["sample"]["pool_bytes"], vm["pool_bytes"], "each object was tried once");
}

#[test]
fn what_a_person_reads_fits_a_screen_and_the_picture_is_xml() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = daemon(dir.path());
    let picture = dir.path().join("report.svg");
    let output = daemon.ask(&["report", "--svg", picture.to_str().unwrap()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let widest = text.lines().map(|line| line.chars().count()).max();
    assert!(widest <= Some(100), "{text}");
    let lines: Vec<_> = text.lines().collect();
    let after = |name: &str| lines[lines.iter().position(|line| *line == name).unwrap() + 1];
    assert!(after("web1").starts_with("  1.17MiB stored in "), "{text}");
    assert_eq!(after("idle"), "  no pages are stored");
    assert!(after("bad").starts_with("  damaged: "), "{text}");
    assert!(after("held").starts_with("  quarantined: "), "{text}");
    assert_eq!(text.matches("LAST USED").count(), 1);
    for part in [
        "< 1 min",
        "no other compressor would hold this in less",
        "201 of its pages in the pool were tried",
        "as none can leave",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }

    let checked =
        Command::new("xmllint").arg("--noout").arg(&picture).output().expect("xmllint is installed");
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let xpath = |path: &str| {
        let output = Command::new("xmllint").args(["--xpath", path]).arg(&picture).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(xpath("count(//*[local-name()='polyline'])"), "1");
    for name in ["web1", "idle", "bad", "held", "Pages by last use", "zstd:9"] {
        assert_eq!(xpath(&format!("count(//*[local-name()='text'][.='{name}'])")), "1", "{name}");
    }
    let bars = "count(//*[local-name()='rect'][@fill='#1f6fb4'])";
    assert!(xpath(bars).parse::<u32>().unwrap() >= 3, "pages, the key, and lz4");
}

#[test]
fn one_vm_can_be_asked_for_and_one_that_is_not_there_is_an_error() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = daemon(dir.path());
    let one = report(&daemon, &["--vm", "web1", "--sample", "50"]);
    assert_eq!(
        (one["vms"].as_array().unwrap().len(), &one["vms"][0]["survey"]["sample"]["pages"]),
        (1, &50.into())
    );
    let none = report(&daemon, &["--vm", "web1", "--sample", "0"]);
    assert_eq!(none["vms"][0]["survey"]["sample"]["compressors"], Value::Array(Vec::new()));
    let bad = report(&daemon, &["--vm", "bad"]);
    assert_eq!((&bad["vms"][0]["state"], &bad["vms"][0]["survey"]), (&"damaged".into(), &Value::Null));
    let output = daemon.ask(&["report", "--vm", "wbe1"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("there is no VM \"wbe1\"; the VMs are: bad, held, idle, web1"), "{said}");
}
