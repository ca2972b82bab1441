//! File systems that a test mounts, which takes root.

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

    /// Mounts a directory over itself, read-only.
    pub fn read_only(path: &Path) -> Self {
        let text = path.to_str().expect("a plain path");
        mount(&["--bind", text], path).expect("bound");
        let bound = Self(path.to_owned());
        mount(&["-o", "remount,bind,ro"], path).expect("read-only");
        bound
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
