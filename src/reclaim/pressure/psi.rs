//! PSI triggers: the kernel's own measure of how long tasks stand still for want of memory, and its promise to say so
//! as soon as that exceeds a threshold (Documentation/accounting/psi.rst). A descriptor holds one trigger.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Level, Origin, Pressure};

/// What is asked of the kernel for each level, for the privileged (any window) and for everybody else (windows of two
/// seconds only). Some task stood still for 15 % of the time; all of them did for 10 % of it.
const TRIGGERS: [(Level, [&str; 2]); 2] = [
    (Level::Moderate, ["some 150000 1000000\n", "some 300000 2000000\n"]),
    (Level::Severe, ["full 100000 1000000\n", "full 200000 2000000\n"]),
];

/// A trigger that is set. The kernel makes its descriptor ready (`POLLPRI`) at most once a window.
#[derive(Debug)]
pub(super) struct Trigger {
    file: File,
    pub(super) pressure: Pressure,
}

impl AsFd for Trigger {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Sets a trigger for each level on one `memory.pressure`.
pub(super) fn set(path: &Path, origin: Origin) -> io::Result<Vec<Trigger>> {
    let set = |(level, texts): &(Level, [&str; 2])| {
        let file = set_one(path, texts)?;
        Ok(Trigger { file, pressure: Pressure { origin, level: *level } })
    };
    TRIGGERS.iter().map(set).collect()
}

fn set_one(path: &Path, texts: &[&str; 2]) -> io::Result<File> {
    let set = |text: &str| {
        // Only to write: the numbers themselves are nothing to us.
        let mut file =
            OpenOptions::new().write(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()).open(path)?;
        // In one piece, as the kernel parses each write for itself.
        match file.write(text.as_bytes())? {
            written if written == text.len() => Ok(file),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    };
    let refused = |err: &io::Error| Errno::from_io_error(err) == Some(Errno::INVAL);
    set(texts[0]).or_else(|err| if refused(&err) { set(texts[1]) } else { Err(err) })
}
