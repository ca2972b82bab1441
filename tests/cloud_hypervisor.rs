//! Real VMMs with the arguments that `ballast vm args` prints: their guest works through the pages of the disk and
//! checks each itself, while the daemon is killed and started again. Where no cloud-hypervisor is on PATH, its test says
//! so on stderr and is passed over: the program is in no Debian, so `tests/run` can't provide it. Where its KVM boots no
//! Linux, the test says that too, and the guest is one without an operating system; which is also QEMU's here, so that
//! it is no stranger where it is needed.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use ballast::demo::qemu::Qemu;
use serde_json::{Value, json};
use support::daemon::Daemon;
use support::http;
use support::vm::{Vm, image};

const PROGRAM: &str = "cloud-hypervisor";
/// Where KVM boots Linux it takes a second or two; where it doesn't, it never ends.
const BOOT_PATIENCE: Duration = Duration::from_secs(30);
/// Half a minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);

const CONFIG: &str = "workers = 2\n[pool]\nmax = \"50%\"\n\
    [[vm]]\nname = \"web1\"\nsize = \"512MiB\"\nqueues = 1\n\
    [[vm]]\nname = \"web2\"\nsize = \"512MiB\"\nqueues = 2\n";

/// What runs in a VM.
struct Guest {
    /// Its file in `images/build`.
    kernel: &'static str,
    /// What cloud-hypervisor wants to know besides.
    arguments: Vec<String>,
    /// Pages that it says to have checked, and after how many lines of progress the daemon is killed.
    pages: u64,
    kills: [usize; 3],
}

impl Guest {
    /// Swaps to the disk; has these `ballast.KEY=VALUE`.
    fn linux(parameters: &str) -> Self {
        let command_line = format!("console=ttyS0 quiet loglevel=4 panic=-1 {parameters}");
        let arguments =
            vec!["--initramfs".to_owned(), image("initramfs"), "--cmdline".to_owned(), command_line];
        // While it fills, while it overwrites, while it checks.
        Self { kernel: "vmlinuz", arguments, pages: 300 * 256, kills: [7, 14, 30] }
    }

    /// Has no operating system: see `images/bare.c`.
    fn bare() -> Self {
        Self { kernel: "bare", arguments: Vec::new(), pages: 1152, kills: [1, 3, 6] }
    }
}

/// A VM of cloud-hypervisor with this guest.
fn cloud_hypervisor(program: &Path, arguments: &[String], guest: &Guest, directory: &Path) -> Vm {
    let mut command = Command::new(program);
    command.args(arguments).args(["--kernel", &image(guest.kernel)]).args(&guest.arguments);
    command.args(["--console", "off"]);
    Vm::boot(command, directory, |file| ["--serial".to_owned(), format!("file={file}")])
}

/// The same, made by its API of what `ballast vm args` prints as JSON, with this guest in the place of the one that stands
/// there, and without the disk that the VM boots from.
fn by_api(program: &Path, mut document: Value, guest: &Guest, directory: &Path) -> Vm {
    let (socket, mut console) = (directory.join("api"), String::new());
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new(program);
    command.arg("--api-socket");
    let vm = Vm::boot(command, directory, |file| {
        console = file.to_owned();
        [format!("path={}", socket.display()), "-v".to_owned()]
    });
    let disks = document["disks"].as_array_mut().unwrap();
    disks.retain(|disk| disk["vhost_user"] == true);
    assert_eq!(disks.len(), 1);
    document["payload"] = json!({ "kernel": image(guest.kernel) });
    if let [_, initramfs, _, command_line] = &guest.arguments[..] {
        document["payload"]["initramfs"] = json!(initramfs);
        document["payload"]["cmdline"] = json!(command_line);
    }
    document["serial"] = json!({ "mode": "File", "file": console });
    document["console"] = json!({ "mode": "Off" });
    for (path, body) in [("vm.create", document.to_string()), ("vm.boot", String::new())] {
        let answer = http::put(connect(&socket), &format!("/api/v1/{path}"), &body).unwrap();
        assert!((200..300).contains(&answer.status), "{path}: {answer:?}\n{document}\n{}", vm.words());
    }
    vm
}

