//! A real Linux guest, booted under QEMU, whose swap is a daemon of ours: it works through far more memory than it
//! has and checks every page itself, once in peace and once while the daemon is killed. They need QEMU and the
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

/// Fields end in order: the guest first, the directory last.
struct Host {
    guest: Guest,
    daemon: Daemon,
    _scratch: Scratch,
}

impl Host {
    fn boot(cpus: u32, rounds: u32) -> Self {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build");
        let images = Images::find(&images).unwrap_or_else(|error| panic!("{error}"));
        let qemu = Qemu::find().unwrap_or_else(|error| panic!("{error}"));
        let scratch = Scratch::new("ballast-guest-test").expect("a scratch directory");
        let spec = DaemonSpec {
            executable: PathBuf::from(env!("CARGO_BIN_EXE_ballast")),
            directory: scratch.path().to_owned(),
            vms: vec![VM.to_owned()],
            vm_mib: 512,
            compressor: "lz4".to_owned(),
        };
        let socket = Some(spec.socket(VM));
        let daemon = Daemon::start(spec).unwrap_or_else(|error| panic!("{error}"));
        let parameters = vec![
            ("mib", "300".to_owned()),
            ("rounds", rounds.to_string()),
            ("serial", format!("ballast-{VM}")),
        ];
        let spec = GuestSpec { socket, cpus, parameters, ..GuestSpec::new(VM, images, scratch.path()) };
        let guest = Guest::boot(qemu, &spec).unwrap_or_else(|error| panic!("{error}"));
        Self { guest, daemon, _scratch: scratch }
    }

    /// Waits until the workload has printed that many progress lines; the guest must not end before.
    fn reach(&mut self, steps: usize) {
        let waited = self.guest.wait(PATIENCE, |report| report.steps >= steps);
        waited.unwrap_or_else(|error| panic!("{error}"));
        assert!(!self.guest.ended(), "the guest ended before step {steps}: {:?}", self.guest.verdict());
    }

    /// Waits for the guest's end and checks that it and the daemon are content.
    fn finish(&mut self) {
        // A wait that `done` never ends lasts until QEMU has ended.
        self.guest.wait(PATIENCE, |_| false).unwrap_or_else(|error| panic!("{error}"));
        match self.guest.verdict() {
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
        let vm = status.vm(VM).expect("the VM has a status");
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
