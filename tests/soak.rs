//! Everything at once, for as long as it is told: two VMs under a load that compares every page, pages leaving for a file
//! whose segments are cleaned, other compressors, another limit, checks, VMMs that hang up and come back, a third VM that
//! is used and cleared again and again, and, in the first quarter, a daemon that is killed. In the rest one daemon lives,
//! and nothing that it takes may grow: memory, descriptors, threads, the arena against what is in it. At the end its
//! numbers are those that its successor counts. `BALLAST_SOAK_SECONDS=3600` makes it an hour; it is a few seconds without.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Manners, Memory, Options};
use ballast::page::ZERO_PAGE;
use serde_json::Value;
use support::daemon::Daemon;
use support::load::{Load, PATIENCE};
use support::usage::Usage;
use support::{Random, page_of};

const SECONDS: u64 = 6;
/// From this long on what has drifted is told from what varies.
const DRIFT_SECONDS: u64 = 60;
const ROUND: Duration = Duration::from_millis(500);
/// Rounds between two deaths in the first quarter.
const KILL_EVERY: u64 = 3;
const MIB: u64 = 1 << 20;

/// What the daemon may take at any time: two VMs, and the third one now and then.
const PRIVATE_BYTES_MAX: u64 = 32 * MIB;
const DESCRIPTORS_MAX: u64 = 80;
const THREADS_MAX: u64 = 40;
/// And the first page of a VM, which has its place whatever the maximum.
const POOL_BYTES_MAX: u64 = 6 * MIB + 3 * 64 * 1024;

/// What the median of the last quarter may be above that of the second one. The allocator's caches and the shrinker's
/// tables vary by some hundred kilobytes; threads that answer clients end when nobody has asked for ten seconds.
const PRIVATE_DRIFT_BYTES: u64 = MIB;
const DESCRIPTORS_DRIFT: u64 = 2;
const THREADS_DRIFT: u64 = 8;
const ARENA_DRIFT_PERMILLE: u64 = 100;

const NAMES: [&str; 2] = ["web1", "web2"];
const CLEARED: &str = "web3";

/// What the daemon took at one moment.
#[derive(Clone, Copy, Debug)]
struct Sample {
    usage: Usage,
    /// Bytes of the arena for a thousand bytes of compressed pages.
    arena_permille: u64,
}

#[derive(Default)]
struct Tally {
    rounds: u64,
    kills: u64,
    hang_ups: u64,
    checks: u64,
    clears: u64,
    samples: Vec<Sample>,
}

struct Soak {
    daemon: Daemon,
    random: Random,
    tally: Tally,
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value[name].as_u64().unwrap_or_else(|| panic!("{name}: {value}"))
}

