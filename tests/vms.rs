//! VMs that are added, changed and removed while the real daemon runs: what is refused and with which words, what the
//! next daemon knows of it, and that nobody else notices.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Output;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ballast::page::Page;
use serde_json::Value;
use support::daemon::Daemon;
use support::page_of;

const CONFIG: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\npressure = false\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\nweight = 5\n";

fn tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn pages() -> Vec<Page> {
    (0..60).map(|n| page_of(n, u64::from(n) + 1)).collect()
}

/// What a command that must go well prints.
fn told(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn ok(daemon: &Daemon, args: &[&str]) -> String {
    told(&daemon.ask(args))
}

/// What a command that must be refused says.
fn refused(daemon: &Daemon, args: &[&str]) -> String {
    let output = daemon.ask(args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stderr).unwrap()
}

/// The value of a VM's key and where it comes from.
fn setting(daemon: &Daemon, vm: &str, key: &str) -> (String, String) {
    let details: Value = serde_json::from_str(&ok(daemon, &["vm", "show", vm, "--json"])).unwrap();
    let settings = details["settings"].as_array().unwrap();
    let found = settings.iter().find(|setting| setting["key"] == key).unwrap();
    let value = found["value"].as_str().map_or_else(|| found["value"].to_string(), str::to_owned);
    (value, found["source"].as_str().unwrap().to_owned())
}

fn pair(value: &str, source: &str) -> (String, String) {
    (value.to_owned(), source.to_owned())
}

fn wait_until_disconnected(daemon: &Daemon, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.vm(name)["connected"] != false {
        assert!(Instant::now() < deadline, "{name} is still connected");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_added_vm_outlives_the_daemon_with_its_pages_until_it_is_removed_by_force() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let said = ok(&daemon, &["vm", "add", "db", "--size", "16MiB", "--label", "swap", "--queues", "2"]);
    assert!(said.starts_with("db: a disk of 16MiB at /") && said.ends_with("/run/db.sock\n"), "{said}");
    let socket = fs::metadata(daemon.socket("db")).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o660);
    let (device, mut queue) = daemon.attach("db");
    assert_eq!(&queue.read_page(0).unwrap()[1052..1056], b"swap");
    queue.write_pages(10, &pages()).unwrap();
    ok(&daemon, &["vm", "set", "db", "--weight", "7", "--limit", "8MiB"]);
    let said = refused(&daemon, &["vm", "remove", "db"]);
    assert!(
        said.contains("a VMM is connected to the VM \"db\": power it off first, or hang up on it"),
        "{said}"
    );
    drop((device, queue));

    daemon.restart();
    assert_eq!(daemon.vm("db")["state"], "ready");
    let (device, mut queue) = daemon.attach("db");
    assert!(queue.read_pages(10, 60).unwrap() == pages());
    let shown = ["weight", "limit", "reserve", "size", "queues"].map(|key| setting(&daemon, "db", key));
    let remembered = |value| pair(value, "remembered");
    let expected =
        [remembered("7"), remembered("8MiB"), pair("0B", "default"), remembered("16MiB"), remembered("2")];
    assert_eq!(shown, expected);
    drop((device, queue));
    wait_until_disconnected(&daemon, "db");
    let said = refused(&daemon, &["vm", "remove", "db"]);
    assert!(said.contains("holds 60 pages that its guest may still want: drop them with --force"), "{said}");
    assert_eq!(daemon.vm("db")["stored_pages"], 61, "a refusal drops nothing");

    // Also one that is connected: its VMM is hung up on.
    let (device, _queue) = daemon.attach("db");
    assert_eq!(ok(&daemon, &["vm", "remove", "db", "--force"]), "db: removed; 60 pages were dropped\n");
    drop(device);
    assert!(!daemon.socket("db").exists() && !daemon.table("db").exists());
    assert!(daemon.vm("db").is_null());
    daemon.restart();
    assert!(daemon.vm("db").is_null() && !daemon.socket("db").exists());
    // Another of that name has nothing of it.
    ok(&daemon, &["vm", "add", "db", "--size", "16MiB"]);
    let (_device, mut queue) = daemon.attach("db");
    assert!(queue.read_page(10).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(setting(&daemon, "db", "weight"), pair("100", "default"));
}

#[test]
fn what_is_for_now_is_forgotten_and_what_is_remembered_lies_over_the_file() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    ok(&daemon, &["vm", "add", "tmp", "--size", "16MiB", "--runtime"]);
    daemon.attach("tmp").1.write_pages(10, &pages()).unwrap();
    ok(&daemon, &["vm", "set", "web1", "--limit", "3MiB"]);
    ok(&daemon, &["vm", "set", "web1", "--weight", "9", "--runtime"]);
    ok(&daemon, &["pool", "set", "--compressor", "zstd:3"]);
    assert_eq!(setting(&daemon, "web1", "weight"), pair("9", "runtime"));
    assert_eq!(setting(&daemon, "web1", "limit"), pair("3MiB", "remembered"));
    assert_eq!(setting(&daemon, "tmp", "size"), pair("16MiB", "runtime"));

    daemon.restart();
    assert_eq!(setting(&daemon, "web1", "weight"), pair("5", "file"));
    assert_eq!(setting(&daemon, "web1", "limit"), pair("3MiB", "remembered"));
    assert_eq!(daemon.status()["pool"]["compressor"], "zstd:3");
    assert_eq!(daemon.vm("tmp")["state"], "unconfigured", "its pages are kept");
    // Only the keys that were changed are: others are still the file's.
    daemon.configure(&CONFIG.replace("weight = 5", "weight = 6\nlimit = \"2MiB\""));
    daemon.restart();
    assert_eq!(daemon.vm("web1")["weight"], 6);
    assert_eq!(daemon.vm("web1")["limit_bytes"], 3 << 20);

    // Added again, it has its pages.
    let said = refused(&daemon, &["vm", "add", "tmp", "--size", "8MiB"]);
    assert!(said.contains("with a disk of 16MiB instead of 8MiB"), "{said}");
    assert!(!daemon.socket("tmp").exists(), "nothing is left of what was refused");
    ok(&daemon, &["vm", "add", "tmp", "--size", "16MiB"]);
    assert!(daemon.attach("tmp").1.read_pages(10, 60).unwrap() == pages());
    ok(&daemon, &["vm", "set", "web1", "--forget"]);
    ok(&daemon, &["pool", "set", "--forget"]);
    assert_eq!(setting(&daemon, "web1", "limit"), pair("2MiB", "file"));
    assert_eq!(daemon.status()["pool"]["compressor"], "lz4");
    daemon.restart();
    assert_eq!(setting(&daemon, "web1", "limit"), pair("2MiB", "file"));
}

#[test]
fn a_vm_of_the_configuration_is_removed_only_for_now() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let said = refused(&daemon, &["vm", "remove", "web1", "--force"]);
    assert!(said.contains("stands in the configuration, and would be back with the next start"), "{said}");
    let said = ok(&daemon, &["vm", "remove", "web1", "--runtime"]);
    assert!(said.ends_with("it is back, empty, when the daemon starts again\n"), "{said}");
    assert!(daemon.vm("web1").is_null());
    let said = refused(&daemon, &["vm", "add", "web1", "--size", "16MiB"]);
    assert!(said.contains("`ballast reload` brings it back"), "{said}");
    ok(&daemon, &["reload"]);
    assert_eq!(daemon.vm("web1")["state"], "ready");
    ok(&daemon, &["vm", "remove", "web1", "--runtime"]);
    daemon.restart();
    assert_eq!(daemon.vm("web1")["state"], "ready");
    daemon.attach("web1").1.write_pages(10, &pages()).unwrap();
}

