//! What is said to whoever asked for what can't be done, at the command line and at the control socket: each message names
//! what was wrong and the next step. One table for each way to be told. What a configuration may hold is in the tables
//! of `config`, and what an option may hold in that of tests/cli. And what docs/troubleshooting.md quotes is what is said.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use support::daemon::Daemon;

const VM: &str = "[[vm]]\nname = \"web1\"\nsize = \"1MiB\"\n";

/// Arguments; the exit status; what was wrong; the next step. DIR is a directory with a socket that nobody listens on.
type Said = (&'static str, i32, &'static str, &'static str);

const WITHOUT_A_DAEMON: &[Said] = &[
    ("serve --config DIR/nope.toml", 2, "DIR/nope.toml can't be read", "write one"),
    ("serve --config DIR/nope.toml", 2, "No such file", "name another with --config"),
    ("serve --config DIR", 2, "DIR can't be read", "must be a text file"),
    ("vm args web1 --vmm qemu --config DIR/nope.toml", 2, "DIR/nope.toml", "--config"),
    ("status --socket DIR/nope.sock", 1, "no daemon answers on DIR/nope.sock", "ballast serve"),
    ("status --socket DIR/silent.sock", 1, "no daemon answers on DIR/silent.sock", "ballast serve"),
    ("replay DIR/nope", 1, "DIR/nope can't be read", "name balloon.trace in the state directory"),
    ("bench DIR/nope.sock", 1, "no back end answers on DIR/nope.sock", "ballast vm show"),
    ("bench DIR/silent.sock", 1, "Connection refused", "while its daemon runs"),
    ("vm add web1 --size 8GB", 2, "\"8GB\" is not in IEC units", "did you mean \"8GiB\"?"),
    ("vm add web1 --size 8g", 2, "\"8g\"", "did you mean \"8GiB\"?"),
    ("vm set web1 --limit 512Mb", 2, "\"512Mb\"", "did you mean \"512MiB\"?"),
    ("pool set", 2, "required", "--compressor"),
    ("top --socket DIR/nope.sock", 1, "no daemon answers on DIR/nope.sock", "ballast serve"),
    ("top --interval 0", 2, "'0'", "from 0.1 to 3600"),
    ("top --sort size", 2, "'size'", "possible values: vm, stores"),
    ("report --socket DIR/silent.sock", 1, "no daemon answers on DIR/silent.sock", "ballast serve"),
    ("report --sample 9000", 2, "'9000'", "0..=8192"),
    ("reload --socket DIR/silent.sock", 1, "no daemon answers on DIR/silent.sock", "ballast serve"),
    ("check --rate 1KiB", 2, "'1KiB'", "must be at least 1MiB"),
    ("vm list --socket DIR/nope.sock", 1, "no daemon answers on DIR/nope.sock", "--config"),
    ("bench DIR/nope.sock --reconnect 30", 2, "'30'", "for example \"30s\""),
    ("demo --images DIR", 1, "DIR/vmlinuz is missing", "`images/demo` and `tests/run`"),
    ("demo --mib 3", 2, "'3'", "150..=16384"),
    ("replay DIR/size.toml", 1, "line 1 is no tick", "give a balloon.trace"),
    ("replay DIR/empty.trace", 1, "has no decision", "name balloon.trace in its state directory"),
    ("simulate growht", 1, "no scenario \"growht\"", "was \"growth\" meant?"),
    ("simulate growht", 1, "no scenario \"growht\"", "name one of these:\ncold "),
    ("completions csh", 2, "'csh'", "possible values: bash, elvish, fish"),
    ("man DIR/nope", 1, "written to DIR/nope", "name a directory that exists"),
    ("serve --config DIR/size.toml", 2, "pool.max = \"8GB\"", "did you mean \"8GiB\"?"),
    ("serve --config DIR/table.toml", 2, "invalid type", "the section [pool] with its keys: max"),
    ("serve --config DIR/vm.toml", 2, "invalid type", "a section [[vm]], in two brackets"),
    ("serve --config DIR/squeeze.toml", 2, "unknown field `mn`", "did you mean `min`?"),
    ("serve --config DIR/directory.toml", 1, "its directory is not there", "mkdir -p DIR/nowhere"),
];

const WITH_A_DAEMON: &[Said] = &[
    ("vm show web2", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("vm squeeze web1 --auto", 1, "isn't known", "ballast vm set web1 --squeeze"),
    ("vm add web1 --size 1MiB", 1, "there is a VM \"web1\" already", "ballast vm set web1"),
    ("vm remove web1", 1, "stands in the configuration", "ballast reload"),
    ("vm set web1 --reserve 1GiB", 1, "reserve 1GiB", "at most the VM's limit"),
    ("vm release web1", 0, "web1: it was in no quarantine", "its VMM may attach"),
    ("pool set --recompress", 0, "(lz4)", "pool: "),
    ("check web2", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("report --vm web2", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("report --svg DIR/nope/picture", 1, "DIR/nope/picture", "a directory that exists"),
    ("vm release web2", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("vm clear web2", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("vm args web2 --vmm qemu", 1, "there is no VM \"web2\"", "the VMs are: web1"),
    ("vm add web2 --size 1KiB", 1, "size = \"1KiB\"", "from 1MiB to 8TiB"),
    ("vm add web/2 --size 1MiB", 1, "name = \"web/2\"", "must be 1 to 64 letters"),
    ("vm set web1 --squeeze vmm=vhost-user,min=512MiB", 0, "web1: limit", "web1: squeeze { "),
    ("vm set web1 --clear-after 30d", 0, "weight 100", "web1: clear_after 30d"),
];

fn serves(dir: &Path) {
    let state = format!("state_dir = {:?}\nruntime_dir = {:?}\n", dir.join("state"), dir.join("run"));
    for (name, text) in [
        ("size", "[pool]\nmax = \"8GB\"\n".to_owned()),
        ("table", "pool = 3\n".to_owned()),
        ("vm", "[vm]\nname = \"web1\"\n".to_owned()),
        ("squeeze", format!("{VM}squeeze = {{ vmm = \"vhost-user\", mn = \"1GiB\" }}\n")),
        ("directory", format!("[writeback]\npath = {:?}\nsize = \"64MiB\"\n", dir.join("nowhere/file"))),
    ] {
        std::fs::write(dir.join(format!("{name}.toml")), format!("{state}{text}")).unwrap();
    }
    std::fs::write(dir.join("empty.trace"), "").unwrap();
}

fn check(dir: &Path, said: &[Said], more: &[&str]) {
    let here = |text: &str| text.replace("DIR", dir.to_str().unwrap());
    for (args, code, wrong, next_step) in said {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
        let args = here(args);
        let output = command.args(args.split(' ')).args(more).stdin(Stdio::null()).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        assert_eq!(output.status.code(), Some(*code), "{args}: {text}");
        for part in [wrong, next_step] {
            assert!(text.contains(&here(part)), "{args} said {text:?}, without {part:?}");
        }
        let last = text.trim_end().rsplit(": ").next().unwrap_or_default();
        assert!(last.len() < 20 || text.matches(last).count() == 1, "{args} says it twice: {text}");
    }
}

#[test]
fn commands_say_what_was_wrong_and_what_to_do() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    // Its file stays when it is closed.
    drop(UnixListener::bind(dir.path().join("silent.sock")).unwrap());
    serves(dir.path());
    check(dir.path(), WITHOUT_A_DAEMON, &[]);
    let daemon = Daemon::start(dir.path(), VM);
    check(dir.path(), WITH_A_DAEMON, &["--config", daemon.config().to_str().unwrap()]);
}

#[test]
fn a_vms_arguments_come_from_the_files_only_where_no_daemon_runs() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (config, run) = (dir.path().join("ballast.toml"), dir.path().join("run"));
    std::fs::create_dir(&run).unwrap();
    let here = format!("state_dir = {:?}\nruntime_dir = {run:?}\n", dir.path().join("state"));
    std::fs::write(&config, here + VM).unwrap();
    let ask = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
        command.args(["vm", "args", "web1", "--vmm", "qemu", "--config"]).arg(&config);
        command.stdin(Stdio::null()).output().unwrap()
    };
    assert!(ask().status.success());
    // Whatever it is, it serves VMs in a way that isn't known.
    let listener = UnixListener::bind(run.join("control.sock")).unwrap();
    let answering = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"who is there?\r\n"));
    let output = ask();
    let _ = answering.join().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{said}");
    assert!(said.contains("is not a Ballast daemon's"), "{said}");
}

#[test]
fn every_command_has_a_row() {
    let dir = tempfile::tempdir().unwrap();
    let mut man = Command::new(env!("CARGO_BIN_EXE_ballast"));
    assert!(man.arg("man").arg(dir.path()).status().unwrap().success());
    // There is a page for each: ballast-vm-add.1.
    let pages = std::fs::read_dir(dir.path()).unwrap().map(|page| page.unwrap().file_name());
    let mut commands: Vec<String> = pages
        .filter_map(|page| {
            Some(page.to_str()?.strip_prefix("ballast-")?.strip_suffix(".1")?.replace('-', " "))
        })
        .collect();
    assert!(commands.len() > 20, "{commands:?}");
    let groups = commands.clone();
    commands.retain(|command| !groups.iter().any(|other| other.starts_with(&format!("{command} "))));
    for command in commands {
        let mut rows = WITHOUT_A_DAEMON.iter().chain(WITH_A_DAEMON);
        assert!(
            rows.any(|(args, code, ..)| *code != 0 && format!("{args} ").starts_with(&format!("{command} "))),
            "`ballast {command}` has no row"
        );
    }
}

/// Method, path, body; the status; what was wrong; the next step.
const AT_THE_SOCKET: &[(&str, &str, &str, u16, &str, &str)] = &[
    ("GET", "/nope", "", 404, "nothing at this path", "GET /api/v1/openapi.json"),
    ("POST", "/api/v1/status", "", 405, "takes another method", "GET /api/v1/openapi.json"),
    ("GET", "/api/v1/check", "", 404, "no check was begun", "POST /api/v1/check"),
    ("GET", "/api/v1/vms/web2", "", 404, "no VM \"web2\"", "the VMs are: web1"),
    ("PUT", "/api/v1/vms/web1", "{\"size_bytes\": 1048576}", 409, "already", "remove it first"),
    ("DELETE", "/api/v1/vms/web1", "", 409, "stands in the configuration", "take it out there"),
    ("DELETE", "/api/v1/vms/web1?froce=1", "", 400, "`froce`", "did you mean `force`?"),
    ("POST", "/api/v1/vms/web1", "{\"wieght\": 1}", 400, "`wieght`", "did you mean `weight`?"),
    ("POST", "/api/v1/vms/web1", "{", 400, "no such change", "GET /api/v1/openapi.json"),
    ("POST", "/api/v1/vms/web1", "{\"weight\": 0}", 400, "weight = 0", "from 1 to 10000"),
    ("POST", "/api/v1/pool", "{}", 400, "changes nothing", "`compressor` must be there"),
    (
        "POST",
        "/api/v1/pool",
        "{\"compressor\": \"lz4\", \"forget\": true}",
        400,
        "both",
        "leave one of them out",
    ),
    ("POST", "/api/v1/check", "{\"rate_bytes\": 1}", 400, "rate_bytes = 1", "at least 1048576"),
];

#[test]
fn the_control_socket_says_what_was_wrong_and_what_to_do() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), VM);
    for (method, path, body, status, wrong, next_step) in AT_THE_SOCKET {
        let mut stream = UnixStream::connect(daemon.socket("control")).unwrap();
        let length = body.len();
        let head = format!("{method} {path} HTTP/1.0\r\nhost: b\r\ncontent-length: {length}\r\n\r\n");
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.contains(&format!(" {status} ")), "{method} {path}: {answer}");
        let body: Value = serde_json::from_str(body).unwrap();
        let message = body["error"].as_str().unwrap();
        for part in [wrong, next_step] {
            assert!(message.contains(part), "{method} {path} said {message:?}, without {part:?}");
        }
    }
}

