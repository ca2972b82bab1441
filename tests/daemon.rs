//! The real daemon: who may run beside it, what it shows, and what of its pages outlives its death, a damaged file and
//! a changed configuration.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use ballast::page::{PAGE_SIZE_U64, Page, ZERO_PAGE};
use support::daemon::{Daemon, serve};
use support::page_of;
use vhost::{VhostBackend, VringConfigData};

const TWO_VMS: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"16MiB\"\n";
const ONE_VM: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"16MiB\"\n";

fn tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn pages() -> Vec<Page> {
    (0..60).map(|n| page_of(n, u64::from(n) + 1)).collect()
}

fn put(daemon: &Daemon, name: &str) {
    daemon.attach(name).1.write_pages(10, &pages()).unwrap();
}

fn assert_pages_there(daemon: &Daemon, name: &str) {
    assert!(daemon.attach(name).1.read_pages(10, 60).unwrap() == pages(), "{name}");
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until the daemon has noticed that a VM's VMM is there, or gone.
fn wait_until_connected(daemon: &Daemon, name: &str, connected: bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.vm(name)["connected"] != connected {
        assert!(Instant::now() < deadline, "{name}: connected is not {connected}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until the daemon has noticed that a VM's VMM is gone, and clears the VM.
fn clear(daemon: &Daemon, name: &str) {
    wait_until_connected(daemon, name, false);
    let output = daemon.ask(&["vm", "clear", name]);
    assert!(output.status.success(), "{}", stderr(&output));
}

/// A second daemon, which is expected to give up: its exit status and what it says.
fn serve_in_vain(config: &Path) -> (Option<i32>, String) {
    let mut child = serve(config).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    (output.status.code(), stderr(&output))
}

#[test]
fn status_has_the_documented_fields() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let (_device, mut queue) = daemon.attach("web1");
    queue.write_pages(10, &pages()).unwrap();
    queue.discard(10, 1).unwrap();
    let status = daemon.status();
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["state_dir"], dir.path().join("state").to_str().unwrap());
    let pool = &status["pool"];
    assert_eq!((pool["max_bytes"].as_u64(), pool["compressor"].as_str()), (Some(64 << 20), Some("lz4")));
    for field in
        ["used_bytes", "object_bytes", "payload_bytes", "metadata_bytes", "stored_pages", "same_filled_pages"]
    {
        assert!(pool[field].as_u64() > Some(0), "{field}: {pool}");
    }
    let names: Vec<_> = status["vms"].as_array().unwrap().iter().map(|vm| vm["name"].clone()).collect();
    assert_eq!(names, ["web1", "web2"]);
    let vm = &status["vms"][0];
    assert_eq!((vm["state"].as_str(), vm["message"].is_null()), (Some("ready"), true));
    for (field, value) in
        [("size_bytes", 16 << 20), ("limit_bytes", (16 << 20) + (16 << 20) / 64), ("stored_pages", 60)]
    {
        assert_eq!(vm[field], value, "{field}");
    }
    for field in
        ["same_filled_pages", "incompressible_pages", "pool_bytes", "payload_bytes", "stores", "invalidates"]
    {
        assert!(vm[field].as_u64() > Some(0), "{field}: {vm}");
    }
    for (field, value) in [("weight", 100), ("reserve_bytes", 0), ("file_pages", 0)] {
        assert_eq!(vm[field], value, "{field}");
    }
    assert!(vm["writeback"] == true && vm["counters"]["limit_hit"] == 0, "{vm}");
    assert!(vm["counters"]["file_load_fail"] == 0 && pool["counters"]["file_load_fail"] == 0, "{status}");
    assert!(status["writeback"].is_null() && pool["accept_threshold_percent"] == 90, "{status}");
    assert!(vm["loads"].is_u64() && vm["errors"] == 0 && vm["connected"] == true, "{vm}");
    assert_eq!(status["vms"][1]["connected"], false);
}

#[test]
fn what_guests_swapped_out_is_for_the_daemons_user_alone() {
    let dir = tmpfs();
    let files = tempfile::tempdir().unwrap();
    let file = files.path().join("writeback");
    let writeback = format!("{TWO_VMS}[writeback]\npath = {file:?}\nsize = \"64MiB\"\n");
    let daemon = Daemon::start(dir.path(), &writeback);
    put(&daemon, "web1");
    let state = dir.path().join("state");
    let mut private = vec![file, daemon.table("web1"), daemon.table("web2")];
    private.extend(["arena", "lock", "state", "writeback"].map(|name| state.join(name)));
    for path in private {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    assert_eq!(mode(&daemon.socket("web1")), 0o660, "its VMM's group may connect");
    assert_eq!(mode(&daemon.socket("control")), 0o600, "and gives no orders");
}

/// cloud-hypervisor up to v53 comes back the moment its connection ends, and gives its disk up for good when somebody
/// takes the call and dies of it: the dead daemon's socket must end before its connections.
#[test]
fn a_vmm_that_sees_its_daemon_die_finds_nobody_at_the_socket() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    for kill in 0..8 {
        let socket = daemon.socket("web1");
        let mut connection = UnixStream::connect(&socket).unwrap();
        wait_until_connected(&daemon, "web1", true);
        let again = std::thread::spawn(move || {
            // Ends with the connection: nobody sends anything.
            let _ = connection.read(&mut [0]);
            UnixStream::connect(&socket).map(|_| ()).map_err(|error| error.kind())
        });
        daemon.kill();
        assert_eq!(again.join().unwrap(), Err(ErrorKind::ConnectionRefused), "kill {kill}");
        daemon.restart();
    }
}

#[test]
fn a_second_daemon_on_the_same_state_starts_when_the_first_is_dead() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let text = fs::read_to_string(daemon.config()).unwrap().replace("/run\"", "/run2\"");
    let second = dir.path().join("second.toml");
    fs::write(&second, text).unwrap();
    let (code, message) = serve_in_vain(&second);
    assert_eq!(code, Some(1), "{message}");
    let state_dir = dir.path().join("state");
    assert!(message.contains(state_dir.to_str().unwrap()) && message.contains("in use"), "{message}");
    put(&daemon, "web1");
    daemon.restart();
    assert_pages_there(&daemon, "web1");
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let text = fs::read_to_string(daemon.config()).unwrap().replace("/state\"", "/state2\"");
    let second = dir.path().join("second.toml");
    fs::write(&second, text).unwrap();
    let (code, message) = serve_in_vain(&second);
    assert_eq!(code, Some(1), "{message}");
    let sockets = dir.path().join("run");
    assert!(message.contains(sockets.to_str().unwrap()) && message.contains("in use"), "{message}");
    put(&daemon, "web1");
    assert!(daemon.ask(&["status"]).status.success(), "the first one goes on");
    daemon.kill();
    assert!(daemon.socket("web1").exists() && daemon.socket("control").exists());
    daemon.restart();
    assert_pages_there(&daemon, "web1");
}

#[test]
fn a_vm_is_cleared_only_when_no_vmm_is_connected() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    put(&daemon, "web2");
    let (device, mut queue) = daemon.attach("web1");
    queue.write_pages(10, &pages()).unwrap();
    let output = daemon.ask(&["vm", "clear", "web1"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("power it off"), "{}", stderr(&output));
    assert!(queue.read_pages(10, 60).unwrap() == pages());
    drop((device, queue));
    let poor = || daemon.status()["pool"]["counters"]["reject_compress_poor"].as_u64().unwrap();
    let before = poor();
    clear(&daemon, "web1");
    assert_eq!(daemon.vm("web1")["stored_pages"], 1, "the swap header is left");
    assert!(before > 0 && poor() == before, "what has happened stays counted: {before} and {}", poor());
    let (_device, mut queue) = daemon.attach("web1");
    assert!(queue.read_pages(10, 60).unwrap().iter().all(|page| page == &ZERO_PAGE));
    assert_eq!(&queue.read_page(0).unwrap()[4086..], b"SWAPSPACE2");
    for command in [&["vm", "clear", "web3"][..], &["vm", "set", "web3", "--weight", "7"]] {
        let output = daemon.ask(command);
        assert_eq!(output.status.code(), Some(1));
        let message = stderr(&output);
        assert!(message.contains("\"web3\"") && message.contains("web1, web2"), "{message}");
    }
    assert_pages_there(&daemon, "web2");
}

#[test]
fn pages_outlive_a_killed_daemon_and_its_compressor() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    put(&daemon, "web1");
    let before = daemon.vm("web1");
    daemon.restart();
    let after = daemon.vm("web1");
    for field in ["stored_pages", "same_filled_pages", "incompressible_pages", "pool_bytes", "payload_bytes"]
    {
        assert_eq!(before[field], after[field], "{field}");
    }
    assert_pages_there(&daemon, "web1");
    daemon.configure(&TWO_VMS.replace("[pool]", "[pool]\ncompressor = \"zstd\""));
    daemon.restart();
    assert!(daemon.status()["pool"]["compressor"].as_str().unwrap().starts_with("zstd"));
    assert_pages_there(&daemon, "web1");
    let (_device, mut queue) = daemon.attach("web1");
    queue.write_pages(500, &pages()).unwrap();
    daemon.configure(TWO_VMS);
    daemon.restart();
    let (_device, mut queue) = daemon.attach("web1");
    assert!(queue.read_pages(500, 60).unwrap() == pages() && queue.read_pages(10, 60).unwrap() == pages());
}

