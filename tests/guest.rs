//! Real Linux guests, booted under QEMU, whose swap is a daemon of ours: they work through far more memory than they
//! have and check every page themselves, in peace, while the daemon is killed, and in a pool that overflows into a
//! file. They need QEMU and the built images and fail without them; `tests/run` provides both. Nothing here asserts a time but the limit of a hang.

mod support;

use support::guests::{Guests, MIB, VM};

#[test]
fn a_guest_that_swaps_gets_every_page_back() {
    let mut host = Guests::boot(2, 1);
    // Filled: most of its memory is with the daemon now, and not in full.
    host.reach(12);
    let status = host.daemon.status().unwrap_or_else(|error| panic!("{error}"));
    let vm = status.vm(VM).expect("the VM has a status").clone();
    assert!(vm.stored_pages > MIB * 256 / 4, "{vm:?}");
    assert!(vm.same_filled_pages > 0 && vm.pool_bytes > 0, "{vm:?}");
    assert!(vm.pool_bytes < vm.uncompressed_bytes() * 3 / 4, "hardly compressed: {vm:?}");
    host.finish();
}

#[test]
fn a_guest_whose_daemon_is_killed_three_times_gets_every_page_back() {
    let mut host = Guests::boot(1, 2);
    // While it fills, while it overwrites, while it checks.
    for steps in [7, 14, 30] {
        host.reach(steps);
        host.daemon.kill_and_restart().unwrap_or_else(|error| panic!("{error}"));
    }
    host.finish();
}

/// How long a guest waits for a page while the daemon is killed and another started. In the long form, for which
/// `BALLAST_PAUSES` says how many, with more than a gibibyte stored.
#[test]
fn a_guest_waits_a_moment_while_the_daemon_is_restarted() {
    let kills = std::env::var("BALLAST_PAUSES").map(|text| text.parse::<usize>().expect("a number"));
    let mib = if kills.is_ok() { 1300 } else { MIB };
    let mut host = Guests::boot_several(&[VM], 1, 1, mib, |_, _| {});
    // It checks what it has, a page after the other.
    host.reach(21);
    let mut pauses_ms: Vec<u64> = Vec::new();
    for _ in 0..kills.unwrap_or(2) {
        let before = host.guests[0].report().pauses_ms.len();
        host.daemon.kill_and_restart().unwrap_or_else(|error| panic!("{error}"));
        host.wait_for(|report| report.pauses_ms.len() > before);
        pauses_ms.extend(host.guests[0].report().pauses_ms[before..].iter().max());
    }
    pauses_ms.sort_unstable();
    let stored = host.daemon.status().unwrap_or_else(|error| panic!("{error}")).vm(VM).unwrap().stored_pages;
    println!("{stored} pages stored; pauses in ms: {pauses_ms:?}");
    host.finish();
}

#[test]
fn two_guests_that_overflow_the_pool_get_every_page_back() {
    let files = tempfile::tempdir().expect("a directory on a disk");
    let mut host = Guests::boot_several(&["web1", "web2"], 1, 1, MIB, |spec, _| {
        // They store some 400 MiB of compressed pages.
        spec.pool_max = Some("64MiB".to_owned());
        spec.file = Some(files.path().join("writeback"));
    });
    host.finish();
    let status = host.daemon.ask(&["status", "--json"]).unwrap_or_else(|error| panic!("{error}"));
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    let counters = &status["pool"]["counters"];
    println!("daemon: {counters} {}", status["shrinker"]);
    assert!(counters["written_back_pages"].as_u64() > Some(10_000), "{status}");
    assert!(counters["loaded_from_file"].as_u64() > Some(1_000), "{status}");
    assert!(status["pool"]["used_bytes"].as_u64() <= Some(64 << 20), "{status}");
}