#[test]
fn what_was_removed_for_now_can_be_forgotten_as_well() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    ok(&daemon, &["vm", "add", "db", "--size", "16MiB"]);
    let said = ok(&daemon, &["vm", "remove", "db", "--runtime"]);
    assert!(said.ends_with("it is back, empty, when the daemon starts again\n"), "{said}");
    ok(&daemon, &["vm", "remove", "db"]);
    let said = refused(&daemon, &["vm", "remove", "db"]);
    assert!(said.contains("there is no VM \"db\""), "{said}");
    daemon.restart();
    assert!(daemon.vm("db").is_null());
}

#[test]
fn a_connected_vm_is_cleared_by_force_alone() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), CONFIG);
    let (_device, mut queue) = daemon.attach("web1");
    queue.write_pages(10, &pages()).unwrap();
    assert!(refused(&daemon, &["vm", "clear", "web1"]).contains("--force"));
    ok(&daemon, &["vm", "clear", "web1", "--force"]);
    assert_eq!(daemon.vm("web1")["stored_pages"], 1, "the swap header is left");
    daemon.attach("web1").1.write_pages(10, &pages()).unwrap();
}

/// The arguments behind `vm add`, and the whole message; `STATE` stands for the daemon's directory.
const REFUSED: &[(&[&str], &str)] = &[
    (
        &["web1", "--size", "1GiB"],
        "there is a VM \"web1\" already: change it with `ballast vm set web1`, or remove it first",
    ),
    (
        &["../etc", "--size", "1GiB"],
        "name = \"../etc\": must be 1 to 64 letters (A-Z, a-z), digits, dots, underscores and dashes, the first a letter or a digit",
    ),
    (
        &["control", "--size", "1GiB"],
        "name = \"control\": must be another name: control.sock is the daemon's own socket",
    ),
    (
        &["db", "--size", "9TiB"],
        "the VM \"db\": size = \"9TiB\": must be a size from 1MiB to 8TiB with its unit, for example \"512MiB\", and a multiple of 4KiB",
    ),
    (
        &["db", "--size", "1MiB", "--limit", "2MiB", "--reserve", "3MiB"],
        "the VM \"db\": reserve = \"3MiB\": must be a size from 0B to the VM's limit (2MiB)",
    ),
    (
        &["db", "--size", "1GiB", "--reserve", "60MiB"],
        "sum of reserve over all [[vm]] = \"60MiB\": must be at most nine tenths of pool.max (57.59MiB)",
    ),
    (
        &["db", "--size", "1GiB", "--queues", "65"],
        "the VM \"db\": queues = 65: must be a whole number from 1 to 64",
    ),
    (
        &["db", "--size", "1GiB", "--label", "12345678901234567"],
        "the VM \"db\": label = \"12345678901234567\": must be a text of 1 to 16 bytes without control characters",
    ),
    (
        &["db", "--size", "1GiB", "--uuid", "zz"],
        "the VM \"db\": uuid = \"zz\": must be a UUID such as \"6d1b4a52-93c7-4c0e-8f0a-2b7d5c1e9a34\"",
    ),
    (
        &["db", "--size", "1GiB", "--clear-after", "1m"],
        "the VM \"db\": clear_after = \"1m\": must be a duration from 1h to 3650d, a whole number and s, m, h or d, for example \"2h\"",
    ),
    (
        &["db", "--size", "1GiB", "--squeeze", "vmm=vhost-user,min=1MiB"],
        "the VM \"db\": squeeze.min = \"1MiB\": must be a size from 64MiB to 16TiB with its unit, for example \"512MiB\", and a multiple of 4KiB",
    ),
    (
        &["db", "--size", "1GiB", "--squeeze", "vmm=none,min=1GiB"],
        "the VM \"db\": squeeze.vmm = \"none\": must be \"qemu\", \"cloud-hypervisor\" or \"vhost-user\"",
    ),
];

