//! Debian with its own kernel, udev and systemd, to which nothing was done but to copy `vmm-configs/guest` into it: once
//! with the line of `fstab`, once with the unit, once with both and no disk, and once with nothing but the cloud-config as
//! cloud-init's user data. The guest judges the settings itself
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

/// What this cloud would hand to the guest, which has no network, and of cloud-init's modules those that the user data
/// is for: the others make users, keys and much else that takes its time.
fn cloud_kit() -> Files {
    let user_data = Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs/guest/cloud-config.yaml");
    let mut kit = Files::new();
    kit.put("var/lib/cloud/seed/nocloud/user-data", 0o644, &fs::read(user_data).unwrap());
    kit.put("var/lib/cloud/seed/nocloud/meta-data", 0o644, b"instance-id: kit\n");
    let settings = "datasource_list: [NoCloud]\nnetwork: {config: disabled}\nusers: []\n\
                    cloud_init_modules: [write-files]\ncloud_config_modules: [runcmd]\n\
                    cloud_final_modules: [scripts-user]\n";
    kit.put("etc/cloud/cloud.cfg.d/99-kit.cfg", 0o644, settings.as_bytes());
    kit
}

/// Boots Debian with these files and our disk beside a daemon, which must have had the pages.
fn swaps(files: Files) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(
        dir.path(),
        "[pool]\nmax = \"50%\"\n[[vm]]\nname = \"web1\"\nsize = \"512MiB\"\nqueues = 1\n",
    );
    let counts = debian::boot(dir.path(), files, 256, Some(&daemon.socket("web1")));
    assert!(counts.contains("pages=51200 ") && counts.contains(" bad=0 "), "{counts}");
    let status = daemon.vm("web1");
    assert!(status["stores"].as_u64() > Some(5_000) && status["loads"].as_u64() > Some(0), "{status}");
    assert_eq!(status["errors"], 0, "{}", daemon.log());
}

#[test]
fn debian_with_the_line_of_fstab_swaps_to_the_daemon() {
    swaps(kit(&[BY_FSTAB]));
}

#[test]
fn debian_with_the_unit_swaps_to_the_daemon() {
    swaps(kit(&[BY_UNIT]));
}

#[test]
fn debian_with_the_cloud_config_as_user_data_swaps_to_the_daemon() {
    swaps(cloud_kit());
}

#[test]
fn debian_with_the_kit_boots_without_the_disk() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let counts = debian::boot(dir.path(), kit(&[BY_FSTAB, BY_UNIT]), 256, None);
    assert!(counts.starts_with("without a disk"), "{counts}");
}
