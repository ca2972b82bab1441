//! One booted guest: QEMU with a disk of the daemon's, and what the guest says on its console. It ends with its
//! value. Used by the demo and by the tests that boot guests.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::console::{Report, Verdict};
use super::error::Error;
use super::process::{Leashed, TICK, tail};
use super::qemu::{Accelerator, Images, Qemu};

/// A guest to boot.
#[derive(Clone, Debug)]
pub struct GuestSpec {
    /// Its VM's name.
    pub name: String,
    /// What it boots.
    pub images: Images,
    /// Where its console is kept, in `NAME.console`, and QEMU's messages, in `NAME.qemu`.
    pub directory: PathBuf,
    /// Its VM's socket; a guest without one has no disk.
    pub socket: Option<PathBuf>,
    /// Its memory: far less than the workload needs.
    pub memory_mib: u32,
    /// Its processors, and the disk's queues.
    pub cpus: u32,
    /// What executes it; must not be `Auto` any more, which counts as TCG here.
    pub accelerator: Accelerator,
    /// `ballast.KEY=VALUE` for `images/init`.
    pub parameters: Vec<(&'static str, String)>,
    /// Further arguments for its kernel.
    pub kernel_arguments: String,
    /// Further arguments for QEMU.
    pub arguments: Vec<OsString>,
}

impl GuestSpec {
    /// A guest of 128 MiB with one processor, under TCG and without a disk.
    #[must_use]
    pub fn new(name: &str, images: Images, directory: &Path) -> Self {
        Self {
            name: name.to_owned(),
            images,
            directory: directory.to_owned(),
            socket: None,
            memory_mib: 128,
            cpus: 1,
            accelerator: Accelerator::Tcg,
            parameters: Vec::new(),
            kernel_arguments: String::new(),
            arguments: Vec::new(),
        }
    }

    pub(super) fn console_path(&self) -> PathBuf {
        self.directory.join(format!("{}.console", self.name))
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join(format!("{}.qemu", self.name))
    }

    /// A panic reboots at once, and QEMU ends on a reboot: a crashed guest doesn't hang.
    pub(super) fn kernel_command_line(&self) -> String {
        let mut line = format!("console=ttyS0 quiet loglevel=4 panic=-1 {}", self.kernel_arguments);
        for (key, value) in &self.parameters {
            line.push_str(&format!(" ballast.{key}={value}"));
        }
        line
    }
}

/// A guest that was booted.
#[derive(Debug)]
pub struct Guest {
    name: String,
    process: Leashed,
    console: PathBuf,
    log: PathBuf,
}

impl Guest {
    /// Starts QEMU.
    ///
    /// # Errors
    /// When it can't be started; that it then fails shows in [`Guest::verdict`].
    pub fn boot(qemu: Qemu, spec: &GuestSpec) -> Result<Self, Error> {
        let log = spec.log_path();
        let process = Leashed::start(qemu.program(), &qemu.arguments(spec), &log)?;
        Ok(Self { name: spec.name.clone(), process, console: spec.console_path(), log })
    }

    /// Its VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether QEMU has ended, by itself or not.
    pub fn ended(&mut self) -> bool {
        self.process.ended().is_some()
    }

    /// What it has said so far.
    #[must_use]
    pub fn report(&self) -> Report {
        // Until QEMU has opened the file there is nothing said.
        let bytes = std::fs::read(&self.console).unwrap_or_default();
        Report::parse(&String::from_utf8_lossy(&bytes))
    }

    /// The verdict of a guest that has ended: its own, or that it had none.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        let report = self.report();
        match report.verdict {
            Some(Verdict::Fail(why)) => Verdict::Fail(format!("{why}\n{}", self.last_words())),
            Some(pass) => pass,
            None => Verdict::Fail(format!("QEMU ended before the guest's verdict\n{}", self.last_words())),
        }
    }

    /// The ends of its console and of QEMU's messages.
    #[must_use]
    pub fn last_words(&self) -> String {
        format!("console of {}:\n{}\nQEMU:\n{}", self.name, tail(&self.console, 20), tail(&self.log, 5))
    }

    /// Waits until `done` holds or the guest has ended, whichever comes first.
    ///
    /// # Errors
    /// [`Error::Stuck`] when neither comes in `patience`.
    pub fn wait(&mut self, patience: Duration, done: impl Fn(&Report) -> bool) -> Result<(), Error> {
        let deadline = Instant::now() + patience;
        while !self.ended() && !done(&self.report()) {
            if Instant::now() > deadline {
                return Err(Error::Stuck { seconds: patience.as_secs(), consoles: self.last_words() });
            }
            std::thread::sleep(TICK);
        }
        Ok(())
    }
}
