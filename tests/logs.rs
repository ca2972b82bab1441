//! The log as people and programs read it: text without colours in a pipe, JSON lines, more or less of it, and on every line
//! that concerns a VM which one.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(60);
const CONFIG: &str = "[pool]\npressure = false\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";

/// What a daemon logs that is asked to reload once and that a VMM connects to, started with these options.
fn logged(options: &[&str], filter: Option<&str>) -> String {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let at = |name: &str| dir.path().join(name);
    let text = format!("state_dir = {:?}\nruntime_dir = {:?}\n{CONFIG}", at("state"), at("run"));
    fs::write(at("config"), text).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.args(options).arg("serve").arg("--config").arg(at("config")).env_remove("BALLAST_LOG");
    command.stdin(Stdio::null()).stderr(File::create(at("log")).unwrap());
    let mut daemon = command.envs(filter.map(|filter| ("BALLAST_LOG", filter))).spawn().unwrap();
    let vmm = await_ok(&mut daemon, || UnixStream::connect(at("run/web1.sock")).ok());
    // A whole message that nobody knows, after which the connection is ended with a line about it.
    std::io::Write::write_all(&mut &vmm, &[0xff; 12]).unwrap();
    std::io::Read::read(&mut &vmm, &mut [0]).unwrap();
    await_ok(&mut daemon, || reload(&at("config")));
    daemon.kill().unwrap();
    daemon.wait().unwrap();
    fs::read_to_string(at("log")).unwrap()
}

fn await_ok<T>(daemon: &mut Child, mut ready: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = ready() {
            return found;
        }
        assert!(daemon.try_wait().unwrap().is_none() && Instant::now() < end, "the daemon doesn't answer");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn reload(config: &Path) -> Option<()> {
    let command = ["reload".as_ref(), "--config".as_ref(), config.as_os_str()];
    let done = Command::new(env!("CARGO_BIN_EXE_ballast")).args(command).output().unwrap();
    done.status.success().then_some(())
}

#[test]
fn text_in_a_file_has_no_colours_and_names_the_vm() {
    let log = logged(&[], None);
    assert!(!log.contains('\x1b'), "{log}");
    assert!(log.contains(" INFO ") && log.contains("ready") && !log.contains("DEBUG"), "{log}");
    let line = log.lines().find(|line| line.contains("a VMM connected")).expect(&log);
    assert!(line.contains("vm=\"web1\""), "{line}");
}

#[test]
fn every_line_of_json_is_an_object_and_those_about_a_vm_say_which() {
    let log = logged(&["--log-json"], None);
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect(line)).collect();
    let of = |message: &str| {
        lines.iter().find(|line| line["message"] == message).unwrap_or_else(|| panic!("{log}"))
    };
    assert_eq!(of("a VMM connected")["vm"], "web1");
    assert!(of("ready")["timestamp"].is_string() && of("ready")["level"] == "INFO");
    assert!(of("ready")["vm"].is_null());
}

#[test]
fn verbose_tells_more_quiet_less_and_the_environment_decides() {
    assert!(logged(&["-v"], None).contains("DEBUG"), "-v tells of what only developers want to know");
    let quiet = logged(&["-q"], None);
    assert!(!quiet.contains("INFO") && quiet.contains("WARN"), "{quiet}");
    assert_eq!(logged(&["-qq"], None), "");
    assert_eq!(logged(&["-v"], Some("off")), "");
}
