//! The daemon as a user who is not root and has no capability: what it takes is directories of that user's.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::chown;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options, Queue};
use support::page_of;

const NOBODY: u32 = 65534;
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon of that user's, which ends with this.
struct Daemon(Child);

impl Daemon {
    fn start(dir: &Path) -> Self {
        let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
        let mut command = Command::new("setpriv");
        command.args([format!("--reuid={NOBODY}"), format!("--regid={NOBODY}")]);
        command.args([
            "--clear-groups",
            "--inh-caps=-all",
            env!("CARGO_BIN_EXE_ballast"),
            "serve",
            "--config",
        ]);
        command.arg(dir.join("ballast.toml")).stdin(Stdio::null()).stderr(log);
        Self(command.spawn().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn attach(dir: &Path, daemon: &mut Daemon) -> (Device, Queue) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let connected = Device::connect(dir.join("run/web1.sock"), memory, Options::default());
        match connected.and_then(|mut device| device.start().map(|mut queues| (device, queues.remove(0)))) {
            Ok(attached) => return attached,
            Err(err) => {
                let log = fs::read_to_string(dir.join("log")).unwrap();
                let ended = daemon.0.try_wait().unwrap();
                assert!(ended.is_none() && Instant::now() < deadline, "{err}, {ended:?}:\n{log}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

#[test]
fn a_user_who_owns_the_directories_can_run_the_daemon() {
    assert!(rustix::process::geteuid().is_root(), "only root can be somebody else: run the tests as root");
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    chown(dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let at = |name: &str| dir.path().join(name);
    let config = format!(
        "state_dir = {:?}\nruntime_dir = {:?}\n[pool]\nmax = \"1MiB\"\n[writeback]\npath = {:?}\nsize = \"64MiB\"\n\
         [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n",
        at("state"),
        at("run"),
        at("writeback")
    );
    fs::write(at("ballast.toml"), config).unwrap();
    let pages: Vec<_> = (0..600).map(|n| page_of(4, n)).collect();
    let mut daemon = Daemon::start(dir.path());
    {
        let (_device, mut queue) = attach(dir.path(), &mut daemon);
        for (slot, pages) in (1..).step_by(30).zip(pages.chunks(30)) {
            queue.write_pages(slot, pages).unwrap();
        }
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.0.id())).unwrap();
        assert!(status.contains(&format!("Uid:\t{NOBODY}\t{NOBODY}\t{NOBODY}\t{NOBODY}")), "{status}");
    }
    // From memory and from the file, and by the next one as well.
    for _ in 0..2 {
        let (_device, mut queue) = attach(dir.path(), &mut daemon);
        for (slot, page) in (1..).zip(&pages) {
            assert!(queue.read_page(slot).unwrap() == *page, "slot {slot}");
        }
        drop(daemon);
        daemon = Daemon::start(dir.path());
    }
}