#[test]
fn a_state_directory_on_a_disk_is_told_with_what_to_do() {
    // The tree that the tests are built in is on a disk.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let daemon = Daemon::start(dir.path(), VM);
    let log = daemon.log();
    for part in ["not on a tmpfs", "configure a directory of a tmpfs, such as /dev/shm/ballast"] {
        assert!(log.contains(part), "{log}");
    }
}

/// What stands in back-quotes there and is no message: how a command begins.
const COMMANDS: &[&str] =
    &["ballast", "swapon", "lsblk", "mkswap", "cat", "ls", "top", "journalctl", "apt", "systemctl", "mount"];
/// Others' messages: QEMU's, and the guest's kernel's.
const NOT_OURS: &[&str] = &[
    "vhost start failed",
    "Failed to connect to",
    "Write-error on swap-device",
    "Read-error on swap-device",
];

/// The texts of the program, with `…` for what is put in.
fn literals(dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            literals(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = std::fs::read_to_string(path).unwrap();
            // A test's texts are said by nobody.
            let source = source.split("#[cfg(test)]\nmod").next().unwrap_or_default();
            let mut rest = source.split('"');
            rest.next();
            // Every other piece is a text, as none of those that are looked for has a quote in it.
            found.extend(rest.map(|text| {
                let mut said = String::new();
                for line in text.split("\\\n") {
                    said.push_str(if said.is_empty() { line } else { line.trim_start() });
                }
                let mut pieces = said.split('{');
                let first = pieces.next().unwrap_or_default().to_owned();
                pieces.fold(first, |said, piece| {
                    said + "…" + piece.split_once('}').map_or(piece, |(_, after)| after)
                })
            }));
        }
    }
}