/// The VM is out of service for a reason that has all these words, and the other one runs.
fn assert_out_of_service(daemon: &Daemon, words: &[&str]) {
    let vm = daemon.vm("web1");
    assert_eq!(vm["state"], "damaged", "{vm}");
    for word in words {
        assert!(vm["message"].as_str().unwrap().contains(word), "{word}: {vm}");
    }
    let memory = Memory::with_bytes(16 << 20).unwrap();
    assert!(Device::connect(daemon.socket("web1"), memory, Options::default()).is_err());
    assert_pages_there(daemon, "web2");
}

#[test]
fn a_vm_with_a_damaged_table_is_out_of_service_until_it_is_cleared() {
    let (header, copy, entries) = (16, 2048 + 88, PAGE_SIZE_U64 + 7);
    for damaged_at in [vec![header, copy], (10..30).map(|slot| entries + 8 * slot).collect()] {
        let dir = tmpfs();
        let mut daemon = Daemon::start(dir.path(), TWO_VMS);
        put(&daemon, "web1");
        put(&daemon, "web2");
        daemon.kill();
        let table = OpenOptions::new().read(true).write(true).open(daemon.table("web1")).unwrap();
        let flip = || {
            for at in &damaged_at {
                let mut byte = [0];
                table.read_exact_at(&mut byte, *at).unwrap();
                table.write_all_at(&[byte[0] ^ 0x20], *at).unwrap();
            }
        };
        flip();
        daemon.restart();
        assert_out_of_service(&daemon, &["web1.table", "ballast vm clear web1"]);
        // The others go on, and what the table names stays where it is: mended, it is as good as before. Nobody knows
        // what a damaged entry named.
        if damaged_at[0] < PAGE_SIZE_U64 {
            put(&daemon, "web2");
            daemon.kill();
            flip();
            daemon.restart();
            assert_pages_there(&daemon, "web1");
            daemon.kill();
            flip();
            daemon.restart();
            assert_out_of_service(&daemon, &["web1.table", "ballast vm clear web1"]);
        }
        clear(&daemon, "web1");
        assert_eq!(daemon.vm("web1")["state"], "ready", "at {damaged_at:?}");
        assert_eq!(&daemon.attach("web1").1.read_page(0).unwrap()[4086..], b"SWAPSPACE2");
        put(&daemon, "web1");
        daemon.restart();
        assert_pages_there(&daemon, "web1");
        assert_pages_there(&daemon, "web2");
    }
}