/// The API, once it is there.
fn connect(socket: &Path) -> UnixStream {
    let deadline = Instant::now() + BOOT_PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(err) => assert!(Instant::now() < deadline, "{}: {err}", socket.display()),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The same of QEMU.
fn qemu(arguments: &[String], guest: &Guest, directory: &Path) -> Vm {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(arguments).args(["-kernel", &image(guest.kernel), "-accel", "tcg", "-machine", "q35"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    Vm::boot(command, directory, |file| ["-serial".to_owned(), format!("file:{file}")])
}

/// Lets the guest come to its end, and kills the daemon on the way. Gives the guest's counts.
fn judge(vm: &mut Vm, name: &str, guest: &Guest, daemon: &mut Daemon) -> String {
    for steps in guest.kills {
        let report = vm.wait(PATIENCE, |report| report.steps >= steps || report.verdict.is_some());
        let says = || format!("{report:?}\n{}\ndaemon:\n{}", vm.words(), daemon.log());
        assert!(report.steps >= steps && report.verdict.is_none(), "before step {steps}: {}", says());
        daemon.restart();
    }
    let counts = vm.pass(PATIENCE);
    let pages = guest.pages;
    assert!(counts.contains(&format!("pages={pages} ")) && counts.contains(" bad=0 "), "{counts}");
    let status = daemon.vm(name);
    assert!(status["stores"].as_u64() > Some(0) && status["loads"].as_u64() > Some(0), "{status}");
    assert_eq!(status["errors"], 0, "{}", daemon.log());
    println!("{name}: PASS {counts}");
    counts
}

fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(PROGRAM)).find(|program| program.is_file())
}

/// Past the test harness, which keeps what a passed test prints to itself.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What `ballast vm args --json` prints for the VM.
fn described(daemon: &Daemon, name: &str, more: &[&str]) -> Value {
    let output = daemon.ask(&[&["vm", "args", name, "--memory", "128MiB", "--json"], more].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The arguments among it.
fn arguments(daemon: &Daemon, name: &str, more: &[&str]) -> Vec<String> {
    serde_json::from_value(described(daemon, name, more)["args"].take()).unwrap()
}

fn boots_linux(program: &Path, directory: &Path) -> bool {
    let memory_alone = ["--memory", "size=128M", "--cpus", "boot=1"].map(str::to_owned);
    let probe = Guest::linux("ballast.probe=1");
    let mut vm = cloud_hypervisor(program, &memory_alone, &probe, directory);
    vm.wait(BOOT_PATIENCE, |report| report.booted).booted
}

#[test]
fn a_guest_of_a_real_cloud_hypervisor_gets_every_page_back_though_the_daemon_is_killed() {
    let Some(program) = program() else {
        say(&format!("skipped: there is no {PROGRAM} on PATH"));
        return;
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let linux = boots_linux(&program, dir.path());
    if !linux {
        say(&format!(
            "{PROGRAM} boots no Linux here, with or without us: a guest without an operating system"
        ));
    }
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    for (name, queues, queue_size) in [("web1", 1, 256), ("web2", 2, 1024)] {
        let guest = if linux {
            Guest::linux(&format!("ballast.mib=300 ballast.rounds=2 ballast.serial=ballast-{name}"))
        } else {
            Guest::bare()
        };
        let mut arguments = arguments(&daemon, name, &["--vmm", PROGRAM]);
        let disk = arguments.last_mut().unwrap();
        assert!(disk.ends_with("queue_size=256"), "{disk}");
        *disk = disk.replace("queue_size=256", &format!("queue_size={queue_size}"));
        let mut vm = cloud_hypervisor(&program, &arguments, &guest, dir.path());
        let counts = judge(&mut vm, name, &guest, &mut daemon);
        assert!(linux || counts.ends_with(&format!(" queues={queues} places={queue_size}")), "{counts}");
    }
}

#[test]
fn a_guest_of_a_cloud_hypervisor_that_is_told_by_its_api_gets_every_page_back() {
    let Some(program) = program() else {
        say(&format!("skipped: there is no {PROGRAM} on PATH"));
        return;
    };
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let guest = match boots_linux(&program, dir.path()) {
        true => Guest::linux("ballast.mib=300 ballast.rounds=2 ballast.serial=ballast-web2"),
        false => Guest::bare(),
    };
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let document = described(&daemon, "web2", &["--vmm", PROGRAM, "--format", "json", "--whole"]);
    let mut vm = by_api(&program, document, &guest, dir.path());
    judge(&mut vm, "web2", &guest, &mut daemon);
}

/// Waits until the daemon says something of the VM's balloon.
fn wait_for_balloon(daemon: &Daemon, vm: &Vm, what: &str, is_so: impl Fn(&Value) -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so(&daemon.vm("web1")["balloon"]) {
        let says = || format!("{}\n{}\ndaemon:\n{}", daemon.vm("web1"), vm.words(), daemon.log());
        assert!(Instant::now() < deadline, "{what}: {}", says());
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_guest_of_a_real_cloud_hypervisor_is_squeezed_by_its_api_and_by_our_own_balloon() {
    let Some(program) = program() else {
        say(&format!("skipped: there is no {PROGRAM} on PATH"));
        return;
    };
    let probe = tempfile::tempdir_in("/dev/shm").unwrap();
    let linux = boots_linux(&program, probe.path());
    for own in [false, true] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let squeeze = match own {
            true => "vmm = \"vhost-user\"".to_owned(),
            false => format!("vmm = {PROGRAM:?}, socket = {:?}", dir.path().join("api")),
        };
        let config = format!(
            "[pool]\nmax = \"50%\"\n[balloon]\ninterval = \"1s\"\n[[vm]]\nname = \"web1\"\nsize = \"512MiB\"\nqueues = 1\n\
             squeeze = {{ {squeeze}, min = \"64MiB\", mode = \"observe\" }}\n"
        );
        let daemon = Daemon::start(dir.path(), &config);
        let guest = if linux { Guest::linux("ballast.idle=1") } else { Guest::bare() };
        let arguments = arguments(&daemon, "web1", &["--vmm", PROGRAM]);
        let vm = cloud_hypervisor(&program, &arguments, &guest, dir.path());
        let has = |bytes: u64| move |balloon: &Value| balloon["actual_bytes"] == bytes;
        if !linux && own {
            // A guest without a driver has no balloon, but its VMM connects the device.
            let connected = |_: &Value| daemon.log().contains("device=\"balloon\"");
            wait_for_balloon(&daemon, &vm, "the balloon's device is connected", connected);
            continue;
        }
        wait_for_balloon(&daemon, &vm, "the VMM answers", |balloon| balloon["reachable"] == true);
        wait_for_balloon(&daemon, &vm, "it has all of its memory", has(128 << 20));
        println!("web1: {}", daemon.vm("web1")["balloon"]);
        if linux {
            for mib in [96, 128] {
                let size = format!("{mib}MiB");
                assert!(daemon.ask(&["vm", "squeeze", "web1", "--to", &size]).status.success());
                wait_for_balloon(&daemon, &vm, "it has what it should have", has(mib << 20));
            }
        }
    }
}

#[test]
fn a_guest_without_an_operating_system_gets_every_page_back_from_qemu_though_the_daemon_is_killed() {
    let found = Qemu::find().unwrap_or_else(|error| panic!("{error}"));
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut daemon = Daemon::start(dir.path(), CONFIG);
    let guest = Guest::bare();
    for (name, queues) in [("web1", 1), ("web2", 2)] {
        let version: &[&str] = if found.is_before_9_2() { &["--qemu-before-9.2"] } else { &[] };
        let arguments = arguments(&daemon, name, &[&["--vmm", "qemu"], version].concat());
        let mut vm = qemu(&arguments, &guest, dir.path());
        let counts = judge(&mut vm, name, &guest, &mut daemon);
        assert!(counts.ends_with(&format!(" queues={queues} places=128")), "{counts}");
    }
}