#[test]
fn how_a_vm_is_squeezed_is_remembered_as_a_whole_and_can_be_taken_back() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    assert_eq!(setting(&daemon, "web1", "squeeze"), pair("none", "default"));
    let squeeze = "vmm=qemu,socket=/run/vms/a.qmp,min=64MiB,mode=observe";
    ok(&daemon, &["vm", "set", "web1", "--squeeze", squeeze]);
    let said = refused(&daemon, &["vm", "add", "db", "--size", "1MiB", "--squeeze", squeeze]);
    assert!(
        said.contains("the VM \"db\": squeeze.socket") && said.contains("the VM \"web1\" has it"),
        "{said}"
    );
    daemon.restart();
    let shown = "{ min = \"64MiB\", mode = \"observe\", promotion_rate = \"0.2%\", socket = \"/run/vms/a.qmp\", \
                 vmm = \"qemu\" }";
    assert_eq!(setting(&daemon, "web1", "squeeze"), pair(shown, "remembered"));
    ok(&daemon, &["vm", "set", "web1", "--squeeze", "none", "--runtime"]);
    assert_eq!(setting(&daemon, "web1", "squeeze"), pair("none", "runtime"));
    ok(&daemon, &["vm", "set", "web1", "--squeeze", "vmm=vhost-user,mode=fixed,to=128MiB"]);
    let shown = "{ mode = \"fixed\", promotion_rate = \"0.2%\", to = \"128MiB\", vmm = \"vhost-user\" }";
    assert_eq!(setting(&daemon, "web1", "squeeze"), pair(shown, "remembered"));
    for (given, part) in [
        ("min=1GiB", "vmm is missing"),
        ("vmm", "\"vmm\" is not KEY=VALUE"),
        ("vmm=qemu,mni=1GiB", "\"mni\" is no key of squeeze"),
        ("vmm=qemu,min=1GB", "\"1GB\" is not in IEC units"),
    ] {
        let output = daemon.ask(&["vm", "set", "web1", "--squeeze", given]);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(2) && said.contains(part), "{given}: {said}");
    }
}