#[test]
fn what_troubleshooting_quotes_is_said() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut texts = Vec::new();
    literals(&root.join("src"), &mut texts);
    let page = std::fs::read_to_string(root.join("docs/troubleshooting.md")).unwrap();
    // The commands at the end are no prose.
    let prose: String = page.split("```").step_by(2).collect();
    let prose = prose.replace('\n', " ");
    let quoted = prose.split('`').skip(1).step_by(2);
    let messages: Vec<_> = quoted
        .filter(|quoted| {
            let is_setting = quoted.contains(" = ") || quoted.starts_with(['-', '<', '/', '#']);
            let first = quoted.split(' ').next().unwrap_or_default();
            quoted.contains(' ') && !is_setting && !COMMANDS.contains(&first)
        })
        .collect();
    assert!(messages.len() > 8, "{messages:?}");
    for message in messages.iter().filter(|message| !NOT_OURS.iter().any(|other| message.starts_with(other)))
    {
        // In this order, with anything where the page has an ellipsis.
        let is_said = |text: &String| {
            let mut rest = text.as_str();
            message.split('…').map(str::trim).all(|piece| match rest.split_once(piece) {
                Some((_, after)) => {
                    rest = after;
                    true
                }
                None => false,
            })
        };
        assert!(texts.iter().any(is_said), "the page quotes {message:?}, which nothing in src says");
    }
}
