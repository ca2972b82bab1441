//! The client of QEMU against a real one with a booted Linux guest, whose balloon is squeezed and relaxed; then paused, with
//! another client on its monitor, killed and started again. Needs QEMU and the built images and fails without them;
//! `tests/run` provides both. Nothing here asserts a time but the limit of a hang.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ballast::balloon::vmm::qmp::{BALLOON_ARGUMENT, Qmp};
use ballast::balloon::vmm::{GuestMemory, GuestStats, Unreachable, VmmClient};
use support::vm::{Vm, image};

const MIB: u64 = 1 << 20;
/// Some seconds are usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);
const TICK: Duration = Duration::from_millis(100);

/// A QEMU with a monitor at `qmp` and one for the test at `test`.
fn qemu(directory: &Path, arguments: &[&str]) -> Vm {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-accel", "tcg", "-machine", "q35", "-m", "512M"]);
    command.args(["-display", "none"]).args(arguments);
    for name in ["qmp", "test"] {
        let path = directory.join(name);
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())]);
    }
    Vm::boot(command, directory, |file| ["-serial".to_owned(), format!("file:{file}")])
}

/// One with an idle Linux guest that has a balloon.
fn linux(directory: &Path) -> Vm {
    let (kernel, initramfs) = (image("vmlinuz"), image("initramfs"));
    let mut arguments = vec!["-kernel", &kernel, "-initrd", &initramfs];
    arguments.extend(["-append", "console=ttyS0 quiet panic=-1 ballast.idle=1"]);
    arguments.extend(BALLOON_ARGUMENT.split(' '));
    qemu(directory, &arguments)
}

/// What a client sees, again and again and with a clock on which it never has to wait, until that is it.
fn wait<T>(client: &mut Qmp, wanted: impl Fn(&Result<GuestMemory, Unreachable>) -> Option<T>) -> T {
    let mut now = Instant::now();
    let deadline = now + PATIENCE;
    loop {
        now += Duration::from_secs(60);
        let seen = client.look(now);
        if let Some(found) = wanted(&seen) {
            return found;
        }
        assert!(Instant::now() < deadline, "the last that was seen: {seen:?}");
        std::thread::sleep(TICK);
    }
}

/// The guest's statistics once it has so much.
fn stats_at(client: &mut Qmp, actual_bytes: u64, wanted: impl Fn(&GuestStats) -> bool) -> GuestStats {
    wait(client, |seen| {
        let memory = seen.as_ref().ok().filter(|memory| memory.actual_bytes == actual_bytes)?;
        assert_eq!(memory.configured_bytes, 512 * MIB);
        memory.guest.filter(|guest| wanted(guest))
    })
}

/// A client of the test's own, for what Ballast never asks for.
fn order(directory: &Path, command: &str) {
    let mut stream = UnixStream::connect(directory.join("test")).unwrap();
    stream.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
    stream.write_all(format!("{{\"execute\": \"{command}\", \"id\": 1}}\n").as_bytes()).unwrap();
    let answers = BufReader::new(stream).lines();
    let done = answers.map(Result::unwrap).find(|line| line.contains("\"id\": 1"));
    assert!(done.unwrap().contains("return"), "{command}");
}

#[test]
fn a_linux_guest_of_a_real_qemu_is_squeezed_and_relaxed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut vm = linux(dir.path());
    let mut client = Qmp::new(dir.path().join("qmp"));
    let has_driver = |guest: &GuestStats| guest.available_bytes.is_some();
    let before = stats_at(&mut client, 512 * MIB, has_driver);
    println!("before: {before:?}");
    assert!(before.total_bytes > Some(400 * MIB) && before.available_bytes > Some(300 * MIB), "{before:?}");

    client.set_target(300 * MIB, Instant::now() + PATIENCE).unwrap();
    let available_bytes = before.available_bytes.unwrap() - 150 * MIB;
    let squeezed = stats_at(&mut client, 300 * MIB, |guest| guest.available_bytes < Some(available_bytes));
    println!("squeezed: {squeezed:?}");
    client.set_target(512 * MIB, Instant::now() + PATIENCE).unwrap();
    stats_at(&mut client, 512 * MIB, |guest| guest.available_bytes > Some(available_bytes));

    order(dir.path(), "stop");
    wait(&mut client, |seen| {
        (*seen == Err(Unreachable::Paused { state: "paused".to_owned() })).then_some(())
    });
    order(dir.path(), "cont");
    wait(&mut client, |seen| seen.is_ok().then_some(()));
    // A monitor has one client at a time, and that is ours.
    let mut second = Qmp::new(dir.path().join("qmp")).with_time_out(Duration::from_millis(500));
    let late = second.look(Instant::now()).unwrap_err();
    assert!(late.to_string().contains("for one client at a time"), "{late}");

    assert!(vm.console().contains("BALLAST-GUEST idle"), "{}", vm.words());
    assert!(vm.wait(Duration::ZERO, |_| true).verdict.is_none(), "{}", vm.words());
    drop(vm);
    wait(&mut client, |seen| {
        seen.as_ref().is_err_and(|state| state.word() == ballast::balloon::Word::VmmGone).then_some(())
    });
    let _vm = linux(dir.path());
    stats_at(&mut client, 512 * MIB, has_driver);
}

#[test]
fn a_real_qemu_without_a_balloon_says_so_and_one_that_has_not_started_too() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut client = Qmp::new(dir.path().join("qmp"));
    let vm = qemu(dir.path(), &["-S"]);
    wait(&mut client, |seen| {
        (*seen == Err(Unreachable::Paused { state: "prelaunch".to_owned() })).then_some(())
    });
    order(dir.path(), "cont");
    let no_balloon = Unreachable::NoBalloon { add: BALLOON_ARGUMENT.into() };
    wait(&mut client, |seen| (*seen == Err(no_balloon.clone())).then_some(()));
    assert_eq!(client.set_target(MIB, Instant::now() + PATIENCE), Err(no_balloon));
    drop(vm);
}
