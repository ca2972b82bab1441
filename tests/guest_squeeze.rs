//! Booted guests under the balloon controller: cold memory leaves, what becomes hot comes back, nobody is killed, every page
//! is right, and each decision is made again from the trace. Needs QEMU and the built images and fails without them;
//! `tests/run` provides both. Nothing here asserts a time but the limit of a hang.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::File;
use std::io::{BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ballast::balloon::Vmm;
use ballast::balloon::trace;
use serde_json::Value;
use support::daemon::Daemon;
use support::vm::{Vm, image};

const MIB: u64 = 1 << 20;
/// Minutes are usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(900);

/// What a guest holds, and works on at first.
const HELD_MIB: u64 = 320;
const HOT_MIB: u64 = 48;
/// What its kernel needs beside that, at least.
const KERNEL_MIB: u64 = 64;

/// What it rests after each pass over that: three emulated processors that never do have no time left on two cores for what
/// is looked at here.
const REST_MS: u64 = 20;

/// What two guests may have together: less than they were booted with, and less than both need to work.
const BUDGET_MIB: u64 = 600;

/// A guest of 512 MiB as `vm args` says, that does what it is told on a serial line.
struct Guest {
    name: &'static str,
    vm: Vm,
    orders: UnixStream,
}

impl Guest {
    fn boot(daemon: &Daemon, dir: &Path, name: &'static str) -> Self {
        let said = daemon.ask(&[
            "vm",
            "args",
            name,
            "--vmm",
            "qemu",
            "--memory",
            "512MiB",
            "--qemu-before-9.2",
            "--json",
        ]);
        assert!(said.status.success(), "{said:?}");
        let said: Value = serde_json::from_slice(&said.stdout).unwrap();
        let ours = said["args"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned());
        let directory = dir.join(format!("{name}.guest"));
        std::fs::create_dir(&directory).unwrap();
        let orders = directory.join("orders");
        let append = format!(
            "console=ttyS0 quiet panic=-1 ballast.mib={HELD_MIB} ballast.rounds=1 ballast.overwrite=0 ballast.orders=1 ballast.rest_ms={REST_MS} ballast.page_cluster=0"
        );
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-nodefaults",
            "-no-user-config",
            "-accel",
            "tcg",
            "-machine",
            "q35",
            "-display",
            "none",
        ]);
        command.args([
            "-no-reboot",
            "-kernel",
            &image("vmlinuz"),
            "-initrd",
            &image("initramfs"),
            "-append",
            &append,
        ]);
        command.args(ours);
        let vm = Vm::boot_with(
            command,
            &directory,
            |file| ["-serial".to_owned(), format!("file:{file}")],
            &["-serial".to_owned(), format!("unix:{},server=on,wait=off", orders.display())],
        );
        let deadline = Instant::now() + PATIENCE;
        let orders = loop {
            match UnixStream::connect(&orders) {
                Ok(stream) => break stream,
                Err(err) => assert!(Instant::now() < deadline, "{err}\n{}", vm.words()),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        Self { name, vm, orders }
    }

    /// Tells it to work on so much.
    fn work_on(&mut self, mib: u64) {
        self.orders.write_all(format!("{mib}\n").as_bytes()).unwrap();
    }

    /// What it has, by the daemon's word.
    fn has_bytes(&self, daemon: &Daemon) -> u64 {
        let balloon = balloon(daemon, self.name);
        balloon["actual_bytes"].as_u64().unwrap_or_else(|| panic!("{balloon}"))
    }

    /// Waits until it has reported this.
    fn says(&mut self, what: &str) {
        let report = self.vm.wait(PATIENCE, |report| {
            report.verdict.is_some() || report.progress.as_ref().is_some_and(|said| said.contains(what))
        });
        let said = report.progress.as_ref().is_some_and(|said| said.contains(what));
        assert!(said && report.verdict.is_none(), "{report:?}\n{}", self.vm.words());
    }

    /// Has it check all its pages and end.
    fn finish(&mut self) {
        self.work_on(0);
        let counts = self.vm.pass(PATIENCE);
        assert!(counts.contains(" bad=0 "), "{counts}");
        // Its kernel's counters come after the verdict, and then it powers off.
        self.vm.wait(PATIENCE, |_| false);
        assert!(self.vm.console().contains("oom_kill 0"), "{}", self.vm.words());
        println!("{}: {counts}", self.name);
    }
}

/// The daemon's word on a VM's balloon.
fn balloon(daemon: &Daemon, name: &str) -> Value {
    daemon.vm(name)["balloon"].take()
}

/// Waits until what a guest has is as wanted, in MiB.
fn wait_until_it_has(daemon: &Daemon, guest: &Guest, wanted: impl Fn(u64) -> bool) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let balloon = balloon(daemon, guest.name);
        let actual = balloon["actual_bytes"].as_u64().map(|bytes| bytes / MIB);
        if let Some(mib) = actual.filter(|mib| wanted(*mib)) {
            return mib;
        }
        assert!(Instant::now() < deadline, "{balloon}\n{}\n{}", guest.vm.words(), daemon.log());
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn config(dir: &Path, vms: &[&str], more: &str) -> String {
    let vm = |name: &&str| {
        let socket = dir.join(format!("{name}.qmp"));
        format!(
            "[[vm]]\nname = \"{name}\"\nsize = \"1GiB\"\n\
             squeeze = {{ vmm = \"qemu\", socket = {socket:?}, min = \"96MiB\" }}\n"
        )
    };
    format!("{more}\n{}", vms.iter().map(vm).collect::<String>())
}

/// Decides everything again.
fn replay(daemon: &Daemon, dir: &Path) {
    let trace = dir.join("state/balloon.trace");
    let again = daemon.ask(&["replay", trace.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success(), "{}\n{text}", String::from_utf8_lossy(&again.stderr));
    println!("{text}");
    assert!(text.contains("squeezed by") && text.contains("relaxed by"), "{text}");
}

/// The host has as much memory less behind a guest as its balloon took, and what the guest lacks is stored.
fn check_memory_is_the_hosts(daemon: &Daemon, guest: &Guest) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (has_bytes, taken_bytes) = (guest.has_bytes(daemon), guest.vm.memory_bytes());
        if taken_bytes <= has_bytes + 8 * MIB {
            println!("it has {} MiB, and takes {} of the host", has_bytes / MIB, taken_bytes / MIB);
            break;
        }
        // The two are of two moments.
        assert!(Instant::now() < deadline, "it has {has_bytes} bytes, and takes {taken_bytes} of the host");
        std::thread::sleep(Duration::from_millis(200));
    }
    let has_mib = guest.has_bytes(daemon) / MIB;
    let vm = daemon.vm(guest.name);
    let count =
        |path: &str| vm.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path}: {vm}"));
    let (stored, pushed_out) = (count("/stored_pages"), count("/stores"));
    // The swap header is the daemon's own.
    assert!(stored <= pushed_out + 1, "{stored} pages are stored, and {pushed_out} were pushed out");
    let lacking_mib = HELD_MIB.saturating_sub(has_mib);
    assert!(stored * 4096 >= (HELD_MIB - HOT_MIB) * MIB * 6 / 10, "{stored} pages are stored");
    assert!(
        stored * 4096 >= lacking_mib * MIB,
        "{stored} pages are stored, and {lacking_mib} MiB are not in the guest"
    );
}

