//! What a VMM hands over: descriptors of its own choosing, which workers and sessions then read, write and map. A file
//! that keeps its reader waiting would keep every other VM waiting, and one that can't be replaced page by page would end
//! the daemon when its VMM cuts it short; so only kinds of files are taken of which neither is true.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, fstatfs, major, minor};

use crate::page::PAGE_SIZE_U64;

/// How the kernel calls an eventfd.
const EVENTFD: &str = "anon_inode:[eventfd]";

/// File systems whose files are this host's memory: memfds and tmpfs, ramfs, hugetlbfs.
const MEMORY_FILE_SYSTEMS: [u32; 2] = [0x0102_1994, 0x8584_58f6];
const HUGETLBFS: u32 = 0x9584_58f6;
/// File systems on disks of this host: ext4, XFS, Btrfs, F2FS.
const DISK_FILE_SYSTEMS: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0xf2f5_2010];

/// Why something was not taken.
#[derive(Debug, thiserror::Error)]
pub enum Unusable {
    /// Reading or writing it could block, or never end.
    #[error("a descriptor for a ring's events that is no eventfd")]
    NoEventfd,
    /// Touching it could take for ever, as others decide.
    #[error(
        "memory that is neither a memfd nor a DAX device nor a file on tmpfs, hugetlbfs, ext4, XFS, Btrfs or F2FS (file \
         system {0:#x}): use `memory-backend-memfd`, or another `mem-path`"
    )]
    Kind(u32),
    /// It is too short.
    #[error("{bytes} bytes at {offset} of a file of {length}")]
    Beyond {
        /// Bytes wanted.
        bytes: u64,
        /// From where on.
        offset: u64,
        /// Bytes there are.
        length: u64,
    },
    /// The kernel maps whole huge pages, and replaces no part of one.
    #[error("{bytes} bytes at {offset} of a file of huge pages: both have to be multiples of {page_bytes}")]
    Huge {
        /// Bytes wanted.
        bytes: u64,
        /// From where on.
        offset: u64,
        /// Bytes of a huge page.
        page_bytes: u64,
    },
    /// The kernel doesn't say what it is.
    #[error("a descriptor that can't be looked at")]
    Io(#[from] io::Error),
}

impl From<Unusable> for io::Error {
    fn from(err: Unusable) -> Self {
        Self::new(io::ErrorKind::InvalidInput, err)
    }
}

/// Takes what a ring's kicks, calls or errors come through.
///
/// # Errors
/// When it is no eventfd.
pub fn event(file: File) -> Result<File, Unusable> {
    if fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?.as_os_str() != EVENTFD {
        return Err(Unusable::NoEventfd);
    }
    let flags = fcntl_getfl(&file).map_err(io::Error::from)?;
    fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
    Ok(file)
}

/// Looks whether `bytes` of a file from `offset` on can be mapped, watched and given back.
///
/// # Errors
/// When the file is of another kind than memory has, too short, or of huge pages of which this is not a whole number.
pub fn check_memory(file: &File, offset: u64, bytes: u64) -> Result<(), Unusable> {
    let metadata = file.metadata()?;
    let file_system = fstatfs(file).map_err(io::Error::from)?;
    let kind = u32::try_from(file_system.f_type).unwrap_or(0);
    if !metadata.is_file() {
        // A DAX device has no length, and the kernel maps nothing beyond its end.
        let dax = metadata.file_type().is_char_device() && is_dax(metadata.rdev());
        return if dax { Ok(()) } else { Err(Unusable::Kind(kind)) };
    }
    if kind != HUGETLBFS && !MEMORY_FILE_SYSTEMS.iter().chain(&DISK_FILE_SYSTEMS).any(|other| *other == kind)
    {
        return Err(Unusable::Kind(kind));
    }
    let length = metadata.len();
    // What is beyond a file's end is SIGBUS at the first touch.
    if offset.checked_add(bytes).is_none_or(|end| end > length) {
        return Err(Unusable::Beyond { bytes, offset, length });
    }
    let page_bytes = u64::try_from(file_system.f_bsize).unwrap_or(0).max(1);
    if kind == HUGETLBFS && !(bytes.is_multiple_of(page_bytes) && offset.is_multiple_of(page_bytes)) {
        return Err(Unusable::Huge { bytes, offset, page_bytes });
    }
    Ok(())
}

