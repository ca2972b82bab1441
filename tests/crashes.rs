//! The daemon dies again and again under a verifying load of two VMs, while pages leave for a file and its segments are
//! cleaned, compressors change with recompression, cold pages are compressed anew and a VM's limit changes. It is killed from outside at random moments,
//! or kills itself at a numbered point between two changes of its files (`ballast::crash_point`), at start too, before it
//! serves. Whatever was answered is there afterwards, and what was in flight is answered. `BALLAST_KILLS=1000` makes it
//! die so often; it is a hundred times without. And it dies once at each point that it passes from its start to the last
//! answer to a few requests.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ballast::frontend::Manners;
use serde_json::Value;
use support::Random;
use support::daemon::Daemon;
use support::load::Load;

const DEATHS: u64 = 100;
/// Deaths under load between two checks of everything.
const CHECK_EVERY: u64 = 10;
/// Points are drawn evenly by their logarithm up to a power of two: a start passes some dozens, a busy second some
/// hundred thousands.
const POINTS_LOG_MAX: u32 = 18;
/// How long a daemon may take to pass its last point before it is killed from outside after all.
const POINT_WAIT: Duration = Duration::from_secs(1);
/// For what the daemon does at leisure, on a machine that is busy.
const LEISURE: Duration = Duration::from_secs(60);

/// Requests at once, where the daemon dies at each point.
const REQUESTS: usize = 4;
/// Daemons that begin to serve them; each gets a point further. Some requests take fewer points than others.
const ROUNDS: usize = 80;

const NAMES: [&str; 2] = ["web1", "web2"];

/// What has happened so far.
#[derive(Default)]
struct Tally {
    deaths: u64,
    at_points: u64,
    before_serving: u64,
    evicted_pages: u64,
    cleaned_segments: u64,
    recompressed_objects: u64,
    deduplicated_pages: u64,
}

impl Tally {
    /// Adds what a daemon has counted in its life; `None` if it can't be asked any more.
    fn note(&mut self, daemon: &Daemon) -> Option<Value> {
        // Asked of a daemon that may be about to die.
        let output = daemon.ask(&["status", "--json"]);
        let status: Value = serde_json::from_slice(&output.stdout).ok()?;
        let number = |name: &str| status["shrinker"][name].as_u64().unwrap();
        self.evicted_pages += number("evicted_pages");
        self.cleaned_segments += number("cleaned_segments");
        self.recompressed_objects += number("recompressed_objects");
        self.deduplicated_pages += status["pool"]["counters"]["deduplicated_pages"].as_u64().unwrap();
        Some(status)
    }