/// What a guest has at a tick, and what it is to have, in MiB.
struct Has {
    actual_mib: u64,
    target_mib: u64,
}

/// At no tick, once they are within it, do the guests together have more than the budget, but for what a look at one
/// after the other may see double, and for the rescue of one that was about to kill: it gets its share at once and no
/// more, while who has more than a share gives it back, and until they are within it again what they are to have together
/// never grows.
fn check_budget_was_kept(dir: &Path) {
    const SLACK_MIB: u64 = 8;
    let trace = BufReader::new(File::open(dir.join("state/balloon.trace")).unwrap());
    let ticks = trace::read(trace).map(Result::unwrap);
    let ticks = ticks.filter_map(|tick| {
        let has = tick.vms.iter().map(|step| match &step.snapshot.vmm {
            Vmm::Answers(memory) => {
                let target_mib = step.decision.target_bytes / MIB;
                Some(Has { actual_mib: memory.actual_bytes / MIB, target_mib })
            }
            Vmm::Silent(_) | Vmm::Gone(_) => None,
        });
        has.collect::<Option<Vec<_>>>()
    });
    let sum = |guests: &[Has]| guests.iter().map(|guest| guest.actual_mib).sum::<u64>();
    let within: Vec<_> = ticks.skip_while(|guests| sum(guests) > BUDGET_MIB).collect();
    let most_mib = within.iter().map(|guests| sum(guests)).max();
    println!("{} ticks within the budget, {most_mib:?} MiB at most", within.len());
    assert!(within.len() > 30, "{} ticks", within.len());
    let keeps_more =
        |guest: &Has| guest.actual_mib > BUDGET_MIB / 2 + SLACK_MIB && guest.target_mib >= guest.actual_mib;
    let mut before_mib = None;
    for (tick, guests) in within.iter().enumerate() {
        if sum(guests) <= BUDGET_MIB + SLACK_MIB {
            before_mib = None;
            continue;
        }
        let words: Vec<_> = guests.iter().map(|guest| (guest.actual_mib, guest.target_mib)).collect();
        assert!(!guests.iter().any(keeps_more), "tick {tick}: had and to have, in MiB: {words:?}");
        let share_at_most = |guest: &Has| guest.target_mib <= BUDGET_MIB / 2 + SLACK_MIB;
        assert!(guests.iter().any(share_at_most), "tick {tick}: nobody was rescued: {words:?}");
        let targets_mib = guests.iter().map(|guest| guest.target_mib).sum::<u64>();
        assert!(before_mib.is_none_or(|before| targets_mib <= before), "tick {tick}: it grows: {words:?}");
        before_mib = Some(targets_mib);
    }
}

