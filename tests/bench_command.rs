//! `ballast bench` as people run it: against the daemon, against a back end that nobody can ask for its ratio, and
//! against one that gives back other pages than it was given.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ballast::frontend::{Device, Memory, Options};
use serde_json::Value;
use support::daemon::Daemon;
use support::{Host, page_of};

const CONFIG: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"64MiB\"\n";
const PAGES: u64 = 4000;
const FIGURES: [&str; 10] = [
    "requests",
    "pages",
    "seconds",
    "pages_per_second",
    "mib_per_second",
    "latency_us_p50",
    "latency_us_p90",
    "latency_us_p99",
    "latency_us_p999",
    "latency_us_max",
];

const PHASES: [&str; 8] =
    ["store", "load", "overwrite", "load_overwritten", "mixed", "load_depth_1", "discard", "load_discarded"];

fn daemon() -> (tempfile::TempDir, Daemon) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), CONFIG);
    (dir, daemon)
}

/// Exit status, stdout, stderr.
fn bench(socket: &Path, args: &[&str]) -> (Option<i32>, String, String) {
    let sockets = [socket.to_str().unwrap(), "--pages", &PAGES.to_string()];
    bench_with(&[&sockets, args].concat())
}

fn bench_with(args: &[&str]) -> (Option<i32>, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    let output = command.arg("bench").args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn report(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap_or_else(|err| panic!("{err}: {stdout}"))
}

#[test]
fn every_phase_has_its_figures_and_the_daemon_is_asked_for_the_ratio() {
    let (_dir, daemon) = daemon();
    for (block, block_pages) in [("4KiB", 1), ("128KiB", 32)] {
        let (code, stdout, stderr) = bench(&daemon.socket("web1"), &["--json", "--block-size", block]);
        assert_eq!(code, Some(0), "{stderr}");
        let found = report(&stdout);
        for (field, right) in [
            ("device_id", Value::from("ballast-web1")),
            ("device_pages", (64 << 8).into()),
            ("pages", PAGES.into()),
            ("first_slot", 1.into()),
            ("block_bytes", (block_pages * 4096).into()),
            ("vms", 1.into()),
            ("queues", 1.into()),
            ("queue_depth", 32.into()),
            ("polling", true.into()),
            ("synthetic", true.into()),
            ("discarded_pages", PAGES.into()),
            ("mismatched_pages", 0.into()),
            ("failed_requests", 0.into()),
        ] {
            assert_eq!(found[field], right, "{field}: {stdout}");
        }
        let ratio = found["compression_ratio"].as_f64();
        assert!(ratio > Some(2.0) && ratio < Some(6.0), "{stdout}");
        for phase in PHASES {
            let figures = &found["phases"][phase];
            let idle = figures["front_end_idle_percent"].as_f64();
            assert!(idle >= Some(0.0) && idle < Some(100.0), "{phase}: {stdout}");
            for figure in FIGURES {
                assert!(figures[figure].as_f64() > Some(0.0), "{phase} {figure}: {stdout}");
            }
            let pages = if phase == "overwrite" { PAGES / 2 } else { PAGES };
            let blocks = pages.div_ceil(block_pages);
            assert_eq!(figures["requests"], blocks, "{phase}: {stdout}");
            assert_eq!(figures["pages"], blocks * block_pages, "{phase}: {stdout}");
        }
    }
}

#[test]
fn several_vms_and_queues_share_one_load() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let names = ["web1", "web2", "web3"];
    let vm = |name| format!("[[vm]]\nname = \"{name}\"\nsize = \"16MiB\"\nqueues = 2\n");
    let config = names.map(vm).concat();
    let daemon = Daemon::start(dir.path(), &format!("workers = 2\n[pool]\nmax = \"64MiB\"\n{config}"));
    let sockets = names.map(|name| daemon.socket(name).to_str().unwrap().to_owned());
    let all = |options: &[&str]| {
        let args = sockets.iter().map(String::as_str).chain(options.iter().copied());
        bench_with(&args.collect::<Vec<_>>())
    };
    for (depth, phases) in
        [("7", "store,load,overwrite,mixed,latency"), ("128", "store,load,discard"), ("1", "store,mixed")]
    {
        let options = ["--pages", "4000", "--queues", "2", "--qd", depth, "--phases", phases, "--json"];
        let (code, stdout, stderr) = all(&options);
        assert_eq!(code, Some(0), "{stderr}");
        let found = report(&stdout);
        for (field, right) in
            [("vms", 3), ("queues", 2), ("pages", 4000), ("device_pages", 4096), ("mismatched_pages", 0)]
        {
            assert_eq!(found[field], right, "{field}: {stdout}");
        }
        for (_, figures) in found["phases"].as_object().unwrap() {
            assert!(figures["requests"] == 4000 || figures["requests"] == 2000, "{stdout}");
        }
        assert!(found["compression_ratio"].as_f64() > Some(2.0), "{stdout}");
    }
    let status = daemon.status();
    let held = |name: &str| {
        status["vms"].as_array().unwrap().iter().find(|vm| vm["name"] == name).unwrap()["stores"].clone()
    };
    let stores = names.map(|name| held(name).as_u64().unwrap());
    assert!(stores.iter().all(|count| stores[0].abs_diff(*count) < 400 && *count > 2000), "{stores:?}");
    let (code, _, stderr) = all(&["--queues", "3"]);
    assert!(code == Some(1) && stderr.contains("has 2 queues, not 3"), "{stderr}");
    let (code, _, stderr) = all(&["--pages", "2"]);
    assert!(
        code == Some(1) && stderr.contains("2 pages are not a block of 4KiB for each of 3 VMs"),
        "{stderr}"
    );
    let (code, _, stderr) = all(&["--no-poll"]);
    assert!(code == Some(1) && stderr.contains("one socket and one queue"), "{stderr}");
    let (code, _, stderr) = all(&[&sockets[0]]);
    assert!(code == Some(1) && stderr.contains("is given twice"), "{stderr}");
    let (code, stdout, stderr) = all(&["--phases", "store"]);
    assert!(
        code == Some(0) && stdout.contains(" and 2 more ") && stdout.contains("in 3 queues"),
        "{stdout}{stderr}"
    );
}

