//! Files that nobody but the daemon's user may read, whatever the umask: they hold guests' memory, or the keys to it.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Reading and writing for the owner.
const MODE: u32 = 0o600;

/// Opens a file for reading and writing; makes an empty one where there is none.
///
/// # Errors
/// Those of opening.
pub fn open_or_create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(MODE).open(path)
}

/// Writes a file anew, as [`std::fs::write`] does.
///
/// # Errors
/// Those of opening and writing.
pub fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(MODE).open(path)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn new_files_are_the_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let [opened, written] = ["opened", "written"].map(|name| dir.path().join(name));
        open_or_create(&opened).unwrap().write_all(b"pages").unwrap();
        write(&written, b"keys").unwrap();
        for path in [&opened, &written] {
            assert_eq!(path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
        drop(open_or_create(&opened).unwrap());
        write(&written, b"key").unwrap();
        assert_eq!(
            (std::fs::read(&opened).unwrap(), std::fs::read(&written).unwrap()),
            (b"pages".into(), b"key".into())
        );
    }
}
