//! A daemon of our own: `ballast serve` as a child process on a configuration in a scratch directory, asked by
//! `ballast status`. The demo and the tests drive the real executable, as users do, and use none of its code.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use toml::Value;

use super::error::Error;
use super::process::{Leashed, TICK, tail};
use super::status::Status;

/// How long the daemon may take until it answers: recovery of a full pool included.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// How long a process takes at most from its sockets' end to its own: a large mapping is unmapped between.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// How long it may take to end when asked.
const STOP_PATIENCE: Duration = Duration::from_secs(10);

/// What the daemon of a demo or a test is to do.
#[derive(Clone, Debug)]
pub struct DaemonSpec {
    /// The `ballast` executable.
    pub executable: PathBuf,
    /// Where its state, sockets, configuration and log are kept.
    pub directory: PathBuf,
    /// The VMs' names.
    pub vms: Vec<String>,
    /// Further lines of each VM's configuration.
    pub vm_keys: String,
    /// The size of each VM's disk.
    pub vm_mib: u32,
    /// `pool.compressor`.
    pub compressor: String,
    /// `pool.max`; half of the host's memory unless something is said.
    pub pool_max: Option<String>,
    /// The writeback file, if there is to be one.
    pub file: Option<PathBuf>,
}

impl DaemonSpec {
    /// The socket of a VM.
    #[must_use]
    pub fn socket(&self, vm: &str) -> PathBuf {
        self.runtime_directory().join(format!("{vm}.sock"))
    }

    fn runtime_directory(&self) -> PathBuf {
        self.directory.join("run")
    }

    fn config_path(&self) -> PathBuf {
        self.directory.join("ballast.toml")
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("daemon.log")
    }

    fn config(&self) -> String {
        let quoted = |path: &Path| Value::String(path.display().to_string());
        let mut text = format!(
            "state_dir = {}\nruntime_dir = {}\n\n[pool]\nmax = {}\ncompressor = {}\n",
            quoted(&self.directory.join("state")),
            quoted(&self.runtime_directory()),
            Value::String(self.pool_max.clone().unwrap_or_else(|| "50%".to_owned())),
            Value::String(self.compressor.clone()),
        );
        if let Some(file) = &self.file {
            text.push_str(&format!("\n[writeback]\npath = {}\nsize = \"2GiB\"\n", quoted(file)));
        }
        for vm in &self.vms {
            let name = Value::String(vm.clone());
            let size = format!("\"{}MiB\"", self.vm_mib);
            text.push_str(&format!(
                "\n[[vm]]\nname = {name}\nsize = {size}\nlimit = {size}\n{}\n",
                self.vm_keys
            ));
        }
        text
    }
}

/// A daemon that runs, or was killed and may be started again.
#[derive(Debug)]
pub struct Daemon {
    spec: DaemonSpec,
    process: Leashed,
}

impl Daemon {
    /// Writes the configuration, starts the daemon and waits until it serves.
    ///
    /// # Errors
    /// When it ends instead, or doesn't answer in time.
    pub fn start(spec: DaemonSpec) -> Result<Self, Error> {
        for directory in [spec.directory.join("state"), spec.runtime_directory()] {
            std::fs::create_dir_all(&directory)
                .map_err(Error::io(format!("make the directory {}", directory.display())))?;
        }
        let config = spec.config_path();
        std::fs::write(&config, spec.config()).map_err(Error::io(format!("write {}", config.display())))?;
        let process = Self::spawn(&spec)?;
        let mut daemon = Self { spec, process };
        daemon.wait_until_ready()?;
        Ok(daemon)
    }

    fn spawn(spec: &DaemonSpec) -> Result<Leashed, Error> {
        let arguments: [OsString; 3] = ["serve".into(), "--config".into(), spec.config_path().into()];
        Leashed::start(&spec.executable, &arguments, &spec.log_path())
    }

    /// Kills the daemon with SIGKILL, wherever it is, and starts another on what it left.
    ///
    /// # Errors
    /// As [`Daemon::start`].
    pub fn kill_and_restart(&mut self) -> Result<(), Error> {
        self.process.kill();
        self.process = Self::spawn(&self.spec)?;
        self.wait_until_ready()
    }

    fn wait_until_ready(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + READY_PATIENCE;
        // The sockets of a killed daemon are still there, so the answer is what counts.
        while !self.serves() {
            self.check()?;
            if Instant::now() > deadline {
                return Err(self.failed("did not get ready"));
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn serves(&self) -> bool {
        self.spec.vms.iter().all(|vm| self.spec.socket(vm).exists()) && self.status().is_ok()
    }

    /// Fails when the daemon has ended.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn check(&mut self) -> Result<(), Error> {
        match self.process.ended() {
            Some(status) => Err(self.failed(&format!("ended with {status}"))),
            None => Ok(()),
        }
    }

    /// The failure, with the end of the log.
    #[must_use]
    pub fn failed(&self, what: &str) -> Error {
        Error::Daemon { what: what.to_owned(), log: tail(&self.spec.log_path(), 20) }
    }

    /// Asks for the status, as a user would.
    ///
    /// # Errors
    /// When the command fails or its output can't be read.
    pub fn status(&self) -> Result<Status, Error> {
        Status::parse(&self.ask(&["status", "--json"])?)
    }

    /// Runs a client command and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    pub fn ask(&self, command: &[&str]) -> Result<String, Error> {
        let output = Command::new(&self.spec.executable)
            .args(command)
            .arg("--config")
            .arg(self.spec.config_path())
            .output()
            .map_err(Error::io(format!("run `ballast {}`", command.join(" "))))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
            let command = command.join(" ");
            return Err(Error::Command { command, status: output.status, stderr });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// The status of a daemon that must be alive; when it isn't, its end tells more than a refused connection.
    ///
    /// # Errors
    /// With the end of its log.
    pub fn status_or_end(&mut self) -> Result<Status, Error> {
        self.check()?;
        self.status().map_err(|error| {
            // A process that has closed its sockets is about to be gone.
            std::thread::sleep(END_PATIENCE);
            self.check().err().unwrap_or_else(|| self.failed(&format!("runs, but {error}")))
        })
    }

    /// Ends the daemon in good order.
    pub fn stop(mut self) {
        self.process.stop(STOP_PATIENCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_toml_with_every_vm() {
        let spec = DaemonSpec {
            executable: "ballast".into(),
            directory: "/dev/shm/a \"quoted\" name".into(),
            vms: vec!["web1".to_owned(), "web2".to_owned()],
            vm_keys: String::new(),
            vm_mib: 512,
            compressor: "zstd:1".to_owned(),
            pool_max: None,
            file: Some("/var/tmp/file".into()),
        };
        let config: toml::Table = spec.config().parse().expect("TOML");
        assert_eq!(config["state_dir"].as_str(), Some("/dev/shm/a \"quoted\" name/state"));
        assert_eq!(config["pool"]["compressor"].as_str(), Some("zstd:1"));
        assert_eq!(config["pool"]["max"].as_str(), Some("50%"));
        assert_eq!(config["writeback"]["path"].as_str(), Some("/var/tmp/file"));
        assert_eq!(config["vm"][1]["name"].as_str(), Some("web2"));
        assert_eq!(config["vm"][1]["size"].as_str(), Some("512MiB"));
        assert_eq!(spec.socket("web1"), Path::new("/dev/shm/a \"quoted\" name/run/web1.sock"));
    }
}