#[test]
fn cold_memory_leaves_a_guest_and_what_becomes_hot_is_given_back() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let more = "[balloon]\ninterval = \"1s\"";
    let daemon = Daemon::start(dir.path(), &config(dir.path(), &["web1"], more));
    let mut guest = Guest::boot(&daemon, dir.path(), "web1");
    guest.says("waits for orders");
    let taken_mib = guest.vm.memory_bytes() / MIB;
    assert!(taken_mib >= HELD_MIB, "it takes {taken_mib} MiB of the host, and holds {HELD_MIB}");
    guest.work_on(HOT_MIB);
    guest.says(&format!("hot={HOT_MIB} "));
    println!("before: {}", balloon(&daemon, "web1"));

    // What the guest holds and doesn't work on is cold; three fifths of it are to be out.
    let cold_mib = HELD_MIB - HOT_MIB;
    let wanted_mib = KERNEL_MIB + HELD_MIB - cold_mib * 6 / 10;
    let has_mib = wait_until_it_has(&daemon, &guest, |mib| mib <= wanted_mib);
    let squeezed = balloon(&daemon, "web1");
    println!("{cold_mib} MiB are cold; it took {taken_mib} MiB, and now has {has_mib}: {squeezed}");
    check_memory_is_the_hosts(&daemon, &guest);
    guest.says(&format!("hot={HOT_MIB} "));

    let hot_mib = HELD_MIB - 32;
    guest.work_on(hot_mib);
    wait_until_it_has(&daemon, &guest, |mib| mib > hot_mib);
    guest.says(&format!("hot={hot_mib} "));
    println!("relaxed: {}", balloon(&daemon, "web1"));
    guest.finish();
    replay(&daemon, dir.path());
}

/// Memory flows from the guest that rests to the one that works, and back, within a budget that is less than both need.
#[test]
fn two_guests_that_take_turns_share_a_budget() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let more = format!("[balloon]\ninterval = \"1s\"\nbudget = \"{BUDGET_MIB}MiB\"");
    let daemon = Daemon::start(dir.path(), &config(dir.path(), &["web1", "web2"], &more));
    let mut guests = ["web1", "web2"].map(|name| Guest::boot(&daemon, dir.path(), name));
    for guest in &mut guests {
        guest.says("waits for orders");
        guest.work_on(HOT_MIB);
        guest.says(&format!("hot={HOT_MIB} "));
    }
    let busy_mib = HELD_MIB - 32;
    for turn in [0, 1, 0] {
        guests[1 - turn].work_on(HOT_MIB);
        guests[turn].work_on(busy_mib);
        // All that it works on, and its kernel.
        let has_mib = wait_until_it_has(&daemon, &guests[turn], |mib| mib > busy_mib + KERNEL_MIB / 2);
        guests[turn].says(&format!("hot={busy_mib} "));
        let other_mib = wait_until_it_has(&daemon, &guests[1 - turn], |mib| mib + has_mib <= BUDGET_MIB + 8);
        println!(
            "{} works and has {has_mib} MiB, {} rests and has {other_mib}",
            guests[turn].name,
            guests[1 - turn].name
        );
    }
    guests.iter_mut().for_each(Guest::finish);
    replay(&daemon, dir.path());
    check_budget_was_kept(dir.path());
    if let Some(kept) = std::env::var_os("BALLAST_KEEP_TRACE") {
        std::fs::copy(dir.path().join("state/balloon.trace"), kept).unwrap();
    }
}