impl Soak {
    fn ask(&self, args: &[&str]) {
        let output = self.daemon.ask(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Changes what can be changed, looks at all pages now and then, and notes what the daemon takes.
    fn disturb(&mut self) {
        let compressor = ["lz4", "zstd:1", "zstd:3", "zstd:5+dictionary"][self.random.below(4) as usize];
        self.ask(&["pool", "set", "--compressor", compressor, "--recompress"]);
        let limit = ["64MiB", "2MiB"][self.random.below(2) as usize];
        self.ask(&["vm", "set", NAMES[0], "--limit", limit]);
        if self.tally.rounds.is_multiple_of(4) {
            self.ask(&["check", "--rate", "1GiB"]);
            self.tally.checks += 1;
        }
        self.use_and_clear();
        let usage = Usage::of(self.daemon.pid().unwrap());
        let status = self.daemon.status();
        let pool = &status["pool"];
        let used_bytes = number(pool, "used_bytes");
        assert!(usage.private_bytes < PRIVATE_BYTES_MAX, "{usage:?}");
        assert!(usage.descriptors < DESCRIPTORS_MAX && usage.threads < THREADS_MAX, "{usage:?}");
        assert!(used_bytes <= POOL_BYTES_MAX, "{pool}");
        let arena_permille = used_bytes * 1000 / number(pool, "payload_bytes").max(1);
        self.tally.samples.push(Sample { usage, arena_permille });
    }

    /// A third VM is powered on, finds nothing, stores something and is cleared.
    fn use_and_clear(&mut self) {
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let mut device = Device::connect(self.daemon.socket(CLEARED), memory, Options::default()).unwrap();
        let queue = &mut device.start().unwrap()[0];
        for slot in 1..50 {
            assert!(queue.read_page(slot).unwrap() == ZERO_PAGE, "slot {slot} was cleared");
            // When neither the pool nor the file has room in time, the store fails.
            let _ = queue.write_pages(slot, &[page_of(4, self.tally.clears << 8 | slot)]);
        }
        drop(device);
        let deadline = Instant::now() + PATIENCE;
        while !self.daemon.ask(&["vm", "clear", CLEARED]).status.success() {
            assert!(Instant::now() < deadline, "its VMM is gone: {}", self.daemon.log());
            std::thread::sleep(Duration::from_millis(5));
        }
        self.tally.clears += 1;
    }

    fn round(&mut self, loads: &mut [Load], kill: bool) {
        let hang_up = self.random.below(3) == 0;
        if hang_up {
            // With requests in flight: what is not answered is carried out when it is back.
            loads.iter_mut().for_each(|load| load.device.disconnect());
            self.tally.hang_ups += 1;
        }
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Also when a check of this thread fails: the loads would go on for ever.
            let end_loads = EndOnDrop(&ended);
            for load in loads {
                let ended = &ended;
                scope.spawn(move || load.work_until(ended));
            }
            let end = Instant::now() + ROUND;
            self.disturb();
            std::thread::sleep(end.saturating_duration_since(Instant::now()));
            if kill {
                self.daemon.restart();
                self.tally.kills += 1;
            }
            drop(end_loads);
        });
        self.tally.rounds += 1;
    }

    /// Everything is answered, every page is the one that was answered last, and the daemon counts them right.
    fn compare(&self, loads: &mut [Load]) {
        for (load, name) in loads.iter_mut().zip(NAMES) {
            load.settle();
            load.check_everything();
            let vm = self.daemon.vm(name);
            // And the swap header.
            let stored = number(&vm, "stored_pages") + number(&vm, "file_pages") - 1;
            assert_eq!(Some(stored), load.stored_pages().map(|pages| pages as u64), "{name}: {vm}");
            let bad = number(&vm["counters"], "bad_pages");
            assert_eq!((number(&vm, "lost_pages"), number(&vm, "crashes"), bad), (0, 0, 0), "{name}");
        }
    }

    /// The numbers that a start counts anew, when nothing moves.
    fn counted(&self) -> Vec<u64> {
        let status = self.daemon.status();
        let mut counted = vec![number(&status["writeback"], "live_bytes")];
        for vm in status["vms"].as_array().unwrap() {
            let names = [
                "stored_pages",
                "same_filled_pages",
                "incompressible_pages",
                "file_pages",
                "lost_pages",
                "pool_bytes",
                "payload_bytes",
            ];
            counted.extend(names.map(|name| number(vm, name)));
        }
        counted
    }

    /// What the daemon has counted all along is what its successor counts from the files.
    fn recount(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let mut before = self.counted();
        loop {
            std::thread::sleep(Duration::from_millis(300));
            let now = self.counted();
            if before == now {
                break;
            }
            assert!(Instant::now() < deadline, "nobody asks for anything, and {before:?} becomes {now:?}");
            before = now;
        }
        self.daemon.restart();
        assert_eq!(self.counted(), before);
    }
}

/// The medians of the four quarters.
fn medians(samples: &[Sample], of: fn(&Sample) -> u64) -> [u64; 4] {
    // So few that there are no quarters: all of them, four times.
    if samples.len() < 4 {
        return medians(&samples.repeat(4), of);
    }
    let quarter = samples.len() / 4;
    [0, 1, 2, 3].map(|n| {
        let mut values: Vec<u64> = samples[n * quarter..(n + 1) * quarter].iter().map(of).collect();
        values.sort_unstable();
        values[values.len() / 2]
    })
}