#[test]
fn what_is_no_vm_is_refused_with_what_would_be_right_and_changes_nothing() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), CONFIG);
    for (args, message) in REFUSED {
        let said = refused(&daemon, &[&["vm", "add"], *args].concat());
        assert_eq!(said, format!("ballast: {message}\n"), "{args:?}");
    }
    for args in
        [&["vm", "remove", "nobody"][..], &["vm", "show", "nobody"], &["vm", "set", "nobody", "--forget"]]
    {
        let said = refused(&daemon, args);
        assert_eq!(said, "ballast: there is no VM \"nobody\"; the VMs are: web1\n", "{args:?}");
    }
    assert_eq!(daemon.status()["vms"].as_array().unwrap().len(), 1);
    let state = dir.path().join("state");
    assert!(!state.join("vms.toml").exists(), "nothing was remembered");
    let sockets = fs::read_dir(dir.path().join("run")).unwrap().count();
    assert_eq!((sockets, fs::read_dir(state.join("vms")).unwrap().count()), (2, 1));
}

#[test]
fn a_new_socket_has_the_group_and_the_sandboxed_daemon_may_give_it_that() {
    assert!(rustix::process::geteuid().is_root(), "only root can be of another group: run the tests as root");
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), &format!("socket_group = \"daemon\"\n{CONFIG}"));
    let gid = |name: &str| fs::metadata(daemon.socket(name)).unwrap().gid();
    ok(&daemon, &["vm", "add", "db", "--size", "1MiB"]);
    assert_ne!(gid("db"), rustix::process::getegid().as_raw());
    assert_eq!(gid("db"), gid("web1"));
}

