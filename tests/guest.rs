//! Real Linux guests, booted under QEMU, whose swap is a daemon of ours: they work through far more memory than they
//! have and check every page themselves, in peace, while the daemon is killed, and in a pool that overflows into a
//! file. They need QEMU and the
//! built images and fail without them; `tests/run` provides both. Nothing here asserts a time but the limit of a hang.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ballast::demo::console::Verdict;
use ballast::demo::daemon::{Daemon, DaemonSpec};
use ballast::demo::guest::{Guest, GuestSpec};
use ballast::demo::qemu::{Images, Qemu};
use ballast::demo::scratch::Scratch;

/// Half a minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);

const VM: &str = "guest1";
const PAGES: u64 = 300 * 256;

/// Fields end in order: the guests first, the directory last.
struct Host {
    guests: Vec<Guest>,
    daemon: Daemon,
    _scratch: Scratch,
}

impl Host {
    fn boot(cpus: u32, rounds: u32) -> Self {
        Self::boot_several(&[VM], cpus, rounds, |_| {})
    }

    /// Boots these guests on one daemon, after `adapt` has had a say about it.
    fn boot_several(vms: &[&str], cpus: u32, rounds: u32, adapt: impl FnOnce(&mut DaemonSpec)) -> Self {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build");
        let images = Images::find(&images).unwrap_or_else(|error| panic!("{error}"));
        let qemu = Qemu::find().unwrap_or_else(|error| panic!("{error}"));
        let scratch = Scratch::new("ballast-guest-test").expect("a scratch directory");
        let mut spec = DaemonSpec {
            executable: PathBuf::from(env!("CARGO_BIN_EXE_ballast")),
            directory: scratch.path().to_owned(),
            vms: vms.iter().map(|vm| (*vm).to_owned()).collect(),
            vm_mib: 512,
            compressor: "lz4".to_owned(),
            pool_max: None,
            file: None,
        };
        adapt(&mut spec);
        let daemon = Daemon::start(spec.clone()).unwrap_or_else(|error| panic!("{error}"));
        let boot = |(seed, vm): (usize, &&str)| {
            let parameters = vec![
                ("mib", "300".to_owned()),
                ("rounds", rounds.to_string()),
                ("seed", (seed + 1).to_string()),
                ("serial", format!("ballast-{vm}")),
            ];
            let socket = Some(spec.socket(vm));
            let of = GuestSpec::new(vm, images.clone(), scratch.path());
            let guest = GuestSpec { socket, cpus, parameters, ..of };
            Guest::boot(qemu, &guest).unwrap_or_else(|error| panic!("{error}"))
        };
        let guests = vms.iter().enumerate().map(boot).collect();
        Self { guests, daemon, _scratch: scratch }
    }

    /// Waits until the first guest's workload has printed that many progress lines; it must not end before.
    fn reach(&mut self, steps: usize) {
        let guest = &mut self.guests[0];
        let waited = guest.wait(PATIENCE, |report| report.steps >= steps);
        waited.unwrap_or_else(|error| panic!("{error}"));
        assert!(!guest.ended(), "the guest ended before step {steps}: {:?}", guest.verdict());
    }

    /// Waits for the guests' ends and checks that they and the daemon are content.
    fn finish(&mut self) {
        for n in 0..self.guests.len() {
            self.finish_guest(n);
        }
    }

    fn finish_guest(&mut self, n: usize) {
        let guest = &mut self.guests[n];
        // A wait that `done` never ends lasts until QEMU has ended.
        guest.wait(PATIENCE, |_| false).unwrap_or_else(|error| panic!("{error}"));
        match guest.verdict() {
            Verdict::Pass(counts) => {
                assert!(
                    counts.contains(&format!("pages={PAGES} ")) && counts.contains(" bad=0 "),
                    "{counts}"
                );
                println!("guest: PASS {counts}");
            }
            Verdict::Fail(why) => panic!("the guest failed: {why}\n{}", self.daemon.failed("served it")),
        }
        self.daemon.check().unwrap_or_else(|error| panic!("{error}"));
        let status = self.daemon.status().unwrap_or_else(|error| panic!("{error}"));
        let vm = status.vm(self.guests[n].name()).expect("the VM has a status");
        assert!(vm.stores > 0 && vm.loads > 0, "nothing went through the daemon: {vm:?}");
        assert_eq!(vm.errors, 0, "{}", self.daemon.failed("counted failed requests"));
        println!("daemon: {vm:?}");
    }
}

#[test]
fn a_guest_that_swaps_gets_every_page_back() {
    let mut host = Host::boot(2, 1);
    // Filled: most of its memory is with the daemon now, and not in full.
    host.reach(12);
    let status = host.daemon.status().unwrap_or_else(|error| panic!("{error}"));
    let vm = status.vm(VM).expect("the VM has a status").clone();
    assert!(vm.stored_pages > PAGES / 4, "{vm:?}");
    assert!(vm.same_filled_pages > 0 && vm.pool_bytes > 0, "{vm:?}");
    assert!(vm.pool_bytes < vm.uncompressed_bytes() * 3 / 4, "hardly compressed: {vm:?}");
    host.finish();
}

#[test]
fn a_guest_whose_daemon_is_killed_three_times_gets_every_page_back() {
    let mut host = Host::boot(1, 2);
    // While it fills, while it overwrites, while it checks.
    for steps in [7, 14, 30] {
        host.reach(steps);
        host.daemon.kill_and_restart().unwrap_or_else(|error| panic!("{error}"));
    }
    host.finish();
}

#[test]
fn two_guests_that_overflow_the_pool_get_every_page_back() {
    let files = tempfile::tempdir().expect("a directory on a disk");
    let mut host = Host::boot_several(&["web1", "web2"], 1, 1, |spec| {
        // They store some 400 MiB of compressed pages.
        spec.pool_max = Some("64MiB".to_owned());
        spec.file = Some(files.path().join("writeback"));
    });
    host.finish();
    let status = host.daemon.ask(&["status", "--json"]).unwrap_or_else(|error| panic!("{error}"));
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let counters = &status["pool"]["counters"];
    println!("daemon: {counters} {}", status["shrinker"]);
    assert!(counters["written_back_pages"].as_u64() > Some(10_000), "{status}");
    assert!(counters["loaded_from_file"].as_u64() > Some(1_000), "{status}");
    assert!(status["pool"]["used_bytes"].as_u64() <= Some(64 << 20), "{status}");
}