    /// Waits until a daemon without load compresses pages anew, so that it has begun when the load does, and until
    /// some that are equal have met: that it does at leisure.
    fn wait_for_leisure(&mut self, daemon: &Daemon) {
        daemon.ask(&["pool", "set", "--compressor", "zstd:5", "--recompress"]);
        let start = Instant::now();
        loop {
            let mut life = Self::default();
            let status = life.note(daemon).unwrap();
            // All pages may be where they should be: cold ones in the cold pool.
            let pools = status["pool"]["pools"].as_array().unwrap();
            let mut drain = pools.iter().filter(|pool| pool["state"] == "draining");
            let moved = life.recompressed_objects > 0 || drain.all(|pool| pool["objects"] == 0);
            if moved && self.deduplicated_pages + life.deduplicated_pages > 0 {
                break;
            }
            assert!(
                start.elapsed() < LEISURE,
                "nothing is compressed anew, or found equal: {status}\n{}",
                daemon.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Changes the pool and a limit, and kills the daemon, unless it has done so itself at the point that is `planned`.
fn die_under_load(
    daemon: &mut Daemon,
    loads: &mut [Load],
    planned: bool,
    random: &mut Random,
    tally: &mut Tally,
) {
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for load in loads {
            let ended = &ended;
            scope.spawn(move || load.work_until(ended));
        }
        let compressor = ["lz4", "zstd:1", "zstd:3", "zstd:1+dictionary"][random.below(4) as usize];
        daemon.ask(&["pool", "set", "--compressor", compressor, "--recompress"]);
        let limit = ["64MiB", "2MiB"][random.below(2) as usize];
        daemon.ask(&["vm", "set", NAMES[0], "--limit", limit]);
        // A long life now and then, for what the daemon does at leisure.
        let longest_us = if random.below(8) == 0 { 600_000 } else { 60_000 };
        std::thread::sleep(Duration::from_micros(u64::from(5_000 + random.below(longest_us))));
        let deadline = Instant::now() + POINT_WAIT;
        while planned && !daemon.has_died() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        let died = daemon.has_died();
        assert!(planned || !died, "nobody has killed it:\n{}", daemon.log());
        if !died {
            tally.note(daemon);
        }
        daemon.kill();
        tally.at_points += u64::from(died);
        tally.deaths += 1;
        ended.store(true, Ordering::Release);
    });
}

/// Everything that was asked for is answered, every page is the one that was answered last, and the daemon counts them
/// right.
fn check(daemon: &Daemon, loads: &mut [Load]) {
    for load in &mut *loads {
        load.settle();
        load.check_everything();
    }
    for (load, name) in loads.iter().zip(NAMES) {
        let vm = daemon.vm(name);
        let number = |name: &str| vm[name].as_u64().unwrap();
        // And the swap header.
        let stored = number("stored_pages") + number("file_pages") - 1;
        assert_eq!(Some(stored), load.stored_pages().map(|pages| pages as u64), "{name}: {vm}");
        assert_eq!((number("lost_pages"), number("crashes")), (0, 0), "{name}");
        assert!(stored > 1000, "{name}: {stored}");
    }
}

#[test]
fn nothing_is_lost_however_often_the_daemon_dies() {
    let deaths = std::env::var("BALLAST_KILLS").map_or(DEATHS, |text| text.parse().expect("a number"));
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = tempfile::tempdir().unwrap();
    // The pool has room for about a third of what the two VMs store, and the file for a few times as much.
    let config = format!(
        "[pool]\nmax = \"6MiB\"\ncold_after = \"1s\"\ncold_cpu = \"50%\"\n[writeback]\npath = {:?}\nsize = \"64MiB\"\n{}",
        files.path().join("writeback"),
        NAMES
            .map(|name| format!("[[vm]]\nname = \"{name}\"\nsize = \"64MiB\"\nreserve = \"1MiB\"\n"))
            .concat()
    );
    let mut daemon = Daemon::start(dir.path(), &config);
    let manners = [Manners::Qemu, Manners::CloudHypervisor];
    let mut loads: Vec<Load> =
        NAMES.iter().zip(manners).map(|(name, manners)| Load::attach(daemon.socket(name), manners)).collect();
    let (mut random, mut tally) = (Random(7), Tally::default());
    let mut rounds = 0;
    let mut planned = false;
    while tally.deaths < deaths {
        die_under_load(&mut daemon, &mut loads, planned, &mut random, &mut tally);
        rounds += 1;
        planned = rounds % CHECK_EVERY != 0 && random.below(2) > 0;
        if planned {
            let mut point = || {
                let log = random.below(POINTS_LOG_MAX + 1);
                1 + u64::from(random.below(1 << log))
            };
            while !daemon.restart_dying_after(point()) {
                tally.deaths += 1;
                tally.at_points += 1;
                tally.before_serving += 1;
            }
        } else {
            daemon.restart();
        }
        if rounds % CHECK_EVERY == 0 {
            check(&daemon, &mut loads);
            tally.wait_for_leisure(&daemon);
        }
    }
    daemon.restart();
    check(&daemon, &mut loads);
    report(&tally, &loads);
    assert!(tally.before_serving > deaths / 20 && tally.at_points - tally.before_serving > deaths / 20);
    assert!(tally.evicted_pages > deaths * 10, "hardly anything went to the file: {}", tally.evicted_pages);
    assert!(tally.cleaned_segments > 0 && tally.recompressed_objects > 0 && tally.deduplicated_pages > 0);
}

#[test]
fn every_request_is_answered_once_at_whatever_point_the_daemon_dies() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), "[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n");
    let mut load = Load::attach(daemon.socket("web1"), Manners::CloudHypervisor);
    let (mut deaths, mut rounds) = (0, 0);
    for point in 1.. {
        if rounds == ROUNDS {
            break;
        }
        if !daemon.restart_dying_after(point) {
            continue;
        }
        load.ask_together(REQUESTS, || !daemon.has_died());
        deaths += usize::from(daemon.has_died());
        rounds += 1;
        daemon.restart();
        load.settle();
    }
    load.check_everything();
    assert_eq!(load.failed_stores, 0);
    tell(&format!("{deaths} deaths, one at each point of {REQUESTS} requests"));
    // Each request passes five at least: two when it is taken, three when it is answered.
    assert!(deaths > REQUESTS * 5 && deaths < ROUNDS, "{deaths}");
}

/// A line, also where the harness keeps what passing tests print.
fn tell(line: &str) {
    std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
}

fn report(tally: &Tally, loads: &[Load]) {
    let sum = |of: fn(&Load) -> u64| loads.iter().map(of).sum::<u64>();
    let line = format!(
        "{} deaths, {} of them at points, {} of these before the daemon served; {} pages were checked, {} written to \
         the file, {} segments cleaned, {} objects compressed anew, {} of them as equal pages; {} stores failed for want of room",
        tally.deaths,
        tally.at_points,
        tally.before_serving,
        sum(|load| load.checked),
        tally.evicted_pages,
        tally.cleaned_segments,
        tally.recompressed_objects,
        tally.deduplicated_pages,
        sum(|load| load.failed_stores),
    );
    tell(&line);
}
