//! A VMM that a test starts with arguments of its own, and what its guest says on a serial console.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ballast::demo::console::{Report, Verdict};

const TICK: Duration = Duration::from_millis(20);

/// A running VM. Dropping it kills it.
pub struct Vm {
    child: Child,
    console: PathBuf,
    log: PathBuf,
}

impl Vm {
    /// Starts the VMM in `command`, whose guest writes to the file that `console` makes an option of.
    pub fn boot(command: Command, directory: &Path, console: impl FnOnce(&str) -> [String; 2]) -> Self {
        Self::boot_with(command, directory, console, &[])
    }

    /// The same, with options that come after the console's: further serial lines are numbered by their order.
    pub fn boot_with(
        mut command: Command,
        directory: &Path,
        console: impl FnOnce(&str) -> [String; 2],
        after: &[String],
    ) -> Self {
        let (file, log) = (directory.join("console"), directory.join("vmm"));
        // What an earlier guest said is not this one's.
        let _ = std::fs::remove_file(&file);
        let output = File::create(&log).expect("a log");
        command.args(console(file.to_str().expect("a path of text"))).args(after).stdin(Stdio::null());
        command.stdout(output.try_clone().expect("a descriptor")).stderr(output);
        let child = command.spawn().expect("the VMM starts");
        Self { child, console: file, log }
    }

    /// Waits until `done` holds, the VM has ended or the time is over; gives what the guest had said by then.
    pub fn wait(&mut self, patience: Duration, done: impl Fn(&Report) -> bool) -> Report {
        let deadline = Instant::now() + patience;
        loop {
            // Looked at in this order: a guest that has ended has said everything.
            let ended = self.child.try_wait().expect("a child").is_some() || Instant::now() > deadline;
            let report = Report::parse(&self.console());
            if ended || done(&report) {
                return report;
            }
            std::thread::sleep(TICK);
        }
    }

    /// Waits for the guest's verdict, which must be good, and gives its counts.
    pub fn pass(&mut self, patience: Duration) -> String {
        match self.wait(patience, |report| report.verdict.is_some()).verdict {
            Some(Verdict::Pass(counts)) => counts,
            other => panic!("no PASS: {other:?}\n{}", self.words()),
        }
    }

    /// Bytes that the host has behind the guest's memory, which is to be a memfd.
    pub fn memory_bytes(&self) -> u64 {
        let files = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).expect("the VMM runs");
        let memfds = files.filter_map(|file| {
            let path = file.ok()?.path();
            let is_memfd = std::fs::read_link(&path).ok()?.to_str()?.starts_with("/memfd:");
            is_memfd.then(|| std::fs::metadata(path).ok()).flatten()
        });
        let by_inode: BTreeMap<u64, u64> = memfds.map(|file| (file.ino(), file.blocks() * 512)).collect();
        by_inode.values().sum()
    }

    /// What the guest has said.
    pub fn console(&self) -> String {
        text(&self.console)
    }

    /// All that the guest and the VMM have said.
    pub fn words(&self) -> String {
        format!("console:\n{}\nVMM:\n{}", self.console(), text(&self.log))
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

/// A file that `images/make-guest` or `images/make-debian-guest` has made.
pub fn image(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/build").join(name);
    assert!(path.exists(), "{} is missing: tests/run makes it", path.display());
    path.to_str().expect("a path of text").to_owned()
}
