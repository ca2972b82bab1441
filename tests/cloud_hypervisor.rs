//! A real cloud-hypervisor, where one is on PATH, with the arguments that `ballast vm args` prints: its Linux guest
//! works through far more memory than it has and checks every page itself. Where there is none, or its KVM boots no
//! Linux, the test says so on stderr and is passed over: the program is in no Debian, so `tests/run` can't provide it.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ballast::demo::console::{Report, Verdict};
use support::daemon::Daemon;

const PROGRAM: &str = "cloud-hypervisor";
/// Where KVM boots Linux it takes a second or two; where it doesn't, it never ends.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);
/// Half a minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);
const TICK: Duration = Duration::from_millis(100);

const CONFIG: &str = "[pool]\nmax = \"50%\"\n[[vm]]\nname = \"web1\"\nsize = \"512MiB\"\nqueues = 1\n";
const PAGES: u64 = 300 * 256;

/// A running VM. Dropping it kills it.
struct Vm {
    child: Child,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Boots our guest with these arguments for the memory and the disk, and these `ballast.KEY=VALUE`.
    fn boot(program: &Path, directory: &Path, arguments: &[String], parameters: &str) -> Self {
        let image = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build").join(name);
        assert!(image("initramfs").exists(), "images/build is missing: `images/make-guest` makes it");
        let (console, log) = (directory.join("console"), directory.join("vmm"));
        // What an earlier guest said is not this one's.
        let _ = std::fs::remove_file(&console);
        let output = File::create(&log).unwrap();
        let child = Command::new(program)
            .args(arguments)
            .arg("--kernel")
            .arg(image("vmlinuz"))
            .arg("--initramfs")
            .arg(image("initramfs"))
            .args(["--cmdline", &format!("console=ttyS0 quiet loglevel=4 panic=-1 {parameters}")])
            .arg("--serial")
            .arg(format!("file={}", console.display()))
            .args(["--console", "off"])
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Self { child, console, log }
    }

    /// Waits until `done` holds, the VM has ended or the time is over; gives what the guest had said by then.
    fn wait(&mut self, patience: Duration, done: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + patience;
        loop {
            // Looked at in this order: a guest that has ended has said everything.
            let ended = self.child.try_wait().unwrap().is_some() || Instant::now() > deadline;
            let report = Report::parse(&text(&self.console));
            if ended || done(&report) {
                return report;
            }
            std::thread::sleep(TICK);
        }
    }

    /// All that the guest and the VMM have said.
    fn words(&self) -> String {
        format!("console:\n{}\n{PROGRAM}:\n{}", text(&self.console), text(&self.log))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(path: &Path) -> String {
    String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(PROGRAM)).find(|program| program.is_file())
}

/// Past the test harness, which keeps what a passed test prints to itself.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What `ballast vm args` prints for the VM.
fn arguments(daemon: &Daemon) -> Vec<String> {
    let command = ["vm", "args", "web1", "--vmm", PROGRAM, "--memory", "128MiB", "--json"];
    let output = daemon.ask(&command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(json["args"].take()).unwrap()
}

#[test]
fn a_guest_of_a_real_cloud_hypervisor_gets_every_page_back() {
    let Some(program) = program() else {
        say(&format!("skipped: there is no {PROGRAM} on PATH"));
        return;
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let memory_alone = ["--memory", "size=128M", "--cpus", "boot=1"].map(str::to_owned);
    let mut probe = Vm::boot(&program, dir.path(), &memory_alone, "ballast.probe=1");
    if !probe.wait(BOOT_PATIENCE, |report| report.booted).booted {
        say(&format!("skipped: {PROGRAM} boots no Linux here, with or without us\n{}", probe.words()));
        return;
    }
    drop(probe);
    let daemon = Daemon::start(dir.path(), CONFIG);
    let parameters = "ballast.mib=300 ballast.rounds=1 ballast.serial=ballast-web1";
    let mut vm = Vm::boot(&program, dir.path(), &arguments(&daemon), parameters);
    let report = vm.wait(PATIENCE, |report| report.verdict.is_some());
    let Some(Verdict::Pass(counts)) = report.verdict else {
        panic!("no PASS: {:?}\n{}\ndaemon:\n{}", report.verdict, vm.words(), daemon.log());
    };
    assert!(counts.contains(&format!("pages={PAGES} ")) && counts.contains(" bad=0 "), "{counts}");
    let status = daemon.vm("web1");
    assert!(status["stores"].as_u64() > Some(0) && status["loads"].as_u64() > Some(0), "{status}");
    assert_eq!(status["errors"], 0, "{}", daemon.log());
}
