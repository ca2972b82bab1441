//! Child processes that never outlive us: killed when dropped, and by the kernel should we be killed ourselves.
//! They run in process groups of their own, so Ctrl-C reaches only us and we end them in order.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::error::Error;

/// How often something awaited is looked at.
pub(super) const TICK: Duration = Duration::from_millis(100);

/// A child on a leash.
#[derive(Debug)]
pub struct Leashed {
    child: Child,
}

impl Leashed {
    /// Starts `program`; both its outputs go to the end of `log`. The leash is tied to the calling thread.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(program: &Path, arguments: &[OsString], log: &Path) -> Result<Self, Error> {
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(Error::io(format!("open {}", log.display())))?;
        let errors = output.try_clone().map_err(Error::io("copy a file descriptor"))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .process_group(0)
            .spawn()
            .map_err(Error::io(format!("start {} by setpriv (package util-linux)", program.display())))?;
        Ok(Self { child })
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Ends it at whatever instruction it is, and waits until it is gone.
    pub fn kill(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end; after `patience` it is killed.
    pub fn stop(&mut self, patience: Duration) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            // An unreaped child keeps its id, so this can't reach another process.
            if self.ended().is_none() && kill_process(pid, Signal::TERM).is_ok() {
                let deadline = Instant::now() + patience;
                while self.ended().is_none() && Instant::now() < deadline {
                    std::thread::sleep(TICK);
                }
            }
        }
        self.kill();
    }
}

impl Drop for Leashed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The last `lines` lines of a file, for a message; says so where it can't be read.
pub(super) fn tail(path: &Path, lines: usize) -> String {
    match std::fs::read(path) {
        Ok(bytes) => last_lines(&String::from_utf8_lossy(&bytes), lines),
        Err(error) => format!("(can't read {}: {error})", path.display()),
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_those_that_say_something() {
        assert_eq!(last_lines("a\r\nb\r\n\r\nc\r\n", 2), "b\nc");
        assert_eq!(last_lines("a", 2), "a");
        assert_eq!(last_lines("", 2), "");
    }
}
