//! The binary as scripts see it: exit status, stdout, stderr. Needs no daemon and no privileges.

// clippy.toml excuses #[test] functions only, and not what they call.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use ballast::control::access::Access;
use ballast::control::api::{
    BadPage, CheckOrder, CheckState, CheckStatus, ClearError, Clearing, CompressorPool, CompressorPoolState,
    Exposition, Host, NewVm, PoolChange, PoolStatus, ReloadReport, Reloading, Removal, Report, Reporting,
    SetError, Status, Survey, VmChange, VmDetails, VmRemoved, VmReport, VmStatus,
};
use ballast::control::server::Server;
use ballast::control::socket::Sockets;

fn fake_server(socket: &Path) -> Server {
    let access = Access::of_control(None).unwrap();
    let listener = Sockets::of_group(access.gid()).listen(socket).unwrap();
    Server::start(listener, access, Arc::new(FakeHost)).unwrap()
}

fn ballast(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ballast")).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Exit status, stdout, stderr.
fn outcome(args: &[&str]) -> (Option<i32>, String, String) {
    let output = ballast(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

struct Written {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

impl Written {
    fn new(text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ballast.toml");
        let runtime_dir = format!("runtime_dir = {:?}\n", dir.path());
        std::fs::write(&path, runtime_dir + text).unwrap();
        Self { _dir: dir, path }
    }

    fn path(&self) -> &str {
        self.path.to_str().unwrap()
    }
}

const TWO_VMS: &str = "[[vm]]\nname = \"web1\"\nsize = \"1GiB\"\n[[vm]]\nname = \"web2\"\nsize = \"1GiB\"\n";

#[test]
fn a_wrong_configuration_is_exit_2_with_key_value_and_range() {
    let config = Written::new("workers = 99\n");
    for command in [
        &["serve"][..],
        &["status"],
        &["vm", "clear", "web1"],
        &["vm", "args", "web1", "--vmm=qemu"],
        &["vm", "set", "web1", "--weight=7"],
        &["pool", "set", "--compressor=lz4"],
    ] {
        let (code, stdout, stderr) = outcome(&[command, &["--config", config.path()]].concat());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{command:?}: {stderr}");
        for part in [config.path(), "workers", "99", "1 to 64"] {
            assert!(stderr.contains(part), "{command:?}: {stderr}");
        }
    }
}

#[test]
fn a_missing_configuration_is_exit_2_with_its_path() {
    let (code, _, stderr) = outcome(&["serve", "--config", "/nonexistent/ballast.toml"]);
    assert_eq!(code, Some(2), "{stderr}");
    assert!(stderr.contains("/nonexistent/ballast.toml") && stderr.contains("No such file"), "{stderr}");
}

#[test]
fn status_without_a_daemon_is_exit_1_with_the_socket() {
    let config = Written::new(TWO_VMS);
    let socket = config.path.with_file_name("control.sock");
    let socket = socket.to_str().unwrap();
    for args in [["status", "--config", config.path()], ["status", "--socket", socket]] {
        let (code, stdout, stderr) = outcome(&args);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
        assert!(stderr.contains(socket) && stderr.contains("ballast serve"), "{stderr}");
    }
}

#[test]
fn an_unknown_vm_is_exit_1_with_the_names_that_exist() {
    let config = Written::new(TWO_VMS);
    let (code, stdout, stderr) = outcome(&["vm", "args", "web3", "--vmm", "qemu", "--config", config.path()]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""), "{stderr}");
    assert!(stderr.contains("\"web3\"") && stderr.contains("web1, web2"), "{stderr}");
}

#[test]
fn a_wrong_usage_is_exit_2() {
    for args in [&["sevre"][..], &[], &["status", "--jsno"], &["vm", "args", "web1"]] {
        assert_eq!(outcome(args).0, Some(2), "{args:?}");
    }
    let (code, _, stderr) = outcome(&["vm", "args", "web1", "--vmm", "xen"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("qemu") && stderr.contains("cloud-hypervisor"), "{stderr}");
    let (code, _, stderr) = outcome(&["vm", "args", "web1", "--vmm", "libvirt", "--format", "json"]);
    assert!(code == Some(2) && stderr.contains("libvirt takes only xml"), "{stderr}");
    let (code, _, stderr) = outcome(&["vm", "args", "web1", "--vmm", "qemu", "--memory", "1000KiB"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("multiple of 1MiB"), "{stderr}");
}

/// The arguments, then what the message must hold.
const WRONG_CHANGES: &[(&[&str], [&str; 2])] = &[
    (&["vm", "set", "web1"], ["--limit", "--writeback"]),
    (&["vm", "set", "--weight", "7"], ["<NAME>", "required"]),
    (&["vm", "set", "web1", "--limit", "1KiB"], ["--limit", "1MiB to 16TiB"]),
    (&["vm", "set", "web1", "--limit", "1GB"], ["--limit", "IEC unit"]),
    (&["vm", "set", "web1", "--reserve", "much"], ["--reserve", "IEC unit"]),
    (&["vm", "set", "web1", "--weight", "0"], ["--weight", "1 to 10000"]),
    (&["vm", "set", "web1", "--weight", "heavy"], ["--weight", "1 to 10000"]),
    (&["vm", "set", "web1", "--writeback", "yes"], ["--writeback", "true, false"]),
    (&["vm", "set", "web1", "--limit", "512"], ["--limit", "write \"512MiB\""]),
    (&["vm", "add", "web1", "--size", "8"], ["--size", "write \"8MiB\" or \"8GiB\""]),
    (&["vm", "add", "web1"], ["--size", "required"]),
    (&["vm", "add", "web1", "--size", "8GiB", "--clear-after", "30"], ["--clear-after", "s, m, h or d"]),
    (&["vm", "add", "web1", "--size", "8GiB", "--lmit", "1GiB"], ["--lmit", "'--limit'"]),
    (&["vm", "ad", "web1"], ["'ad'", "'add'"]),
    (&["vm", "args", "web1", "--vmm", "qemu", "--memory", "2"], ["--memory", "write \"2MiB\""]),
    (&["check", "--rate", "256"], ["--rate", "write \"256MiB\""]),
    (&["bench", "/s", "--block-size", "4096"], ["--block-size", "write \"4096MiB\""]),
    (&["bench"], ["<SOCKET>", "required"]),
    (&["bench", "/s", "--queues", "0"], ["--queues", "1..=64"]),
    (&["bench", "/s", "--codec-alone"], ["SOCKET", "cannot be used"]),
    (&["bench", "--codec-alone", "--compressor", "lz5"], ["\"lz5\"", "\"+dictionary\""]),
    (&["pool"], ["pool", "set"]),
    (&["pool", "set"], ["--compressor", "required"]),
    (&["pool", "set", "--recompress", "--forget", "--compressor", "lz4"], ["--forget", "cannot be used"]),
    (&["pool", "set", "--compressor", "gzip"], ["\"gzip\"", "-7 to 22"]),
    (&["pool", "set", "--compressor", "zstd:23"], ["\"zstd:23\"", "-7 to 22"]),
];

#[test]
fn a_wrong_change_is_exit_2_with_what_would_be_right() {
    for (args, parts) in WRONG_CHANGES {
        let (code, stdout, stderr) = outcome(args);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{args:?}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{args:?}: {stderr}");
        }
    }
}

/// A daemon's answers over its control socket, from a host that knows the VM "web1".
struct FakeHost;

impl Host for FakeHost {
    fn status(&self) -> Status {
        Status::default()
    }

    fn metrics(&self, exposition: Exposition) -> String {
        format!("{exposition:?}\n")
    }

    fn vm(&self, name: &str) -> Result<VmDetails, SetError> {
        self.add_vm(name, NewVm::default())
    }

    fn add_vm(&self, name: &str, vm: NewVm) -> Result<VmDetails, SetError> {
        let status = VmStatus { name: name.to_owned(), size_bytes: vm.size_bytes, ..VmStatus::default() };
        Ok(VmDetails { status, socket: Some("/run/x.sock".to_owned()), ..VmDetails::default() })
    }

    fn remove_vm(&self, name: &str, removal: Removal) -> Result<VmRemoved, SetError> {
        Ok(VmRemoved { removed: name.to_owned(), dropped_pages: 7, returns: removal.runtime })
    }

    fn reload(&self, reloading: Reloading) -> Result<ReloadReport, SetError> {
        Ok(ReloadReport { path: "/f".to_owned(), check: reloading.check, changes: Vec::new() })
    }

    fn clear_vm(&self, name: &str, _: Clearing) -> Result<(), ClearError> {
        Err(ClearError::Connected { name: name.to_owned() })
    }

    fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, SetError> {
        if name != "web1" {
            return Err(SetError::Unknown { name: name.to_owned(), known: vec!["web1".to_owned()] });
        }
        Ok(VmStatus {
            name: name.to_owned(),
            limit_bytes: change.limit_bytes.unwrap_or(1 << 30),
            reserve_bytes: change.reserve_bytes.unwrap_or(0),
            weight: change.weight.unwrap_or(100),
            writeback: change.writeback.unwrap_or(true),
            ..VmStatus::default()
        })
    }

    fn release_vm(&self, name: &str) -> Result<VmStatus, SetError> {
        Ok(VmStatus { name: name.to_owned(), crashes: 7, ..VmStatus::default() })
    }

    fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, SetError> {
        let compressor = change.compressor.map(|compressor| compressor.to_string()).unwrap_or_default();
        let old = CompressorPool {
            compressor: "lz4".to_owned(),
            state: CompressorPoolState::Draining,
            objects: u64::from(change.recompress),
            objects_at_first: 4,
        };
        Ok(PoolStatus { compressor, pools: vec![old], ..PoolStatus::default() })
    }

    fn begin_check(&self, order: CheckOrder) -> Result<CheckStatus, SetError> {
        // The rate says what is to be found.
        let bad = vec![BadPage { vm: "web1".to_owned(), slot: 7, reason: "it is bad".to_owned() }];
        let bad = if order.rate_bytes == 1 << 20 { bad } else { Vec::new() };
        let state = CheckState::Done;
        let (rate_bytes, bad_pages) = (order.rate_bytes, bad.len() as u64);
        Ok(CheckStatus { state, rate_bytes, memory_pages: 9, bad_pages, bad, ..CheckStatus::default() })
    }

    fn check(&self) -> Option<CheckStatus> {
        None
    }

    fn report(&self, reporting: Reporting) -> Result<Report, SetError> {
        if let Some(name) = reporting.vm.filter(|name| name != "web1") {
            return Err(SetError::Unknown { name, known: vec!["web1".to_owned()] });
        }
        let vm = VmReport { name: "web1".to_owned(), survey: Some(Survey::default()), ..VmReport::default() };
        let compressor = format!("{:?}", reporting.sample_pages);
        Ok(Report { compressor, vms: vec![vm], ..Report::default() })
    }
}

#[test]
fn a_report_is_shown_as_text_as_json_and_drawn() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let _server = fake_server(&socket);
    let ask = |args: &[&str]| outcome(&[args, &["--socket", socket.to_str().unwrap()]].concat());
    let (code, stdout, stderr) = ask(&["report", "--vm", "web1"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.starts_with("web1\n  no pages are stored\n"), "{stdout}");
    let file = dir.path().join("report.svg");
    let (code, json, _) = ask(&["report", "--json", "--sample", "9", "--svg", file.to_str().unwrap()]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (code, &json["compressor"], &json["vms"][0]["name"]),
        (Some(0), &"Some(9)".into(), &"web1".into())
    );
    assert!(std::fs::read_to_string(&file).unwrap().contains(">no pages are stored</text>"));

    let nowhere = dir.path().join("no/where.svg");
    let (code, _, stderr) = ask(&["report", "--svg", nowhere.to_str().unwrap()]);
    assert_eq!(code, Some(1));
    for part in [nowhere.to_str().unwrap(), "can't be written", "No such file", "a directory that exists"] {
        assert!(stderr.contains(part), "{stderr}");
    }
    let (code, stdout, stderr) = ask(&["report", "--vm", "web2"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("\"web2\"") && stderr.contains("the VMs are: web1"), "{stderr}");
    let (code, _, stderr) = ask(&["report", "--sample", "8193"]);
    assert!(code == Some(2) && stderr.contains("0..=8192"), "{stderr}");
}

#[test]
fn a_check_that_finds_something_is_exit_1() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let _server = fake_server(&socket);
    let ask = |args: &[&str]| outcome(&[args, &["--socket", socket.to_str().unwrap()]].concat());
    let (code, stdout, stderr) = ask(&["check"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert!(stdout.contains("9 in memory") && stdout.ends_with("0 bad\n"), "{stdout}");
    let (code, stdout, stderr) = ask(&["check", "web1", "--rate", "1MiB"]);
    assert_eq!(code, Some(1));
    assert!(
        stdout.ends_with("bad: web1 slot 7: it is bad\n") && stderr.contains("1 stored page"),
        "{stdout}"
    );
    let (_, json, _) = ask(&["check", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&json["rate_bytes"], &json["state"]), (&(256 << 20).into(), &"done".into()));
    let (code, _, stderr) = ask(&["check", "--rate", "1KiB"]);
    assert!(code == Some(2) && stderr.contains("at least 1MiB"), "{stderr}");
}

#[test]
fn a_change_prints_the_new_state() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("control.sock");
    let _server = fake_server(&socket);
    let ask = |args: &[&str]| outcome(&[args, &["--socket", socket.to_str().unwrap()]].concat());
    let set =
        ["vm", "set", "web1", "--limit", "1.5GiB", "--reserve=512MiB", "--weight=7", "--writeback=false"];
    let printed = "web1: limit 1.50GiB, reserve 512MiB, weight 7, writeback false\n";
    assert_eq!(ask(&set), (Some(0), printed.to_owned(), String::new()));
    let (code, json, _) = ask(&["vm", "set", "web1", "--weight", "7", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["weight"], &json["writeback"]), (Some(0), &7.into(), &true.into()));
    let (code, text, _) = ask(&["pool", "set", "--compressor", "zstd:3", "--recompress"]);
    assert!(code == Some(0) && text.contains("(zstd:3)"), "{text}");
    assert!(text.ends_with("draining: lz4, objects left: 1; 3 of 4 objects done (75 %)\n"), "{text}");
    let (code, json, _) = ask(&["pool", "set", "--compressor=zstd", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((code, &json["compressor"]), (Some(0), &"zstd:1".into()));
    let (code, stdout, stderr) = ask(&["vm", "set", "web2", "--weight", "7"]);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert!(stderr.contains("\"web2\"") && stderr.contains("the VMs are: web1"), "{stderr}");
}

#[test]
fn vm_args_are_one_shell_command_or_json() {
    let config = Written::new(TWO_VMS);
    let args = [
        "vm",
        "args",
        "web2",
        "--vmm",
        "qemu",
        "--memory",
        "512MiB",
        "--qemu-before-9.2",
        "--config",
        config.path(),
    ];
    let (code, stdout, stderr) = outcome(&args);
    assert_eq!(code, Some(0), "{stderr}");
    assert!(
        stdout.contains("web2.sock,reconnect=1 \\\n") && stdout.contains("size=512M,share=on"),
        "{stdout}"
    );
    let pasted: String =
        stdout.lines().filter(|line| !line.starts_with('#')).map(|line| format!("{line}\n")).collect();
    let words = Command::new("sh").args(["-c", &format!("printf '%s\\n' {pasted}")]).output().unwrap();
    let words = String::from_utf8(words.stdout).unwrap();
    let (_, json, _) = outcome(&[&args[..], &["--json"]].concat());
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let expected: Vec<_> = json["args"].as_array().unwrap().iter().map(|arg| arg.as_str().unwrap()).collect();
    assert_eq!(words.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_reader_that_left_is_no_failure() {
    let config = Written::new(TWO_VMS);
    let mut child = Command::new(env!("CARGO_BIN_EXE_ballast"))
        .args(["vm", "args", "web1", "--vmm", "qemu", "--config", config.path()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Closed at once; whether the child has written by then, it must end well.
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && !stderr.contains("panicked"), "{stderr}");
}

#[test]
fn help_and_version_are_exit_0() {
    for args in [&["--help"][..], &["--version"], &["vm", "args", "--help"]] {
        assert_eq!(outcome(args).0, Some(0), "{args:?}");
    }
}