/// What has drifted, from the second quarter to the last, is within its bounds. In a short run it may be anything.
fn drift(samples: &[Sample], is_long: bool) -> String {
    let mut text = String::new();
    let mut look = |what: &str, bound: u64, of: fn(&Sample) -> u64| {
        let quarters = medians(samples, of);
        text.push_str(&format!("; {what} {quarters:?}"));
        assert!(!is_long || quarters[3] <= quarters[1] + bound, "{what}: {quarters:?}");
    };
    look("private KiB", PRIVATE_DRIFT_BYTES >> 10, |sample| sample.usage.private_bytes >> 10);
    look("descriptors", DESCRIPTORS_DRIFT, |sample| sample.usage.descriptors);
    look("threads", THREADS_DRIFT, |sample| sample.usage.threads);
    look("arena for 1000 bytes of payload", ARENA_DRIFT_PERMILLE, |sample| sample.arena_permille);
    text
}

#[test]
fn nothing_drifts_however_long_it_runs() {
    let seconds = std::env::var("BALLAST_SOAK_SECONDS").map_or(SECONDS, |text| text.parse().unwrap());
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = tempfile::tempdir().unwrap();
    // The pool has room for about a third of what the two VMs store, and the file for a few times as much.
    let config = format!(
        "workers = 2\n[pool]\nmax = \"6MiB\"\ncold_after = \"5s\"\n[writeback]\npath = {:?}\nsize = \"64MiB\"\n{}",
        files.path().join("writeback"),
        [NAMES[0], NAMES[1], CLEARED]
            .map(|name| format!("[[vm]]\nname = \"{name}\"\nsize = \"64MiB\"\n"))
            .concat()
    );
    let daemon = Daemon::start(dir.path(), &config);
    let manners = [Manners::Qemu, Manners::CloudHypervisor];
    let mut loads: Vec<Load> =
        NAMES.iter().zip(manners).map(|(name, manners)| Load::attach(daemon.socket(name), manners)).collect();
    let mut soak = Soak { daemon, random: Random(7), tally: Tally::default() };
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let mut last_kill_is_due = true;
    while start.elapsed() < length {
        let early = start.elapsed() < length / 4;
        // Once at least, however slow the machine.
        let kill = if early { soak.tally.rounds % KILL_EVERY == 1 } else { last_kill_is_due };
        soak.round(&mut loads, kill);
        last_kill_is_due &= early;
        if soak.tally.rounds.is_multiple_of(20) {
            soak.compare(&mut loads);
        }
    }
    soak.compare(&mut loads);
    let evicted = number(&soak.daemon.status()["shrinker"], "evicted_pages");
    soak.recount();
    soak.compare(&mut loads);
    tell(&soak.tally, &loads, evicted, seconds);
    let tally = &soak.tally;
    assert!(tally.kills > 0 && tally.checks > 0 && tally.clears >= tally.rounds && evicted > 100);
}

/// A line, also where the harness keeps what passing tests print.
fn tell(tally: &Tally, loads: &[Load], evicted: u64, seconds: u64) {
    let sum = |of: fn(&Load) -> u64| loads.iter().map(of).sum::<u64>();
    let line = format!(
        "{seconds} s, {} rounds: {} pages compared, {evicted} written to the file by the last daemon, {} deaths, \
         {} hang-ups, {} checks, {} clears; {} stores failed for want of room{}\n",
        tally.rounds,
        sum(|load| load.checked),
        tally.kills,
        tally.hang_ups,
        tally.checks,
        tally.clears,
        sum(|load| load.failed_stores),
        drift(&tally.samples, seconds >= DRIFT_SECONDS),
    );
    std::io::stderr().write_all(line.as_bytes()).unwrap();
}
