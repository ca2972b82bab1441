//! The real daemon in a process of its own, which a test may kill as often as it likes.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options, Queue};
use serde_json::Value;

/// How long a daemon may take until it answers, on a machine that is busy with other tests.
const START_WAIT: Duration = Duration::from_secs(30);

/// A running daemon, with its files in one directory. Dropping it kills it; the files stay.
pub struct Daemon {
    dir: PathBuf,
    child: Option<Child>,
    /// What runs the daemon, if it isn't run as it is.
    by: Vec<String>,
}

impl Daemon {
    /// Writes a configuration with `toml_extra` into `dir` and starts a daemon with it: its state is in `dir/state`, its
    /// sockets are in `dir/run`. Whole tables come last in TOML, so `toml_extra` may begin with single keys.
    pub fn start(dir: &Path, toml_extra: &str) -> Self {
        Self::start_by(&[], dir, toml_extra)
    }

    /// The same with a command in front of the daemon's, which ends in becoming it.
    pub fn start_by(command: &[&str], dir: &Path, toml_extra: &str) -> Self {
        let by = command.iter().copied().map(str::to_owned).collect();
        let mut daemon = Self { dir: dir.to_owned(), child: None, by };
        daemon.configure(toml_extra);
        daemon.restart();
        daemon
    }

    /// Writes another configuration, for the next [`Self::restart`].
    pub fn configure(&self, toml_extra: &str) {
        let at = |name: &str| self.dir.join(name);
        let config = format!("state_dir = {:?}\nruntime_dir = {:?}\n{toml_extra}\n", at("state"), at("run"));
        fs::write(self.config(), config).expect("the configuration is written");
    }

    /// Kills the daemon, if it lives, and starts another; returns when that one answers.
    pub fn restart(&mut self) {
        self.restart_with(&[]);
    }

    /// The same with more in its environment.
    pub fn restart_with(&mut self, environment: &[(&str, &str)]) {
        let pid = self.spawn(environment);
        assert!(self.wait_until_it_answers(), "the daemon {pid} ended:\n{}", self.log());
    }

    /// Kills the daemon, if it lives, and starts one that kills itself after it has passed so many points (see
    /// `ballast::crash_point`). False when it did so before it answered.
    pub fn restart_dying_after(&mut self, points: u64) -> bool {
        self.spawn(&[(ballast::crash_point::CRASH_AFTER, &points.to_string())]);
        self.wait_until_it_answers()
    }

    fn spawn(&mut self, environment: &[(&str, &str)]) -> u32 {
        self.kill();
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log_path()).expect("a log");
        let mut command = serve_by(&self.by, &self.config());
        let child = command.envs(environment.iter().copied()).stderr(log).spawn().expect("the daemon starts");
        self.child.insert(child).id()
    }

    /// False when it ended instead, killed by itself.
    fn wait_until_it_answers(&mut self) -> bool {
        let deadline = Instant::now() + START_WAIT;
        while !self.has_died() {
            if self.ask(&["status"]).status.success() {
                return true;
            }
            assert!(Instant::now() < deadline, "the daemon doesn't answer:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Whether the daemon has died of SIGKILL. It may end in no other way.
    pub fn has_died(&mut self) -> bool {
        let Some(status) = self.ended() else { return false };
        let killed = status.signal() == Some(libc::SIGKILL);
        assert!(killed, "the daemon ended with {status}:\n{}", self.log());
        true
    }

    /// How the daemon has ended by itself, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.as_mut().and_then(|child| child.try_wait().expect("a child"))
    }

    /// Kills the daemon with SIGKILL and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("the daemon is ours to kill");
            child.wait().expect("it ends");
        }
    }

    /// The process, while it lives.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// The configuration's path.
    pub fn config(&self) -> PathBuf {
        self.dir.join("ballast.toml")
    }

    /// The socket of a VM.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.join("run").join(format!("{name}.sock"))
    }

    /// A front end of a VM with one queue that runs.
    pub fn attach(&self, name: &str) -> (Device, Queue) {
        let memory = Memory::with_bytes(16 << 20).expect("there is memory");
        let mut device = Device::connect(self.socket(name), memory, Options::default()).expect("it listens");
        let queue = device.start().expect("a queue starts").remove(0);
        (device, queue)
    }

    /// The page table of a VM.
    pub fn table(&self, name: &str) -> PathBuf {
        self.dir.join("state/vms").join(format!("{name}.table"))
    }

    fn log_path(&self) -> PathBuf {
        self.dir.join("log")
    }

    /// What all daemons of this directory have said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// Waits until they have said this.
    pub fn wait_for_log(&self, said: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.log().contains(said) {
            assert!(Instant::now() < deadline, "nobody says {said:?}: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs a command of the binary against this daemon.
    pub fn ask(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
        command.args(args).arg("--config").arg(self.config()).stdin(Stdio::null());
        command.output().expect("the binary runs")
    }

    /// What `status --json` says.
    pub fn status(&self) -> Value {
        let output = self.ask(&["status", "--json"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// The part of the status that is about one VM; null when there is none.
    pub fn vm(&self, name: &str) -> Value {
        let mut status = self.status();
        let vms = status["vms"].as_array_mut().expect("a list of VMs");
        vms.iter_mut().find(|vm| vm["name"] == name).map_or(Value::Null, Value::take)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The command that runs a daemon with this configuration.
pub fn serve(config: &Path) -> Command {
    serve_by(&[], config)
}

fn serve_by(by: &[String], config: &Path) -> Command {
    let own = env!("CARGO_BIN_EXE_ballast");
    let mut command = match by {
        [] => Command::new(own),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg(own);
            command
        }
    };
    command.arg("serve").arg("--config").arg(config).stdin(Stdio::null()).stdout(Stdio::null());
    command
}
