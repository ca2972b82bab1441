//! Debian with its own kernel, udev and systemd, to which nothing was done but to copy `vmm-configs/guest` into it: once
//! with the line of `fstab`, once with the unit, once with both and no disk. The guest judges the settings itself
//! (`images/judge-kit`), then works through more memory than it has. Needs QEMU and what `images/make-debian-guest`
//! makes; `tests/run` provides both.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use support::daemon::Daemon;
use support::vm::{Vm, image};

/// A minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);

const UNIT: &str = r"dev-disk-by\x2dlabel-ballast.swap";

/// What each variant copies, and where to.
const ALWAYS: [(&str, &str); 2] = [
    ("60-ballast.rules", "etc/udev/rules.d/60-ballast.rules"),
    ("60-ballast.conf", "etc/sysctl.d/60-ballast.conf"),
];
const BY_FSTAB: (&str, &str) = ("fstab", "etc/fstab");
const BY_UNIT: (&str, &str) = (UNIT, r"etc/systemd/system/dev-disk-by\x2dlabel-ballast.swap");
/// What `systemctl enable` links to it.
const WANTS: [&str; 2] = [r"dev-disk-by\x2dlabel-ballast.device.wants", "swap.target.wants"];

/// A file or a directory of an archive as Linux unpacks it (`newc`).
fn entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let name_bytes = name.len() + 1;
    let mut bytes = b"070701".to_vec();
    let numbers = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name_bytes, 0];
    numbers.iter().for_each(|number| bytes.extend(format!("{number:08x}").bytes()));
    bytes.extend(name.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// An archive with these files below `/kit`, which Linux unpacks over the initramfs that it is appended to; with the
/// unit's links if it is among them.
fn kit(files: &[(&str, &str)]) -> Vec<u8> {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs/guest");
    let mut archive = Vec::new();
    let directories = [
        "",
        "/etc",
        "/etc/udev",
        "/etc/udev/rules.d",
        "/etc/sysctl.d",
        "/etc/systemd",
        "/etc/systemd/system",
    ];
    for directory in directories {
        archive.extend(entry(&format!("kit{directory}"), 0o040_755, b""));
    }
    for (from, to) in files {
        archive.extend(entry(&format!("kit/{to}"), 0o100_644, &fs::read(guest.join(from)).unwrap()));
    }
    if files.contains(&BY_UNIT) {
        for wants in WANTS {
            let directory = format!("kit/etc/systemd/system/{wants}");
            archive.extend(entry(&directory, 0o040_755, b""));
            archive.extend(entry(&format!("{directory}/{UNIT}"), 0o120_777, format!("../{UNIT}").as_bytes()));
        }
    }
    archive.extend(entry("TRAILER!!!", 0, b""));
    archive
}

/// Boots Debian with these files of the kit, with our disk if there is a socket, and gives its counts.
fn boot(dir: &Path, files: &[(&str, &str)], socket: Option<&Path>) -> String {
    let initramfs = dir.join("initramfs");
    let mut bytes = fs::read(image("initramfs")).unwrap();
    // Archives begin at multiples of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(kit(&[&ALWAYS, files].concat()));
    fs::write(&initramfs, bytes).unwrap();
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg"]);
    command.args(["-machine", "q35,memory-backend=memory", "-m", "256M", "-smp", "1"]);
    command.args([
        "-object",
        "memory-backend-memfd,id=memory,size=256M,share=on",
        "-kernel",
        &image("vmlinuz"),
    ]);
    command.arg("-initrd").arg(&initramfs).arg("-append").arg(format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 ballast.system=1 ballast.disk={}",
        u8::from(socket.is_some())
    ));
    // The first disk, of which nothing that is written is kept.
    command
        .args(["-drive", &format!("file={},format=raw,if=none,id=system,snapshot=on", image("debian.ext4"))]);
    command.args(["-device", "virtio-blk-pci,drive=system"]);
    if let Some(socket) = socket {
        command.args(["-chardev", &format!("socket,id=swap,path={}", socket.display())]);
        command.args(["-device", "vhost-user-blk-pci,chardev=swap,num-queues=1"]);
    }
    let mut vm = Vm::boot(command, dir, |file| ["-serial".to_owned(), format!("file:{file}")]);
    let counts = vm.pass(PATIENCE);
    println!("{counts}");
    counts
}

/// The same with a daemon, which must have had the pages.
fn swaps(files: &[(&str, &str)]) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(
        dir.path(),
        "[pool]\nmax = \"50%\"\n[[vm]]\nname = \"web1\"\nsize = \"512MiB\"\nqueues = 1\n",
    );
    let counts = boot(dir.path(), files, Some(&daemon.socket("web1")));
    assert!(counts.contains("pages=51200 ") && counts.contains(" bad=0 "), "{counts}");
    let status = daemon.vm("web1");
    assert!(status["stores"].as_u64() > Some(5_000) && status["loads"].as_u64() > Some(0), "{status}");
    assert_eq!(status["errors"], 0, "{}", daemon.log());
}

#[test]
fn debian_with_the_line_of_fstab_swaps_to_the_daemon() {
    swaps(&[BY_FSTAB]);
}

#[test]
fn debian_with_the_unit_swaps_to_the_daemon() {
    swaps(&[BY_UNIT]);
}

#[test]
fn debian_with_the_kit_boots_without_the_disk() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let counts = boot(dir.path(), &[BY_FSTAB, BY_UNIT], None);
    assert!(counts.starts_with("without a disk"), "{counts}");
}
