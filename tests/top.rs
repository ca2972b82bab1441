//! `ballast top` of a daemon that works: as lines, as JSON, and on a terminal, which it leaves as it was.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use support::daemon::Daemon;
use support::working::Guest;

const PATIENCE: Duration = Duration::from_secs(60);
const TWO_VMS: &str = "[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n\
    [[vm]]\nname = \"db\"\nsize = \"16MiB\"\n";

fn top(daemon: &Daemon, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
    command.arg("top").args(args).arg("--config").arg(daemon.config()).stdin(Stdio::null());
    command
}

#[test]
fn what_is_no_terminal_gets_lines_and_json_a_line_for_each_look() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut guest = Guest::attach(&daemon, "web1");
    let args = ["--json", "--interval", "0.1", "--sort", "stores"];
    let mut child = top(&daemon, &args).stdout(Stdio::piped()).spawn().unwrap();
    let looks = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut looks = looks.map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let first = looks.next().unwrap();
    assert_eq!(first["vms"].as_array().unwrap().len(), 2);
    assert_eq!(first["pool_max_bytes"], 64 << 20);
    // It has looked before the guest works: some later look finds what was stored since the one before.
    guest.work();
    let stores = |look: &Value| {
        let vms = look["vms"].as_array().unwrap().clone();
        let vm = vms.iter().find(|vm| vm["vm"] == "web1").unwrap().clone();
        vm["stores_per_second"].as_f64().unwrap()
    };
    let deadline = Instant::now() + PATIENCE;
    while stores(&looks.next().unwrap()) == 0.0 {
        assert!(Instant::now() < deadline, "the guest has stored, and no look shows it");
    }
    child.kill().unwrap();
    child.wait().unwrap();

    let output = top(&daemon, &["--json", "--count", "2", "--interval", "0.1"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.lines().count() == 2, "{text}");

    let output = top(&daemon, &["--count", "1", "--interval", "0.1", "--sort", "vm"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    let heading = lines.iter().position(|line| line.starts_with("VM ")).unwrap();
    assert!(output.status.success() && lines[0].starts_with("pool: "), "{text}");
    assert!(lines[heading + 1].starts_with("db ") && lines[heading + 2].starts_with("web1 "), "{text}");
    assert_eq!(lines.len(), heading + 3, "{text}");
}

#[test]
fn a_daemon_that_dies_is_waited_for_and_one_that_never_was_is_an_error() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut command = top(&daemon, &["--json", "--interval", "0.1"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut looks = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(looks.next().unwrap().unwrap().contains("\"vm\":\"web1\""));
    daemon.kill();
    let mut said = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("no daemon answers") && said.contains("asked again"), "{said}");
    let output = top(&daemon, &["--count", "1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    daemon.restart();
    // Those that were printed before it died may still be on their way; there are not that many.
    for _ in 0..20 {
        assert!(looks.next().unwrap().unwrap().contains("\"vm\":\"web1\""));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

/// A shell on a terminal of its own, which `script` makes.
struct Terminal {
    child: Child,
    keys: Option<ChildStdin>,
    shown: Receiver<Vec<u8>>,
    text: String,
}

impl Terminal {
    fn run(shell: &str) -> Self {
        let mut command = Command::new("script");
        command.args(["-qefc", shell, "/dev/null"]).env("TERM", "xterm").env("SHELL", "/bin/sh");
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child =
            command.spawn().expect("script is there: Debian's package bsdutils, which every Debian has");
        let mut output = child.stdout.take().unwrap();
        let (tell, shown) = mpsc::channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                if tell.send(bytes[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        let keys = child.stdin.take();
        Self { child, keys, shown, text: String::new() }
    }

    /// Waits until all of `wanted` were shown since the last wait, in any order.
    fn wait_for(&mut self, wanted: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        while !wanted.iter().all(|wanted| self.text.contains(wanted)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let bytes = self.shown.recv_timeout(left);
            let bytes = bytes.unwrap_or_else(|_| panic!("{wanted:?} is not among {:?}", self.text));
            self.text.push_str(&String::from_utf8_lossy(&bytes));
        }
        std::mem::take(&mut self.text)
    }

    fn press(&mut self, keys: &str) {
        let stdin = self.keys.as_mut().unwrap();
        stdin.write_all(keys.as_bytes()).unwrap();
        stdin.flush().unwrap();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.keys.take();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A terminal of 30 lines of 150, with `ballast top` in it; what it was like before and after is compared.
fn on_a_terminal(daemon: &Daemon, environment: &str) -> Terminal {
    on_a_terminal_of(daemon, environment, [30, 150])
}

fn on_a_terminal_of(daemon: &Daemon, environment: &str, [rows, columns]: [u16; 2]) -> Terminal {
    let (program, config) = (env!("CARGO_BIN_EXE_ballast"), daemon.config());
    Terminal::run(&format!(
        "stty rows {rows} cols {columns}; before=$(stty -g); {environment} {program} top --interval 0.2 --sort vm --config {}; \
         echo \"ended with $?\"; [ \"$before\" = \"$(stty -g)\" ] && echo as it was",
        config.display()
    ))
}

#[test]
fn on_a_terminal_it_shows_sorts_and_quits_and_leaves_it_as_it_was() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), TWO_VMS);
    Guest::attach(&daemon, "web1").work();
    let mut terminal = on_a_terminal(&daemon, "env -u NO_COLOR");
    let first = terminal.wait_for(&["\u{1b}[?1049h", "pool:", "STORED", "web1", "db", "quit"]);
    assert!(first.find("db").unwrap() < first.find("web1").unwrap(), "by name: {first:?}");
    // The row of a VM that stored something moves up, so both names are drawn again.
    terminal.press("t");
    let sorted = terminal.wait_for(&["web1", "db"]);
    assert!(sorted.find("web1").unwrap() < sorted.find("db").unwrap(), "by what is stored: {sorted:?}");
    assert!(!sorted.contains("as it was"), "{sorted:?}");
    daemon.kill();
    terminal.wait_for(&["no daemon answers"]);
    daemon.restart();
    terminal.wait_for(&["pool:"]);
    terminal.press("q");
    terminal.wait_for(&["\u{1b}[?1049l", "ended with 0", "as it was"]);
}

#[test]
fn a_vm_that_worked_has_a_sparkline() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut guest = Guest::attach(&daemon, "web1");
    let mut terminal = on_a_terminal(&daemon, "NO_COLOR=1");
    let idle = terminal.wait_for(&["PAGES/s", "quit"]);
    assert!(!idle.contains('█'), "nobody has worked: {idle:?}");
    guest.work();
    // The busiest look is as high as there is room, and quiet ones follow.
    terminal.wait_for(&["█", "▁"]);
    terminal.press("q");
    terminal.wait_for(&["ended with 0", "as it was"]);
}

#[test]
fn on_the_smallest_usual_terminal_nothing_that_matters_is_missing() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut guest = Guest::attach(&daemon, "web1");
    let mut terminal = on_a_terminal_of(&daemon, "NO_COLOR=1", [24, 80]);
    let wanted =
        ["STORES/s", "LOADS/s", "FILE/s", "RATIO", "SAVED", "LIMIT", "WAITS", "PRESSURE", "PAGES/s", "keys"];
    let screen = terminal.wait_for(&wanted);
    assert!(!screen.contains("TARGET"), "there is no room for it: {screen:?}");
    guest.work();
    terminal.wait_for(&["█"]);
    terminal.press("?");
    terminal.wait_for(&["TARGET", "again"]);
    terminal.press("q");
    terminal.wait_for(&["ended with 0", "as it was"]);
}

/// What a shell does so that what it starts ignores these signals, as `nohup` does.
const IGNORING: &str = "trap '' HUP TERM; ";

/// A terminal that shows the daemon's VMs, and the process that draws. Its shell does `first`.
fn shown_by(daemon: &Daemon, dir: &Path, first: &str) -> (Terminal, Pid) {
    let pid = dir.join("pid");
    // The shell says who it is and becomes the program.
    let environment = format!("{first}sh -c 'echo $$ >{}; exec \"$0\" \"$@\"'", pid.display());
    let mut terminal = on_a_terminal(daemon, &environment);
    terminal.wait_for(&["\u{1b}[?1049h", "web1", "quit"]);
    let pid = std::fs::read_to_string(pid).unwrap().trim().parse().unwrap();
    (terminal, Pid::from_raw(pid))
}

#[test]
fn a_signal_ends_it_and_leaves_the_terminal_as_it_was() {
    for first in ["", IGNORING] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let daemon = Daemon::start(dir.path(), TWO_VMS);
        let (mut terminal, pid) = shown_by(&daemon, dir.path(), first);
        kill(pid, Signal::SIGTERM).unwrap();
        // 128 and the signal's number: whoever sent it sees that it was that.
        terminal.wait_for(&["\u{1b}[?1049l", "ended with 143", "as it was"]);
    }
}

#[test]
fn it_ends_with_its_terminal() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let (terminal, pid) = shown_by(&daemon, dir.path(), "");
    ends_without(terminal, pid);
}

#[test]
fn it_ends_with_its_terminal_even_if_nobody_tells_it() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let (terminal, pid) = shown_by(&daemon, dir.path(), IGNORING);
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
    let ignored = u64::from_str_radix(ignored, 16).unwrap();
    assert_eq!(ignored & 1 << (Signal::SIGHUP as u32 - 1), 1, "the test tests nothing: {ignored:#x}");
    ends_without(terminal, pid);
}

fn ends_without(terminal: Terminal, pid: Pid) {
    drop(terminal);
    let deadline = Instant::now() + PATIENCE;
    while kill(pid, None).is_ok() {
        assert!(Instant::now() < deadline, "it runs on without a terminal");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn without_colours_none_is_set() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), TWO_VMS);
    let mut terminal = on_a_terminal(&daemon, "NO_COLOR=1");
    let mut seen = terminal.wait_for(&["web1", "quit"]);
    terminal.press("q");
    seen.push_str(&terminal.wait_for(&["ended with 0", "as it was"]));
    let coloured = (30..38).chain(90..98).find(|colour| seen.contains(&format!("\u{1b}[{colour}m")));
    assert_eq!(coloured, None, "{seen:?}");
    assert!(!seen.contains("\u{1b}[38;"), "{seen:?}");
}
