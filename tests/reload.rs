//! Reading the configuration again while the real daemon runs: what is applied, what waits for a restart, what is kept, and
//! that a bad file changes nothing.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::time::{Duration, Instant};

use ballast::config::{Config, VM_KEYS};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use support::daemon::Daemon;
use support::page_of;

const CONFIG: &str = "workers = 2\nscrub = \"7d\"\n[pool]\nmax = \"64MiB\"\npressure = false\n[balloon]\ninterval = \"5s\"\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"16MiB\"\n";

fn tmpfs() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// What the daemon answers that runs, wherever the changed file says that its socket is.
fn answer(daemon: &Daemon, args: &[&str]) -> Value {
    let socket = daemon.socket("control");
    let output = daemon.ask(&[args, &["--json", "--socket", socket.to_str().unwrap()]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Each change of a reload: key, old, new, outcome.
fn reload(daemon: &Daemon, args: &[&str]) -> Vec<[String; 4]> {
    let report = answer(daemon, &[&["reload"], args].concat());
    assert_eq!(report["path"], daemon.config().to_str().unwrap());
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let changes = report["changes"].as_array().unwrap();
    changes.iter().map(|change| ["key", "old", "new", "outcome"].map(|part| text(&change[part]))).collect()
}

fn expected(changes: &[[&str; 4]]) -> Vec<[String; 4]> {
    changes.iter().map(|change| change.map(str::to_owned)).collect()
}

/// Lines of the configuration, what becomes of them, and what that comes to. DIR is the daemon's directory.
type Row = (&'static str, &'static str, &'static [[&'static str; 4]]);

const TABLE: &[Row] = &[
    (
        "state_dir = \"DIR/state\"",
        "state_dir = \"DIR/other\"",
        &[
            ["state_dir", "DIR/state", "DIR/other", "restart"],
            ["vms_file", "DIR/state/vms.toml", "DIR/other/vms.toml", "restart"],
        ],
    ),
    (
        "runtime_dir = \"DIR/run\"",
        "runtime_dir = \"DIR/other\"",
        &[["runtime_dir", "DIR/run", "DIR/other", "restart"]],
    ),
    (
        "workers = 2",
        "workers = 2\nmetrics = \"127.0.0.1:9464\"",
        &[["metrics", "null", "127.0.0.1:9464", "restart"]],
    ),
    ("\"5s\"", "\"9s\"", &[["balloon.interval", "5s", "9s", "restart"]]),
    ("scrub = \"7d\"", "scrub = \"1d\"", &[["scrub", "7d", "1d", "now"]]),
    ("scrub = \"7d\"\n", "", &[["scrub", "7d", "null", "now"]]),
    ("\"64MiB\"", "\"32MiB\"", &[["pool.max", "64MiB", "32MiB", "now"]]),
    ("pressure = false", "pressure = true", &[["pool.pressure", "false", "true", "restart"]]),
    ("[pool]", "[pool]\ncompressor = \"zstd:3\"", &[["pool.compressor", "lz4", "zstd:3", "now"]]),
    (
        "[pool]",
        "[pool]\ncold_compressor = \"none\"",
        &[["pool.cold_compressor", "zstd:9+dictionary", "none", "now"]],
    ),
    (
        "[pool]",
        "[pool]\ncold_after = \"1h\"\ncold_cpu = \"7%\"\ndeduplicate = false",
        &[
            ["pool.cold_after", "5m", "1h", "now"],
            ["pool.cold_cpu", "10%", "7%", "now"],
            ["pool.deduplicate", "true", "false", "now"],
        ],
    ),
    ("[pool]", "[pool]\naccept_threshold = 50", &[["pool.accept_threshold", "90", "50", "now"]]),
    ("[pool]", "[pool]\nstore_deadline_ms = 50", &[["pool.store_deadline_ms", "5000", "50", "now"]]),
    (
        "workers = 2",
        "workers = 3\npoll_us = 0\nsandbox = false\nlock_memory = true\nsocket_group = \"daemon\"\n\
         control_group = \"adm\"",
        &[
            ["socket_group", "null", "daemon", "restart"],
            ["control_group", "null", "adm", "restart"],
            ["workers", "2", "3", "restart"],
            ["poll_us", "50", "0", "restart"],
            ["sandbox", "true", "false", "restart"],
            ["lock_memory", "false", "true", "restart"],
        ],
    ),
    (
        "workers = 2",
        "workers = 2\nvms_file = \"/x/vms\"",
        &[["vms_file", "DIR/state/vms.toml", "/x/vms", "restart"]],
    ),
    (
        "[[vm]]\nname = \"web1\"",
        "[writeback]\npath = \"/x\"\nsize = \"1GiB\"\nidle = \"1h\"\n[[vm]]\nname = \"web1\"",
        &[
            ["writeback.path", "null", "/x", "restart"],
            ["writeback.size", "null", "1GiB", "restart"],
            ["writeback.idle", "null", "1h", "restart"],
        ],
    ),
    (
        "name = \"web1\"",
        "name = \"web1\"\nlimit = \"1MiB\"\nreserve = \"4KiB\"\nweight = 7\nwriteback = false\n\
      label = \"x\"\nuuid = \"00112233-4455-6677-8899-aabbccddeeff\"\nclear_after = \"1d\"",
        &[
            ["vm.web1.limit", "16640KiB", "1MiB", "now"],
            ["vm.web1.reserve", "0B", "4KiB", "now"],
            ["vm.web1.weight", "100", "7", "now"],
            ["vm.web1.writeback", "true", "false", "now"],
            ["vm.web1.label", "ballast", "x", "now"],
            ["vm.web1.uuid", "UUID", "00112233-4455-6677-8899-aabbccddeeff", "now"],
            ["vm.web1.clear_after", "never", "1d", "now"],
        ],
    ),
    (
        "[[vm]]\nname = \"web1\"",
        "budget = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsqueeze = { vmm = \"vhost-user\", mode = \"off\" }",
        &[
            ["balloon.budget", "null", "64MiB", "now"],
            [
                "vm.web1.squeeze",
                "none",
                "{ mode = \"off\", promotion_rate = \"0.2%\", vmm = \"vhost-user\" }",
                "now",
            ],
        ],
    ),
    (
        "name = \"web1\"",
        "name = \"web1\"\nqueues = 2\nmigration = \"same-host\"",
        &[["vm.web1.queues", "4", "2", "restart"], ["vm.web1.migration", "none", "same-host", "restart"]],
    ),
    (
        "name = \"web1\"\nsize = \"16MiB\"",
        "name = \"web1\"\nsize = \"32MiB\"\nlimit = \"16640KiB\"",
        &[["vm.web1.size", "16MiB", "32MiB", "restart"]],
    ),
    (
        "name = \"web2\"",
        "name = \"web3\"",
        &[["vm.web2", "16MiB", "null", "now"], ["vm.web3", "null", "16MiB", "now"]],
    ),
];

/// The same where there is a writeback file.
const TABLE_WITH_A_FILE: &[Row] = &[
    (
        "[writeback]",
        "[writeback]\nidle = \"1h\"\ndaily_limit = \"1GiB\"",
        &[["writeback.daily_limit", "null", "1GiB", "now"], ["writeback.idle", "null", "1h", "now"]],
    ),
    ("size = \"64MiB\"", "size = \"65MiB\"", &[["writeback.size", "64MiB", "65MiB", "restart"]]),
    (
        "path = \"DIR/file\"",
        "path = \"DIR/other\"\nidle = \"1h\"",
        &[
            ["writeback.path", "DIR/file", "DIR/other", "restart"],
            ["writeback.idle", "null", "1h", "restart"],
        ],
    ),
];

/// Has a daemon with `config` go through a table.
fn check_table(config: &str, table: &[Row]) {
    let dir = tmpfs();
    let here = |text: &str| text.replace("DIR", dir.path().to_str().unwrap());
    let daemon = Daemon::start(dir.path(), &here(config));
    assert_eq!(reload(&daemon, &[]), expected(&[]));
    let before = std::fs::read_to_string(daemon.config()).unwrap();
    let uuid =
        Config::load(&daemon.config()).unwrap().vms[0].keys().into_iter().find(|(key, _)| *key == "uuid");
    let uuid = uuid.unwrap().1.unwrap();
    for (from, to, changes) in table {
        let text = before.replacen(&here(from), &here(to), 1);
        assert_ne!(text, before, "{from}");
        std::fs::write(daemon.config(), text).unwrap();
        let mut changes = expected(changes);
        for part in changes.iter_mut().flatten() {
            *part = here(part).replace("UUID", uuid.as_str().unwrap());
        }
        let vms = answer(&daemon, &["status"])["vms"].clone();
        assert_eq!(reload(&daemon, &["--check"]), changes, "{to}");
        assert_eq!(answer(&daemon, &["status"])["vms"], vms, "a check changes nothing");
        assert_eq!(reload(&daemon, &[]), changes, "{to}");
        // What is applied is no difference any more, what waits for a restart still is.
        changes.retain(|[.., outcome]| outcome == "restart");
        assert_eq!(reload(&daemon, &[]), changes, "{to}");
        std::fs::write(daemon.config(), &before).unwrap();
        reload(&daemon, &[]);
        assert_eq!(reload(&daemon, &[]), expected(&[]), "and back from {to}");
    }
}

#[test]
fn every_key_that_is_another_is_told_with_what_becomes_of_it() {
    check_table(CONFIG, TABLE);
    let file =
        "[writeback]\npath = \"DIR/file\"\nsize = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";
    check_table(file, TABLE_WITH_A_FILE);
}

#[test]
fn every_key_has_a_row_in_the_tables() {
    let rows = TABLE.iter().chain(TABLE_WITH_A_FILE);
    let told: Vec<&str> = rows.flat_map(|(_, _, changes)| changes.iter().map(|[key, ..]| *key)).collect();
    let config = Config::parse(CONFIG, 1 << 30).unwrap();
    let of_host = config.keys().into_iter().map(|(key, _)| key.to_owned());
    // A VM of another name is another VM.
    let of_vm = VM_KEYS.into_iter().filter(|key| *key != "name").map(|key| format!("vm.web1.{key}"));
    for key in of_host.chain(of_vm) {
        assert!(told.contains(&key.as_str()), "{key} has no row");
    }
}

#[test]
fn what_is_applied_holds() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), CONFIG);
    let (_device, mut queue) = daemon.attach("web2");
    queue.write_pages(10, &[page_of(2, 1)]).unwrap();
    let text = CONFIG
        .replace("max = \"64MiB\"", "max = \"32MiB\"\naccept_threshold = 50\ncompressor = \"zstd:3\"")
        .replace("name = \"web2\"", "name = \"web2\"\nweight = 7");
    daemon.configure(&format!("{text}[[vm]]\nname = \"web3\"\nsize = \"16MiB\"\n"));
    reload(&daemon, &[]);
    let status = daemon.status();
    let pool = &status["pool"];
    assert_eq!((&pool["max_bytes"], &pool["compressor"]), (&(32 << 20).into(), &"zstd:3".into()));
    assert_eq!((&pool["accept_threshold_percent"], &daemon.vm("web2")["weight"]), (&50.into(), &7.into()));
    assert!(daemon.attach("web3").1.read_page(10).is_ok());
    assert!(queue.read_page(10).unwrap() == page_of(2, 1), "a VM that is connected notices nothing");
    let names: Vec<_> = status["vms"].as_array().unwrap().iter().map(|vm| vm["name"].clone()).collect();
    assert_eq!(names, ["web1", "web2", "web3"]);
}

