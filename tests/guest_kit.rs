//! Debian with its own kernel, udev and systemd, to which nothing was done but to copy `vmm-configs/guest` into it: once
//! with the line of `fstab`, once with the unit, once with both and no disk. The guest judges the settings itself
//! (`images/judge-kit`), then works through more memory than it has. Needs QEMU and what `images/make-debian-guest`
//! makes; `tests/run` provides both.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::Path;

use support::daemon::Daemon;
use support::debian::{self, Files};

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

/// These files of the kit, with the unit's links if it is among them.
fn kit(files: &[(&str, &str)]) -> Files {
    let guest = Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs/guest");
    let mut kit = Files::new();
    for (from, to) in ALWAYS.iter().chain(files) {
        kit.put(to, 0o644, &fs::read(guest.join(from)).unwrap());
    }
    if files.contains(&BY_UNIT) {
        for wants in WANTS {
            kit.link(&format!("etc/systemd/system/{wants}/{UNIT}"), &format!("../{UNIT}"));
        }
    }
    kit
}

/// Boots Debian with these files of the kit, with our disk if there is a socket, and gives its counts.
fn boot(dir: &Path, files: &[(&str, &str)], socket: Option<&Path>) -> String {
    debian::boot(dir, kit(files), 256, socket)
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