#[test]
fn the_compressor_changes_any_number_of_times() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    put(&daemon, "web1");
    for n in 0..40 {
        let level = format!("zstd:{}", n % 20 + 1);
        let set = daemon.ask(&["pool", "set", "--compressor", &level]);
        assert!(set.status.success(), "{level}: {}", String::from_utf8_lossy(&set.stderr));
    }
    assert_pages_there(&daemon, "web1");
}

#[test]
fn only_a_configured_vm_can_be_set() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    daemon.configure(ONE_VM);
    daemon.restart();
    let set = daemon.ask(&["vm", "set", "web1", "--weight", "200"]);
    assert_eq!(set.status.code(), Some(1));
    let message = String::from_utf8_lossy(&set.stderr).into_owned();
    assert!(message.contains("there is no VM \"web1\"; the VMs are: web2"), "{message}");
}

#[test]
fn memory_that_is_not_shared_is_suspected_aloud() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let (_device, mut queue) = daemon.attach("web1");
    // As a guest does whose ring nobody else can see.
    let start = Instant::now();
    while !daemon.log().contains("its memory is not shared; start QEMU with") {
        assert!(start.elapsed() < Duration::from_secs(60), "{}", daemon.log());
        queue.kick().unwrap();
        std::thread::sleep(Duration::from_millis(10));
    }
    queue.write_pages(3, &pages()).unwrap();

    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web2"), memory, Options::default()).unwrap();
    let far = 1 << 60;
    let address = VringConfigData {
        queue_max_size: 256,
        queue_size: 256,
        flags: 0,
        desc_table_addr: far,
        used_ring_addr: far,
        avail_ring_addr: far,
        log_addr: None,
    };
    let _ = device.frontend().unwrap().set_vring_addr(0, &address);
    daemon.wait_for_log("not in memory that the VMM shares: start QEMU with");
}

