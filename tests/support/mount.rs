//! File systems that a test mounts, and devices over files, which takes root.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A mount. Dropping it ends it.
pub struct Mount(PathBuf);

impl Mount {
    /// A tmpfs of some size at `path`, which is made. `None`, said aloud, where nobody lets us; in CI that is a failure.
    pub fn tmpfs(path: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(path).expect("a directory");
        let options = format!("size={size},mode=700");
        match mount(&["-t", "tmpfs", "-o", &options, "ballast-test"], path) {
            Ok(()) => Some(Self(path.to_owned())),
            Err(why) => {
                assert_ne!(std::env::var("CI").as_deref(), Ok("true"), "CI has to mount a tmpfs: {why}");
                eprintln!("NOT TESTED: no tmpfs can be mounted, which takes root: {why}");
                None
            }
        }
    }

    /// Mounts a device at `path`, which is made.
    pub fn device(device: &Path, path: &Path) -> Self {
        std::fs::create_dir_all(path).expect("a directory");
        mount(&[device.to_str().expect("a plain path")], path).expect("mounted");
        Self(path.to_owned())
    }

    /// Mounts a directory over itself, read-only.
    pub fn read_only(path: &Path) -> Self {
        let text = path.to_str().expect("a plain path");
        mount(&["--bind", text], path).expect("bound");
        let bound = Self(path.to_owned());
        mount(&["-o", "remount,bind,ro"], path).expect("read-only");
        bound
    }

    /// Ends it with all that it has to write, which takes that nobody has a file of it open.
    pub fn end(self) {
        let status = Command::new("umount").arg(&self.0).status().expect("umount is there");
        assert!(status.success(), "somebody has files open in {}", self.0.display());
        std::mem::forget(self);
    }
}

/// Mounts something with these arguments, or mounts it otherwise. What was said against it, if it failed.
pub fn mount(args: &[&str], path: &Path) -> Result<(), String> {
    let output = Command::new("mount").args(args).arg(path).output().map_err(|err| err.to_string())?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).into_owned())
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Whoever still has files open in it, a daemon that a failed test has left, ends before its directory goes.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A loop device, given back in the end.
pub struct Loop {
    /// The device.
    pub path: PathBuf,
}

impl Loop {
    /// `None`, said aloud, where the machine has none to give; where it could have one, that is a failure in CI.
    pub fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["-f", "--show"]).arg(file).output();
        let reason = match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).expect("a path").trim().into();
                return Some(Self { path });
            }
            Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
            Err(err) => err.to_string(),
        };
        eprintln!("NOT TESTED on a block device, for want of a loop device: {reason}");
        let possible = std::fs::OpenOptions::new().read(true).write(true).open("/dev/loop-control").is_ok();
        assert!(!possible || std::env::var("CI").as_deref() != Ok("true"), "this machine could have one");
        None
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}
