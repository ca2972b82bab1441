//! The thread with files that the test writes, and with the PSI of this host where it has one.

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};

use super::*;

/// Far more than a look takes, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(20);

struct Fake {
    dir: tempfile::TempDir,
    files: Files,
}

/// A host without PSI that has this much memory available, of 1000 kB.
fn fake(available_kib: u32) -> Fake {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let files = Files { host_psi: path("psi"), cgroup_psi: None, meminfo: path("meminfo") };
    let fake = Fake { files, dir };
    fake.set_available(available_kib);
    fake
}

impl Fake {
    fn set_available(&self, kib: u32) {
        // By rename, so that the thread never reads half a file.
        let new = self.dir.path().join("new");
        fs::write(&new, format!("MemTotal: 1000 kB\nMemAvailable: {kib} kB\n")).unwrap();
        fs::rename(new, &self.files.meminfo).unwrap();
    }

    /// A fake PSI: a pipe, of which the test holds the other end.
    fn pipe(&self, name: &str) -> (PathBuf, fs::File) {
        let path = self.dir.path().join(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let reader = fs::OpenOptions::new().read(true).custom_flags(flags).open(&path).unwrap();
        (path, reader)
    }
}

fn start(files: &Files) -> (Monitor, Receiver<Pressure>) {
    let (sender, receiver) = channel();
    let monitor = Monitor::start(files.clone(), move |pressure| {
        let _ = sender.send(pressure);
    });
    (monitor.unwrap(), receiver)
}

fn text(reader: &mut fs::File) -> String {
    let mut bytes = [0; 256];
    let length = reader.read(&mut bytes).unwrap();
    String::from_utf8(bytes[..length].to_vec()).unwrap()
}

#[test]
fn without_psi_the_available_memory_is_looked_at() {
    let fake = fake(80);
    let (monitor, told) = start(&fake.files);
    assert_eq!(monitor.source(), PressureSource::MemAvailable);
    let of_level = |level| Pressure { origin: Origin::MemAvailable, level };
    assert_eq!(told.recv_timeout(PATIENCE), Ok(of_level(Level::Moderate)));
    fake.set_available(20);
    let severe = std::iter::repeat_with(|| told.recv_timeout(PATIENCE).unwrap());
    assert!(severe.take(10).any(|pressure| pressure == of_level(Level::Severe)), "told while it lasts");
}

#[test]
fn enough_memory_and_unreadable_numbers_are_no_pressure() {
    let fake = fake(900);
    let (monitor, told) = start(&fake.files);
    std::thread::sleep(PERIOD / 10);
    fs::write(&fake.files.meminfo, "MemTotal: 1000 kB\nMemAvailable: \u{fffd}").unwrap();
    std::thread::sleep(PERIOD);
    fs::remove_file(&fake.files.meminfo).unwrap();
    drop(monitor);
    assert!(told.recv().is_err(), "nothing was told, and the callback is gone");
}

#[test]
fn a_stop_waits_for_no_look() {
    let (monitor, _told) = start(&fake(900).files);
    std::thread::sleep(PERIOD / 10);
    let before = Instant::now();
    drop(monitor);
    assert!(before.elapsed() < PERIOD / 2);
}

#[test]
fn each_psi_is_asked_for_both_levels_and_an_ended_one_is_done_without() {
    let mut fake = fake(20);
    let (host_path, mut host) = fake.pipe("host");
    let (cgroup_path, mut cgroup) = fake.pipe("cgroup");
    fake.files = Files { host_psi: host_path, cgroup_psi: Some(cgroup_path), ..fake.files };
    let (monitor, told) = start(&fake.files);
    assert_eq!(monitor.source(), PressureSource::Psi { cgroup: true });
    for reader in [&mut host, &mut cgroup] {
        assert_eq!(text(reader), "some 150000 1000000\nfull 100000 1000000\n");
    }
    // A pipe without a reader says what a removed cgroup does.
    drop(cgroup);
    let deadline = Instant::now() + PATIENCE;
    while monitor.source() != (PressureSource::Psi { cgroup: false }) {
        assert!(Instant::now() < deadline, "the cgroup's end isn't noticed");
        std::thread::sleep(PERIOD / 100);
    }
    assert!(told.try_recv().is_err(), "with PSI the available memory isn't looked at");
    drop(host);
    let expected = Pressure { origin: Origin::MemAvailable, level: Level::Severe };
    assert_eq!(told.recv_timeout(PATIENCE), Ok(expected));
    assert_eq!(monitor.source(), PressureSource::MemAvailable);
}

#[test]
fn a_cgroup_without_psi_leaves_the_hosts() {
    let mut fake = fake(900);
    let (host_psi, _reader) = fake.pipe("host");
    fake.files = Files { host_psi, cgroup_psi: Some(fake.dir.path().join("none")), ..fake.files };
    assert_eq!(start(&fake.files).0.source(), PressureSource::Psi { cgroup: false });
}

#[test]
fn triggers_can_be_set_where_this_host_lets_us() {
    let files = Files { cgroup_psi: None, ..Files::of_this_host() };
    // Missing without PSI in the kernel, closed to the unprivileged before Linux 6.5.
    let open = fs::OpenOptions::new().write(true).open(Path::new(&files.host_psi)).is_ok();
    let (monitor, _told) = start(&files);
    let expected = if open { PressureSource::Psi { cgroup: false } } else { PressureSource::MemAvailable };
    assert_eq!(monitor.source(), expected);
    if !open {
        println!("{} can't be opened here: only the fallback was tried", files.host_psi.display());
    }
}

#[test]
fn sources_have_the_words_that_status_shows() {
    let words = [
        (PressureSource::Psi { cgroup: false }, "psi"),
        (PressureSource::Psi { cgroup: true }, "psi+cgroup"),
        (PressureSource::MemAvailable, "meminfo"),
    ];
    for (source, word) in words {
        assert_eq!(source.to_string(), word);
    }
}
