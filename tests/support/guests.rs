//! Booted guests on a daemon of their own, which work through more memory than they have and check every page of it.
//! They need QEMU and the built images; `tests/run` provides both.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ballast::demo::console::{Report, Verdict};
use ballast::demo::daemon::{Daemon, DaemonSpec};
use ballast::demo::guest::{Guest, GuestSpec};
use ballast::demo::qemu::{Images, Qemu};
use ballast::demo::scratch::Scratch;

/// Half a minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// The only VM, when there is one.
pub const VM: &str = "guest1";
/// Mebibytes that a guest works through, if nothing else is said.
pub const MIB: u64 = 300;

/// Fields end in order: the guests first, the directory last.
pub struct Guests {
    pub guests: Vec<Guest>,
    pub daemon: Daemon,
    qemu: Qemu,
    /// Mebibytes that each works through.
    mib: u64,
    /// What the first of them was booted with.
    first: GuestSpec,
    scratch: Scratch,
}

/// A test that fails shows what the guests said: where they said it is gone afterwards.
impl Drop for Guests {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.guests.iter().for_each(|guest| eprintln!("{}", guest.last_words()));
        }
    }
}

impl Guests {
    /// Boots one.
    pub fn boot(cpus: u32, rounds: u32) -> Self {
        Self::boot_several(&[VM], cpus, rounds, MIB, |_, _| {})
    }

    /// Boots these guests on one daemon, after `adapt` has had a say about it.
    pub fn boot_several(
        vms: &[&str],
        cpus: u32,
        rounds: u32,
        mib: u64,
        adapt: impl FnOnce(&mut DaemonSpec, &mut GuestSpec),
    ) -> Self {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build");
        let images = Images::find(&images).unwrap_or_else(|error| panic!("{error}"));
        let qemu = Qemu::find().unwrap_or_else(|error| panic!("{error}"));
        let scratch = Scratch::new("ballast-guest-test").expect("a scratch directory");
        let mut spec = DaemonSpec {
            executable: PathBuf::from(env!("CARGO_BIN_EXE_ballast")),
            directory: scratch.path().to_owned(),
            vms: vms.iter().map(|vm| (*vm).to_owned()).collect(),
            vm_keys: String::new(),
            vm_mib: u32::try_from(mib).expect("a small guest") + 212,
            compressor: "lz4".to_owned(),
            pool_max: None,
            file: None,
        };
        let mut guest = GuestSpec { cpus, ..GuestSpec::new(vms[0], images, scratch.path()) };
        adapt(&mut spec, &mut guest);
        let daemon = Daemon::start(spec.clone()).unwrap_or_else(|error| panic!("{error}"));
        let specs = vms.iter().enumerate().map(|(seed, vm)| GuestSpec {
            name: (*vm).to_owned(),
            socket: Some(spec.socket(vm)),
            parameters: vec![
                ("mib", mib.to_string()),
                ("rounds", rounds.to_string()),
                ("seed", (seed + 1).to_string()),
                ("serial", format!("ballast-{vm}")),
            ],
            ..guest.clone()
        });
        let specs: Vec<_> = specs.collect();
        let boot = |guest| Guest::boot(qemu, guest).unwrap_or_else(|error| panic!("{error}"));
        let guests = specs.iter().map(boot).collect();
        Self { guests, daemon, qemu, mib, first: specs[0].clone(), scratch }
    }

    /// Where the guests' files are.
    pub fn path(&self) -> &Path {
        self.scratch.path()
    }

    /// Starts another QEMU with the first guest's hardware, and these arguments instead of its own further ones.
    pub fn boot_twin(&mut self, name: &str, arguments: Vec<OsString>) {
        let twin = GuestSpec { name: name.to_owned(), arguments, ..self.first.clone() };
        self.guests.push(Guest::boot(self.qemu, &twin).unwrap_or_else(|error| panic!("{error}")));
    }

    /// Waits until the last guest's workload has printed that many progress lines; it must not end before.
    pub fn reach(&mut self, steps: usize) {
        self.wait_for(|report| report.steps >= steps);
    }

    /// Waits for something that the last guest says; it must not end before.
    pub fn wait_for(&mut self, said: impl Fn(&Report) -> bool) {
        let guest = self.guests.last_mut().expect("one was booted");
        guest.wait(PATIENCE, said).unwrap_or_else(|error| panic!("{error}"));
        assert!(!guest.ended(), "the guest ended before: {:?}", guest.verdict());
    }

    /// Waits for the guests' ends and checks that they and the daemon are content.
    pub fn finish(&mut self) {
        for n in 0..self.guests.len() {
            let vm = self.guests[n].name().to_owned();
            self.finish_guest(n, &vm);
        }
    }

    /// Waits for one's end, which has this VM.
    pub fn finish_guest(&mut self, n: usize, vm: &str) {
        let guest = &mut self.guests[n];
        // A wait that `done` never ends lasts until QEMU has ended.
        guest.wait(PATIENCE, |_| false).unwrap_or_else(|error| panic!("{error}"));
        match guest.verdict() {
            Verdict::Pass(counts) => {
                assert!(
                    counts.contains(&format!("pages={} ", self.mib * 256)) && counts.contains(" bad=0 "),
                    "{counts}"
                );
                println!("guest: PASS {counts}");
            }
            Verdict::Fail(why) => panic!("the guest failed: {why}\n{}", self.daemon.failed("served it")),
        }
        self.daemon.check().unwrap_or_else(|error| panic!("{error}"));
        let status = self.daemon.status().unwrap_or_else(|error| panic!("{error}"));
        let vm = status.vm(vm).expect("the VM has a status");
        assert!(vm.stores > 0 && vm.loads > 0, "nothing went through the daemon: {vm:?}");
        assert_eq!(vm.errors, 0, "{}", self.daemon.failed("counted failed requests"));
        println!("daemon: {vm:?}");
    }
}