#[test]
fn a_vm_of_another_size_is_out_of_service_and_comes_back_with_its_own() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    put(&daemon, "web1");
    put(&daemon, "web2");
    daemon.configure(&TWO_VMS.replacen("16MiB", "32MiB", 1));
    daemon.restart();
    assert_out_of_service(&daemon, &["16", "32", "ballast vm clear web1"]);
    daemon.configure(TWO_VMS);
    daemon.restart();
    assert_pages_there(&daemon, "web1");
    daemon.configure(&TWO_VMS.replacen("16MiB", "32MiB", 1));
    daemon.restart();
    clear(&daemon, "web1");
    assert_eq!(daemon.vm("web1")["size_bytes"], 32 << 20);
    put(&daemon, "web1");
}

#[test]
fn a_vm_that_left_the_configuration_keeps_its_pages() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    put(&daemon, "web1");
    daemon.configure(ONE_VM);
    daemon.restart();
    let vm = daemon.vm("web1");
    assert_eq!((&vm["state"], &vm["stored_pages"]), (&"unconfigured".into(), &61.into()), "{vm}");
    assert_eq!(daemon.status()["vms"][0]["name"], "web2", "configured ones come first");
    put(&daemon, "web2");
    daemon.configure(TWO_VMS);
    daemon.restart();
    assert_pages_there(&daemon, "web1");
    daemon.configure(ONE_VM);
    daemon.restart();
    clear(&daemon, "web1");
    assert!(daemon.vm("web1").is_null(), "an unconfigured one is gone when it is cleared");
    assert_pages_there(&daemon, "web2");
}

#[test]
fn a_full_pool_without_a_file_promises_nothing() {
    let dir = tmpfs();
    let daemon = Daemon::start(
        dir.path(),
        "workers = 1\n[pool]\nmax = \"1MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n",
    );
    let (_device, mut disk) = daemon.attach("web1");
    let refused = (1..1000).find(|slot| disk.write_pages(*slot, &[page_of(4, *slot)]).is_err());
    assert!(refused.is_some());
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.status()["pool"]["full"] != true {
        assert!(Instant::now() < deadline, "{}", daemon.status());
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(daemon.status()["pool"]["stuck"], "there is no writeback file");
    let text = String::from_utf8(daemon.ask(&["status"]).stdout).unwrap();
    assert!(text.contains("full: no page can leave (there is no writeback file)"), "{text}");
    // It complained of the store, in a file: without the escapes that colour a terminal.
    assert!(daemon.log().contains("a store failed") && !daemon.log().contains('\u{1b}'), "{}", daemon.log());
}
