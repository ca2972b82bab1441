//! Files that nobody but the daemon's user may look into: they hold guests' memory, and the keys of what is in the
//! writeback file.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::io::Errno;

use crate::crash_point;

const FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o700;

/// What to do about an error of the system with such a file, where it says little of that by itself.
#[must_use]
pub fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => ": a state directory must be writable, so mount it read-write",
        io::ErrorKind::StorageFull => ": its file system needs room, so make that larger or free some of it",
        io::ErrorKind::PermissionDenied => ": it must belong to the user that runs the daemon",
        _ => "",
    }
}

/// Makes a directory, and those above it that are missing. One that exists stays as it is: it may be somebody else's.
///
/// # Errors
/// Those of mkdir.
pub fn create_dir(path: &Path) -> io::Result<()> {
    crash_point::after(DirBuilder::new().recursive(true).mode(DIR_MODE).create(path))
}

/// Opens a file for reading and writing, and takes it from whom a laxer build let in.
///
/// # Errors
/// Those of open and chmod.
pub fn open(path: &Path) -> io::Result<File> {
    keep_private(OpenOptions::new().read(true).write(true).open(path)?)
}

/// The same, for a file that is made when it is missing.
///
/// # Errors
/// Those of open and chmod.
pub fn open_or_create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(FILE_MODE);
    keep_private(crash_point::after(options.open(path))?)
}

/// Makes a file that holds just these bytes, instead of one that may be there.
///
/// # Errors
/// Those of open, chmod and write.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(FILE_MODE);
    let mut file = keep_private(crash_point::after(options.open(path))?)?;
    crash_point::after(file.write_all(bytes))
}

/// Replaces a file by one that holds just these bytes, whole or not at all; when this returns, it outlives the host.
///
/// # Errors
/// Those of open, write, sync and rename.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let new = path.with_file_name(name);
    write(&new, bytes)?;
    File::open(&new)?.sync_all()?;
    crash_point::after(std::fs::rename(&new, path))?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

fn keep_private(file: File) -> io::Result<File> {
    if file.metadata()?.permissions().mode() & 0o777 & !FILE_MODE != 0 {
        file.set_permissions(Permissions::from_mode(FILE_MODE))?;
    }
    Ok(file)
}

/// Whether an error of reading says that what is there can't be read, now or later: a disk is failing, or memory.
#[must_use]
pub fn is_unreadable(err: &io::Error) -> bool {
    matches!(Errno::from_io_error(err), Some(Errno::IO | Errno::HWPOISON))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_are_made_private_and_become_so() {
        let dir = tempfile::tempdir().unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let below = dir.path().join("one/two");
        create_dir(&below).unwrap();
        assert_eq!(mode(&below), DIR_MODE);
        let path = below.join("file");
        for make in [|path: &Path| open_or_create(path).map(drop), |path: &Path| write(path, b"x")] {
            make(&path).unwrap();
            assert_eq!(mode(&path), FILE_MODE);
            fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
            drop(open(&path).unwrap());
            assert_eq!(mode(&path), FILE_MODE);
            fs::remove_file(&path).unwrap();
        }
    }
}
