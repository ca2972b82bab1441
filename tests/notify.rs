//! What systemd hears of a daemon, by a socket in its place: ready once everybody can connect, a line about what is
//! stored, a word for the watchdog as long as the workers work, and when the configuration is read again.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::daemon::Daemon;

const PATIENCE: Duration = Duration::from_secs(60);
const VM: &str = "[pool]\npressure = false\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";

/// Where systemd would listen.
struct Systemd(UnixDatagram);

impl Systemd {
    /// Starts a daemon that finds it. `status` of a daemon that isn't ready would fail, so who calls has it ready.
    fn start(dir: &Path, watchdog: Option<Duration>) -> (Self, Daemon) {
        let path = dir.join("notify");
        let systemd = Self(UnixDatagram::bind(&path).unwrap());
        systemd.0.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut daemon = Daemon::start(dir, VM);
        let usec = watchdog.map(|within| within.as_micros().to_string());
        let mut environment = vec![("NOTIFY_SOCKET", path.to_str().unwrap())];
        environment.extend(usec.as_deref().map(|usec| ("WATCHDOG_USEC", usec)));
        daemon.restart_with(&environment);
        (systemd, daemon)
    }

    fn next(&self) -> String {
        let mut buffer = [0; 4096];
        let length = self.0.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..length].to_vec()).unwrap()
    }

    /// Reads until it is told this.
    fn await_word(&self, word: &str) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let told = self.next();
            if told.lines().any(|line| line.starts_with(word)) {
                return told;
            }
            assert!(Instant::now() < end, "systemd isn't told {word}");
        }
    }
}

#[test]
fn systemd_is_told_that_the_daemon_is_ready_when_everybody_can_connect() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (systemd, daemon) = Systemd::start(dir.path(), None);
    assert_eq!(systemd.next(), "STATUS=looking at the page tables\n");
    assert_eq!(systemd.next(), "STATUS=looking at the page tables: 0 %\n");
    assert_eq!(systemd.next(), "STATUS=looking at the page tables: 100 %\n");
    let ready = systemd.next();
    assert!(ready.contains("READY=1\n"), "{ready}");
    assert!(ready.contains("STATUS=0 of 1 VMs connected, 4KiB stored in "), "{ready}");
    for socket in ["web1", "control"] {
        UnixStream::connect(daemon.socket(socket)).unwrap();
    }
}

#[test]
fn a_reload_is_told_from_its_beginning_to_its_end() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (systemd, daemon) = Systemd::start(dir.path(), None);
    systemd.await_word("READY=1");
    kill(Pid::from_raw(daemon.pid().unwrap().try_into().unwrap()), Signal::SIGHUP).unwrap();
    let reloading = systemd.await_word("RELOADING=1");
    assert!(reloading.contains("MONOTONIC_USEC="), "{reloading}");
    systemd.await_word("READY=1");
}

#[test]
fn a_configuration_that_is_refused_is_told_until_one_is_gone_by() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (systemd, daemon) = Systemd::start(dir.path(), None);
    systemd.await_word("READY=1");
    let hang_up = |config: &str| {
        daemon.configure(config);
        kill(Pid::from_raw(daemon.pid().unwrap().try_into().unwrap()), Signal::SIGHUP).unwrap();
        systemd.await_word("RELOADING=1");
        systemd.await_word("READY=1")
    };
    let config = daemon.config().display().to_string();
    for (wrong, why) in [
        ("workers = 99\n", "workers = 99: must be a whole number from 1 to 64"),
        ("wrokers = 1\n", "did you mean `workers`?"),
    ] {
        let told = hang_up(&format!("{wrong}{VM}"));
        let line = told.lines().find(|line| line.starts_with("STATUS=")).unwrap();
        for part in ["4KiB stored in", "; reload: nothing was changed", &config, why] {
            assert!(line.contains(part), "{line}");
        }
    }
    let told = hang_up(VM);
    assert!(told.contains("STATUS=0 of 1 VMs connected") && !told.contains("reload"), "{told}");
}

#[test]
fn a_worker_that_hangs_leaves_the_watchdog_without_a_word() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (systemd, daemon) = Systemd::start(dir.path(), Some(Duration::from_millis(200)));
    systemd.await_word("READY=1");
    for _ in 0..3 {
        systemd.await_word("WATCHDOG=1");
    }
    let worker = fs::read_dir(format!("/proc/{}/task", daemon.pid().unwrap()))
        .unwrap()
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).unwrap().starts_with("worker-"))
        .unwrap();
    let worker = Pid::from_raw(worker.file_name().unwrap().to_str().unwrap().parse().unwrap());
    ptrace::seize(worker, ptrace::Options::empty()).unwrap();
    ptrace::interrupt(worker).unwrap();
    nix::sys::wait::waitpid(worker, Some(nix::sys::wait::WaitPidFlag::__WALL)).unwrap();
    // What was said before it was held may still come; then there is silence, however long one waits.
    systemd.0.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let mut words = 0;
    while systemd.0.recv(&mut [0; 4096]).is_ok() {
        words += 1;
        assert!(words < 4, "the watchdog is told that all is well while a worker hangs");
    }
    ptrace::detach(worker, None).unwrap();
    systemd.0.set_read_timeout(Some(PATIENCE)).unwrap();
    systemd.await_word("WATCHDOG=1");
}