#[test]
fn a_hundred_vms_come_and_go_while_another_stores_and_verifies() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), CONFIG);
    let before = support::usage::Usage::of(daemon.pid().unwrap());
    let done = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let busy = scope.spawn(|| {
            let (_device, mut queue) = daemon.attach("web1");
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                let pages: Vec<_> = (0..60).map(|n| page_of(n, rounds * 60 + u64::from(n))).collect();
                queue.write_pages(10, &pages).unwrap();
                assert!(queue.read_pages(10, 60).unwrap() == pages, "round {rounds}");
                rounds += 1;
            }
            rounds
        });
        let changed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| come_and_go(&daemon)));
        done.store(true, Ordering::Relaxed);
        let rounds = busy.join().unwrap();
        changed.unwrap();
        rounds
    });
    assert!(rounds > 100, "{rounds}");
    assert_eq!(daemon.vm("web1")["errors"], 0);
    assert_eq!(daemon.status()["vms"].as_array().unwrap().len(), 1);
    wait_until_disconnected(&daemon, "web1");
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let after = support::usage::Usage::of(daemon.pid().unwrap());
        if after.descriptors <= before.descriptors + 2 && after.threads <= before.threads + 8 {
            break;
        }
        assert!(Instant::now() < deadline, "{before:?} {after:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A hundred VMs, each with a page, ten at a time.
fn come_and_go(daemon: &Daemon) {
    for ten in 0..10 {
        let names: Vec<String> = (0..10).map(|one| format!("vm{ten}{one}")).collect();
        for name in &names {
            ok(daemon, &["vm", "add", name, "--size", "1MiB"]);
            daemon.attach(name).1.write_pages(7, &[page_of(2, ten)]).unwrap();
        }
        for name in &names {
            ok(daemon, &["vm", "remove", name, "--force"]);
        }
    }
}

#[test]
fn what_is_remembered_is_refused_whole_when_it_is_damaged() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    ok(&daemon, &["vm", "add", "db", "--size", "1MiB"]);
    daemon.kill();
    let path = dir.path().join("state/vms.toml");
    let text = fs::read_to_string(&path).unwrap();
    let whole = |text: &str| {
        fs::write(&path, text).unwrap();
        let output = support::daemon::serve(&daemon.config()).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    let said = whole(&text[..text.len() / 2]);
    for part in
        [path.to_str().unwrap(), "its last line is missing", "`ballast vm add` (their pages are kept)"]
    {
        assert!(said.contains(part), "{said}");
    }
    assert!(whole(&text.replace("1MiB", "2MiB")).contains("it is not as the checksum in its last line says"));
    let edited = |text: &str| format!("{text}\n# end: edited\n");
    let said = whole(&edited("[[vm]]\nname = \"db\"\nsize = \"1MiB\"\nwieght = 7"));
    assert!(said.contains("the VM \"db\": ") && said.contains("did you mean `weight`?"), "{said}");
    fs::write(&path, edited("[[vm]]\nname = \"db\"\nsize = \"1MiB\"\nweight = 7")).unwrap();
    daemon.restart();
    assert_eq!(daemon.vm("db")["weight"], 7);
}

#[test]
fn a_change_that_cannot_be_remembered_is_not_made() {
    let dir = tmpfs();
    let elsewhere = dir.path().join("kept/vms.toml");
    let daemon = Daemon::start(dir.path(), &format!("vms_file = {elsewhere:?}\n{CONFIG}"));
    ok(&daemon, &["vm", "set", "web1", "--weight", "7"]);
    assert!(fs::read_to_string(&elsewhere).unwrap().contains("weight = 7"));
    // In the way of the file that would take its place.
    fs::create_dir(dir.path().join("kept/vms.toml.new")).unwrap();
    for args in [&["vm", "set", "web1", "--weight", "8"][..], &["vm", "add", "db", "--size", "1MiB"]] {
        let said = refused(&daemon, args);
        assert!(said.contains("nothing was changed") && said.contains("--runtime"), "{said}");
    }
    assert!(daemon.vm("web1")["weight"] == 7 && daemon.vm("db").is_null());
    ok(&daemon, &["vm", "set", "web1", "--weight", "8", "--runtime"]);
    assert_eq!(daemon.vm("web1")["weight"], 8);
}

#[test]
fn what_is_left_of_a_pool_is_said_of_how_much_and_the_swap_header_is_nobodys_store() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    assert_eq!(
        (daemon.vm("web1")["stores"].as_u64(), daemon.vm("web1")["stored_pages"].as_u64()),
        (Some(0), Some(1))
    );
    let (device, mut queue) = daemon.attach("web1");
    queue.write_pages(1, &pages()).unwrap();
    let pages = u64::try_from(pages().len()).unwrap();
    assert_eq!(daemon.vm("web1")["stores"].as_u64(), Some(pages));
    let draining = |daemon: &Daemon| {
        let pool = daemon.status()["pool"]["pools"][1].clone();
        ["objects", "objects_at_first"].map(|key| pool[key].as_u64().unwrap())
    };
    let before = daemon.status()["pool"]["pools"][0]["objects"].as_u64().unwrap();
    let text = ok(&daemon, &["pool", "set", "--compressor", "zstd"]);
    assert!(
        text.contains(&format!("draining: lz4, objects left: {before}; 0 of {before} objects done (0 %)")),
        "{text}"
    );
    assert_eq!(draining(&daemon), [before, before]);
    queue.discard(1, 7).unwrap();
    let [left, at_first] = draining(&daemon);
    assert!(left < before && at_first == before, "{left} of {at_first}");
    drop((device, queue));
    daemon.restart();
    assert_eq!(draining(&daemon)[1], draining(&daemon)[0], "whatever there is drains, and nothing has yet");
    // A VM that is cleared has another header.
    wait_until_disconnected(&daemon, "web1");
    ok(&daemon, &["vm", "clear", "web1"]);
    assert_eq!(
        (daemon.vm("web1")["stores"].as_u64(), daemon.vm("web1")["stored_pages"].as_u64()),
        (Some(0), Some(1))
    );
    // By itself it is no change of the compressor, and what was remembered stays.
    let text = ok(&daemon, &["pool", "set", "--recompress"]);
    assert!(text.contains("stored (zstd:1)"), "{text}");
    daemon.restart();
    assert_eq!(daemon.status()["pool"]["compressor"], "zstd:1");
}