#[test]
fn a_vm_that_has_left_the_file_is_kept_while_somebody_may_miss_it() {
    let dir = tmpfs();
    let daemon = Daemon::start(dir.path(), CONFIG);
    let (device, mut queue) = daemon.attach("web2");
    daemon.configure(&CONFIG[..CONFIG.find("[[vm]]\nname = \"web2\"").unwrap()]);
    assert_eq!(reload(&daemon, &[]), expected(&[["vm.web2", "16MiB", "null", "kept"]]));
    queue.write_pages(10, &[page_of(2, 1)]).unwrap();
    drop((device, queue));
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.vm("web2")["connected"] != false {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = daemon.ask(&["reload"]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("kept: it holds 1 pages: `ballast vm remove web2 --force` drops it"), "{said}");
    assert!(daemon.attach("web2").1.read_page(10).unwrap() == page_of(2, 1));
    let output = daemon.ask(&["vm", "set", "web2", "--weight", "7"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("has left the configuration"), "{output:?}");
    assert!(daemon.ask(&["vm", "remove", "web2", "--force"]).status.success());
    assert!(daemon.vm("web2").is_null() && !daemon.socket("web2").exists());
    assert_eq!(reload(&daemon, &[]), expected(&[]));
}

#[test]
fn a_vm_that_is_only_kept_has_no_reserve_that_the_files_vms_need() {
    let dir = tmpfs();
    // Two of them don't fit.
    let config = CONFIG.replace("64MiB", "20MiB");
    let both = config.replace("name = \"web2\"\n", "name = \"web2\"\nreserve = \"12MiB\"\n");
    let daemon = Daemon::start(dir.path(), &both);
    let (_device, mut queue) = daemon.attach("web2");
    queue.write_pages(10, &[page_of(2, 1)]).unwrap();
    let without = &config[..config.find("[[vm]]\nname = \"web2\"").unwrap()];
    daemon.configure(&format!("{without}reserve = \"12MiB\"\n"));
    let reserves = || ["web1", "web2"].map(|vm| daemon.vm(vm)["reserve_bytes"].as_u64().unwrap() >> 20);
    let changes = [["vm.web2", "16MiB", "null", "kept"], ["vm.web1.reserve", "0B", "12MiB", "now"]];
    assert_eq!(reload(&daemon, &["--check"]), expected(&changes));
    assert_eq!(reserves(), [0, 12], "it only looked");
    assert!(queue.read_page(10).unwrap() == page_of(2, 1));
    assert_eq!(reload(&daemon, &[]), expected(&changes));
    assert_eq!(reserves(), [12, 0]);
    daemon.configure(&both);
    reload(&daemon, &[]);
    assert_eq!(reserves(), [0, 12], "it stands in the file again");
}

/// What a bad file does not change.
fn shape(daemon: &Daemon) -> Value {
    let status = daemon.status();
    serde_json::json!([status["vms"], status["pool"]["max_bytes"], status["pool"]["compressor"]])
}

#[test]
fn a_bad_file_changes_nothing_whoever_has_it_read() {
    let dir = tmpfs();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    assert!(daemon.ask(&["vm", "set", "web1", "--reserve", "8MiB"]).status.success());
    let before = shape(&daemon);
    for (from, to, part) in [
        ("\"64MiB\"", "\"32MiB\"\nmaximum = 1", "unknown field `maximum`"),
        ("\"64MiB\"", "\"32MiB", "invalid basic string"),
        ("web2", "web1", "must be unique"),
        // Right in itself, and not with what is remembered.
        ("\"64MiB\"", "\"8MiB\"", "nine tenths of pool.max"),
        ("name = \"web1\"", "name = \"web1\"\nlimit = \"4MiB\"", "the VM \"web1\": reserve = \"8MiB\""),
    ] {
        daemon.configure(&CONFIG.replacen(from, to, 1));
        let socket = daemon.socket("control");
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_ballast"))
            .args(["reload".as_ref(), "--socket".as_ref(), socket.as_os_str()])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("nothing was changed: ") && said.contains(part), "{said}");
        let times = daemon.log().matches("nothing was changed").count();
        kill_process(Pid::from_raw(daemon.pid().unwrap().cast_signed()).unwrap(), Signal::HUP).unwrap();
        until(|| daemon.log().matches("nothing was changed").count() > times);
        daemon.configure(CONFIG);
        assert_eq!(shape(&daemon), before, "{to}");
    }
    assert!(daemon.ended().is_none());
    // A good one after all those is read, also when it is another file by that name, as editors make it.
    let text = std::fs::read_to_string(daemon.config()).unwrap();
    let new = dir.path().join("new.toml");
    std::fs::write(&new, text.replace("\"64MiB\"", "\"32MiB\"")).unwrap();
    std::fs::rename(&new, daemon.config()).unwrap();
    kill_process(Pid::from_raw(daemon.pid().unwrap().cast_signed()).unwrap(), Signal::HUP).unwrap();
    until(|| daemon.status()["pool"]["max_bytes"] == 32 << 20);
    assert!(daemon.log().contains("the configuration was read again"));
}

fn until(done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(10));
    }
}