/// What a file of guest memory is backed by: pages, or huge pages of so many bytes, of which no part can be given back.
///
/// # Errors
/// When the kernel doesn't say.
pub fn page_bytes(file: &File) -> io::Result<u64> {
    let file_system = fstatfs(file)?;
    let huge = u32::try_from(file_system.f_type) == Ok(HUGETLBFS);
    Ok(if huge { u64::try_from(file_system.f_bsize).unwrap_or(u64::MAX) } else { PAGE_SIZE_U64 })
}

fn is_dax(device: u64) -> bool {
    let subsystem = format!("/sys/dev/char/{}:{}/subsystem", major(device), minor(device));
    fs::read_link(subsystem).is_ok_and(|path| path.file_name().is_some_and(|name| name == "dax"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};

    const HUGE_PAGE: u64 = 2 << 20;

    fn memfd(flags: MemfdFlags, bytes: u64) -> File {
        let file = File::from(memfd_create("test", flags | MemfdFlags::CLOEXEC).unwrap());
        file.set_len(bytes).unwrap();
        file
    }

    #[test]
    fn events_come_through_eventfds_alone() {
        let taken = event(eventfd(0, EventfdFlags::CLOEXEC).unwrap().into()).unwrap();
        assert!(fcntl_getfl(&taken).unwrap().contains(OFlags::NONBLOCK));
        let (read, write) = std::io::pipe().unwrap();
        let null = File::options().read(true).write(true).open("/dev/null").unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let files: [std::os::fd::OwnedFd; 5] =
            [read.into(), write.into(), null.into(), socket.into(), memfd(MemfdFlags::empty(), 8).into()];
        for file in files {
            let refused = event(file.into()).unwrap_err();
            assert!(matches!(refused, Unusable::NoEventfd), "{refused}");
        }
    }

    #[test]
    fn memory_is_in_files_that_keep_nobody_waiting() {
        check_memory(&memfd(MemfdFlags::empty(), 100), 0, 100).unwrap();
        check_memory(&tempfile::tempfile_in("/dev/shm").unwrap(), 0, 0).unwrap();
        let (pipe, _write) = std::io::pipe().unwrap();
        let pipe = File::from(std::os::fd::OwnedFd::from(pipe));
        // Devices are on a tmpfs, and proc stands for what some other program answers for.
        let others = [pipe, File::open("/dev/zero").unwrap(), File::open("/proc/self/maps").unwrap()];
        for file in others {
            let refused = check_memory(&file, 0, 0).unwrap_err();
            assert!(matches!(refused, Unusable::Kind(_)), "{refused}");
        }
    }

    #[test]
    fn memory_is_within_its_file() {
        let file = memfd(MemfdFlags::empty(), 8192);
        check_memory(&file, 4096, 4096).unwrap();
        for (offset, bytes) in [(4096, 4097), (8193, 0), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(matches!(check_memory(&file, offset, bytes), Err(Unusable::Beyond { .. })));
        }
    }

    #[test]
    fn huge_pages_are_taken_whole() {
        let file = memfd(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 2 * HUGE_PAGE);
        check_memory(&file, 0, 2 * HUGE_PAGE).unwrap();
        check_memory(&file, HUGE_PAGE, HUGE_PAGE).unwrap();
        for (offset, bytes) in [(0, 4096), (0, HUGE_PAGE + 4096), (4096, HUGE_PAGE)] {
            let refused = check_memory(&file, offset, bytes).unwrap_err();
            assert!(matches!(refused, Unusable::Huge { page_bytes: HUGE_PAGE, .. }), "{refused}");
        }
    }
}