#[test]
fn the_codec_is_measured_without_a_back_end() {
    let (code, stdout, stderr) = bench_with(&["--codec-alone", "--pages", "2000", "--json"]);
    assert_eq!(code, Some(0), "{stderr}");
    let found = report(&stdout);
    assert_eq!((&found["compressor"], &found["synthetic"]), (&"lz4".into(), &true.into()), "{stdout}");
    for way in ["store", "load"] {
        assert_eq!(found[way]["pages"], 2000, "{stdout}");
        assert!(found[way]["pages_per_second"].as_f64() > Some(0.0), "{stdout}");
    }
    let (code, stdout, stderr) = bench_with(&["--codec-alone", "--pages", "2000", "--compressor", "zstd:1"]);
    assert!(code == Some(0) && stdout.starts_with("zstd:1 alone: 2000 pages"), "{stdout}{stderr}");
}

#[test]
fn a_dictionary_is_learned_from_pages_that_are_not_measured_or_it_is_said_why_not() {
    let learned = ["--codec-alone", "--pages", "500", "--compressor", "zstd:1+dictionary"];
    let (code, stdout, stderr) = bench_with(&learned);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stdout.starts_with("zstd:1+dictionary alone: 500 pages (2048 synthetic pages cycled)"),
        "{stdout}"
    );
    assert!(stdout.contains("a dictionary of 1024 other pages takes "), "{stdout}");
    let dir = tempfile::tempdir().unwrap();
    let few = dir.path().join("few.pages");
    std::fs::write(&few, vec![1; 100 * 4096]).unwrap();
    let (code, _, stderr) = bench_with(&[&learned[..], &["--corpus", few.to_str().unwrap()]].concat());
    assert!(code == Some(1) && stderr.contains("50 pages are too few"), "{stderr}");
}

#[test]
fn the_text_has_the_ratio_or_says_that_there_is_none() {
    let (_dir, daemon) = daemon();
    let (code, stdout, stderr) = bench(&daemon.socket("web1"), &["--phases", "store,load"]);
    assert_eq!(code, Some(0), "{stderr}");
    let line = |text: &str| text.lines().find(|line| line.contains("compression ratio")).map(str::to_owned);
    let ratio = line(&stdout).unwrap();
    let number: f64 = ratio.trim_start_matches("compression ratio ").parse().unwrap();
    assert!(number > 2.0, "{stdout}");
    assert!(stdout.contains("mismatched pages 0, failed requests 0"), "{stdout}");

    // The same device on a socket with no control socket beside it: the daemon has to be named.
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("disk");
    std::os::unix::fs::symlink(daemon.socket("web1"), &link).unwrap();
    let (_, stdout, _) = bench(&link, &["--phases", "load"]);
    assert!(line(&stdout).unwrap().contains("unknown"), "{stdout}");
    let control = daemon.socket("control");
    for (option, value) in [("--socket", control.clone()), ("--config", daemon.config())] {
        let (_, stdout, _) = bench(&link, &["--phases", "load", option, value.to_str().unwrap()]);
        assert_eq!(line(&stdout), Some(ratio.clone()), "{stdout}");
    }
    drop(daemon);
    let (code, _, stderr) = bench(&link, &["--socket", control.to_str().unwrap()]);
    assert!(code == Some(1) && stderr.contains(control.to_str().unwrap()), "{stderr}");

    // A back end that has none.
    let host = Host::start(&["web1"]);
    let (code, stdout, stderr) = bench(&host.socket("web1"), &["--phases", "store", "--json"]);
    assert_eq!((code, report(&stdout).get("compression_ratio")), (Some(0), Some(&Value::Null)), "{stderr}");
}

