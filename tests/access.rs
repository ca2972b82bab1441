//! Who is let in, and where the sockets come from: sockets that systemd keeps for the daemon outlive it, and the control
//! socket asks who is there whatever the mode of its file says.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use command_fds::{CommandFdExt, FdMapping};
use support::daemon::Daemon;
use support::page_of;

const PATIENCE: Duration = Duration::from_secs(60);
const VM: &str = "[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";
/// A user and a group that have nothing to do with the daemon.
const NOBODY: u32 = 65534;

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

/// Asks for the status as another user and group.
fn status_as(uid: u32, gid: u32, daemon: &Daemon) -> Output {
    let socket = daemon.socket("control");
    Command::new("setpriv")
        .args([format!("--reuid={uid}"), format!("--regid={gid}"), "--clear-groups".to_owned()])
        .arg(env!("CARGO_BIN_EXE_ballast"))
        .args(["status".as_ref(), "--socket".as_ref(), socket.as_os_str()])
        .output()
        .unwrap()
}

#[test]
fn the_control_socket_asks_who_is_there_whatever_its_mode() {
    assert!(rustix::process::geteuid().is_root(), "only root can be somebody else: run the tests as root");
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    // The binary has to be reachable for nobody, too.
    let mut daemon = Daemon::start(dir.path(), VM);
    let open_all = |daemon: &Daemon| {
        mode(dir.path(), 0o755);
        mode(daemon.socket("control").parent().unwrap(), 0o755);
        mode(&daemon.socket("control"), 0o666);
    };
    open_all(&daemon);
    assert!(status_as(0, 0, &daemon).status.success());
    for gid in [NOBODY, 0] {
        let refused = status_as(NOBODY, gid, &daemon);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(1) && said.contains("control_group"), "{refused:?}");
    }

    let group = Command::new("getent").args(["group", &NOBODY.to_string()]).output().unwrap();
    let group = String::from_utf8(group.stdout).unwrap();
    let group = group.split(':').next().unwrap();
    let own = rustix::process::getegid().as_raw();
    let run = daemon.socket("control").parent().unwrap().to_owned();
    let restart = |daemon: &mut Daemon, config: String, expected: [(&Path, u32, u32); 3]| {
        daemon.configure(&config);
        daemon.kill();
        fs::remove_dir_all(&run).unwrap();
        daemon.restart();
        for (path, gid, mode) in expected {
            let metadata = fs::metadata(path).unwrap();
            let found = (metadata.gid(), metadata.permissions().mode() & 0o777);
            assert_eq!(found, (gid, mode), "{}", path.display());
        }
        open_all(daemon);
    };
    // The group of the VMMs gets to the VMs' sockets, and gives no orders.
    let (control, web1) = (daemon.socket("control"), daemon.socket("web1"));
    let config = format!("socket_group = \"{group}\"\n{VM}");
    restart(&mut daemon, config, [(&run, NOBODY, 0o750), (&control, own, 0o600), (&web1, NOBODY, 0o660)]);
    let refused = status_as(NOBODY, NOBODY, &daemon);
    assert!(refused.status.code() == Some(1), "{refused:?}");
    // One that may give orders gets to no VM's socket.
    let config = format!("control_group = \"{group}\"\n{VM}");
    restart(&mut daemon, config, [(&run, own, 0o751), (&control, NOBODY, 0o660), (&web1, own, 0o660)]);
    assert!(status_as(NOBODY, NOBODY, &daemon).status.success());
    assert_eq!(status_as(NOBODY - 1, NOBODY - 1, &daemon).status.code(), Some(1));
    let config = format!("socket_group = \"{group}\"\ncontrol_group = \"{group}\"\n{VM}");
    restart(&mut daemon, config, [(&run, NOBODY, 0o750), (&control, NOBODY, 0o660), (&web1, NOBODY, 0o660)]);
    assert!(status_as(NOBODY, NOBODY, &daemon).status.success());
}

#[test]
fn a_group_that_does_not_exist_is_an_error_that_says_what_to_do() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), VM);
    daemon.configure(&format!("socket_group = \"no-such-group\"\n{VM}"));
    let output = support::daemon::serve(&daemon.config()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("no-such-group") && said.contains("groupadd"), "{said}");
}

/// Starts a daemon as systemd does for a socket unit with these sockets.
fn serve_with(config: &Path, sockets: &[&UnixListener]) -> Child {
    let mappings = sockets
        .iter()
        .zip(3..)
        .map(|(socket, child_fd)| FdMapping { parent_fd: socket.try_clone().unwrap().into(), child_fd });
    let mut command = Command::new("sh");
    // The number of the process is known to itself alone.
    command
        .args(["-c", "LISTEN_PID=$$ exec \"$@\"", "sh", env!("CARGO_BIN_EXE_ballast"), "serve", "--config"])
        .arg(config)
        .env("LISTEN_FDS", sockets.len().to_string())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .fd_mappings(mappings.collect())
        .unwrap();
    command.spawn().unwrap()
}

fn kill(mut daemon: Child) {
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn sockets_that_systemd_keeps_are_used_and_outlive_the_daemon() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    // For its configuration and its directories.
    let mut made = Daemon::start(dir.path(), VM);
    made.kill();
    let kept = |name: &str| {
        let path = made.socket(name);
        fs::remove_file(&path).unwrap();
        (UnixListener::bind(&path).unwrap(), path)
    };
    let ((control, control_path), (web1, web1_path)) = (kept("control"), kept("web1"));
    let inodes = || [&control_path, &web1_path].map(|path| fs::metadata(path).unwrap().ino());
    let before = inodes();
    let other = UnixListener::bind(dir.path().join("other.sock")).unwrap();

    let daemon = serve_with(&made.config(), &[&web1, &other, &control]);
    // Whoever connects before it has started waits for it.
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(&web1_path, memory, Options::default()).unwrap();
    let mut queue = device.start().unwrap().remove(0);
    queue.write_pages(1, &[page_of(2, 7)]).unwrap();
    kill(daemon);
    let daemon = serve_with(&made.config(), &[&control, &web1]);
    let start = Instant::now();
    device.reconnect(PATIENCE).unwrap();
    assert!(queue.read_page(1).unwrap() == page_of(2, 7), "after {:?}", start.elapsed());
    let status = made.ask(&["status", "--json"]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    assert_eq!(inodes(), before, "they are systemd's, and stay");
    kill(daemon);
}
