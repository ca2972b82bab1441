//! A directory in the host's memory that is gone when dropped: pages, sockets, configuration and consoles of one
//! demo or one test, apart from any daemon that is in earnest.

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::error::Error;

/// tmpfs on every systemd host, which is what a state directory must be in.
const PARENT: &str = "/dev/shm";

static NEXT: AtomicU32 = AtomicU32::new(0);

/// The directory.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a directory that only its owner can open.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(prefix: &str) -> Result<Self, Error> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new(PARENT).join(format!("{prefix}.{}.{number}", std::process::id()));
        // One of that name was left by a process that is gone: its id is ours now.
        let _ = std::fs::remove_dir_all(&path);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(Error::io(format!("make the directory {}", path.display())))?;
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to be told.
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_is_gone_with_its_owner() {
        let scratch = Scratch::new("ballast-unit").expect("a scratch directory");
        let path = scratch.path().to_owned();
        std::fs::write(path.join("file"), "x").expect("writable");
        drop(scratch);
        assert!(!path.exists());
    }
}