#[test]
fn a_daemon_that_is_killed_and_comes_back_is_a_pause() {
    let (_dir, mut daemon) = daemon();
    let socket = daemon.socket("web1");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.arg("bench").arg(&socket).args(["--pages", "16000", "--qd", "4", "--reconnect", "60s", "--json"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut bench = command.spawn().unwrap();
    let mut kills = 0;
    while kills < 5 && bench.try_wait().unwrap().is_none() {
        // Since its start: in the middle of a phase, and not while the front end introduces itself.
        let vm = daemon.vm("web1");
        if vm["stores"].as_u64() > Some(0) || vm["loads"].as_u64() > Some(10) {
            daemon.restart();
            kills += 1;
        }
    }
    let output = bench.wait_with_output().unwrap();
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    let found = report(&stdout);
    let pauses = found["pauses"]["count"].as_u64().unwrap();
    assert!((1..=kills).contains(&pauses) && found["pauses"]["longest_ms"].as_f64() > Some(0.0), "{stdout}");
    assert_eq!((&found["mismatched_pages"], &found["failed_requests"]), (&0.into(), &0.into()), "{stdout}");
    for phase in PHASES {
        let pages = if phase == "overwrite" { 8000 } else { 16000 };
        assert_eq!(found["phases"][phase]["pages"], pages, "{phase}: {stdout}");
    }

    // The first connection is no pause.
    drop(daemon);
    let (code, _, stderr) = bench_with(&[socket.to_str().unwrap(), "--reconnect", "60s"]);
    assert!(code == Some(1) && stderr.contains("no back end answers"), "{stderr}");
}

#[test]
fn other_pages_than_were_stored_fail_the_run() {
    let (_dir, daemon) = daemon();
    let socket = daemon.socket("web1");
    assert_eq!(bench(&socket, &["--phases", "store"]).0, Some(0));
    {
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let mut device = Device::connect(&socket, memory, Options::default()).unwrap();
        let mut disk = device.start().unwrap().remove(0);
        let two: Vec<_> = disk.read_pages(100, 2).unwrap().into_iter().rev().collect();
        disk.write_pages(100, &two).unwrap();
        disk.write_pages(200, &[page_of(1, 1)]).unwrap();
        device.stop().unwrap();
    }
    let (code, stdout, stderr) = bench(&socket, &["--phases", "load", "--json"]);
    assert_eq!(report(&stdout)["mismatched_pages"], 3, "{stdout}");
    assert_eq!(code, Some(1));
    assert!(stderr.contains("3 pages came back wrong and 0 requests failed"), "{stderr}");
    let (code, stdout, _) = bench(&socket, &["--phases", "load"]);
    assert!(code == Some(1) && stdout.contains("mismatched pages 3, failed requests 0"), "{stdout}");
}

#[test]
fn pages_that_were_damaged_fail_the_run() {
    let (dir, mut daemon) = daemon();
    let socket = daemon.socket("web1");
    assert_eq!(bench(&socket, &["--phases", "store"]).0, Some(0));
    daemon.kill();
    let arena = dir.path().join("state/arena");
    let file = OpenOptions::new().read(true).write(true).open(&arena).unwrap();
    damage(&file);
    daemon.restart();
    let (code, stdout, stderr) = bench(&socket, &["--phases", "load", "--json"]);
    let found = report(&stdout);
    assert_eq!(code, Some(1));
    assert_eq!(found["mismatched_pages"], 0, "no wrong page gets through: {stdout}");
    let failed = found["failed_requests"].as_u64().unwrap();
    assert!(failed > 10, "{stdout}");
    assert!(stderr.contains(&format!("0 pages came back wrong and {failed} requests failed")), "{stderr}");
}

/// Turns one byte in each of some pages of a sparse file's backed parts.
fn damage(file: &std::fs::File) {
    use rustix::fs::{SeekFrom, seek};
    let (mut at, mut turned) = (0, 0);
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        for page in (start..at).step_by(4096).take(50) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, page + 40).unwrap();
            file.write_all_at(&[!byte[0]], page + 40).unwrap();
            turned += 1;
        }
    }
    assert!(turned > 50, "{turned}");
}
