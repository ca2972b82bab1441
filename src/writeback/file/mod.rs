//! The file or block device itself: opened, locked, and asked what it is. The lock is on the very open file that the
//! kernel reads and writes for us, so while a killed daemon's submitted writes are still under way it is held, and
//! when it is free nothing lands in the file any more.

mod discard;
pub mod header;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FlockOperation, OFlags};
use rustix::io::Errno;

use super::io::Buffer;
use super::place::{BLOCK_BYTES, SEGMENT_BYTES};
use crate::crash_point;
use header::{FileId, Found};

/// How often a lock that somebody else holds is tried again.
const LOCK_RETRY: Duration = Duration::from_millis(50);

/// The open, locked file. Clones share it; the lock is free once the last is dropped and the kernel is done.
#[derive(Clone, Debug)]
pub struct Target {
    file: Arc<File>,
    direct: bool,
    device: bool,
}

impl Target {
    /// Opens `path`, creating a file if there is nothing and it `may_create` one, and locks it. Waits up to `wait` for
    /// another holder of the lock, who may be a killed daemon's last writes. `None` when the lock was not to be had.
    ///
    /// # Errors
    /// Those of opening, locking and reading.
    pub fn open(path: &Path, may_create: bool, wait: Duration) -> io::Result<Option<Self>> {
        let device = fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device());
        let deadline = Instant::now() + wait;
        let mut told = false;
        let file = loop {
            if let Some(file) = open_locked(path, device, may_create)? {
                break file;
            }
            if Instant::now() >= deadline {
                return Ok(None);
            }
            if !told {
                let (path, seconds) = (path.display(), wait.as_secs());
                tracing::warn!(%path, "the writeback file is in use: waiting up to {seconds} s for it");
                told = true;
            }
            thread::sleep(LOCK_RETRY);
        };
        let mut target = Self { file: Arc::new(file), direct: false, device };
        target.direct = target.set_direct(true) && target.first_block_reads();
        if !target.direct {
            target.set_direct(false);
            // Pages are read one by one and never again soon: reading ahead only costs memory.
            let _ = rustix::fs::fadvise(&target.file, 0, None, Advice::Random);
        }
        Ok(Some(target))
    }

    fn set_direct(&self, direct: bool) -> bool {
        let flags = if direct { OFlags::DIRECT } else { OFlags::empty() };
        rustix::fs::fcntl_setfl(&self.file, flags).is_ok()
    }

    /// Some file systems accept direct I/O and refuse it at the first transfer, or want larger blocks.
    fn first_block_reads(&self) -> bool {
        let mut block = Buffer::zeroed(BLOCK_BYTES);
        self.file.read_at(block.bytes_mut(), 0).is_ok()
    }

    /// The file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether transfers go around the page cache.
    #[must_use]
    pub fn direct(&self) -> bool {
        self.direct
    }

    /// The same file through the page cache, as where direct I/O is refused.
    #[cfg(test)]
    #[must_use]
    pub fn buffered(mut self) -> Self {
        assert!(self.set_direct(false));
        self.direct = false;
        self
    }

    /// Whether it is a block device.
    #[must_use]
    pub fn device(&self) -> bool {
        self.device
    }

    /// Says what the first segment holds, and whether both copies of its header are sound.
    ///
    /// # Errors
    /// Those of reading.
    pub fn look(&self) -> io::Result<(Found, bool)> {
        let mut segment = Buffer::zeroed(SEGMENT_BYTES);
        let mut reached = 0;
        while reached < SEGMENT_BYTES {
            match self.file.read_at(&mut segment.bytes_mut()[reached..], reached as u64)? {
                0 => break,
                // Direct reads end inside a block only at the end of the file.
                bytes if !bytes.is_multiple_of(BLOCK_BYTES) => {
                    reached += bytes;
                    break;
                }
                bytes => reached += bytes,
            }
        }
        let bytes = &segment.bytes()[..reached];
        Ok((Found::in_segment(bytes), Found::is_whole(bytes)))
    }

    /// Bytes of the device, or `wanted` for a file, which can become as long as that.
    ///
    /// # Errors
    /// When the device doesn't tell.
    pub fn bytes_max(&self, wanted: u64) -> io::Result<u64> {
        if !self.device {
            return Ok(wanted);
        }
        // A device says its length as the end that can be sought to.
        Ok((&*self.file).seek(SeekFrom::End(0))?.min(wanted))
    }

    /// Makes a file at least `bytes` long; `anew` drops what it held.
    ///
    /// # Errors
    /// Those of ftruncate.
    pub fn lengthen(&self, bytes: u64, anew: bool) -> io::Result<()> {
        if self.device {
            return Ok(());
        }
        if anew {
            crash_point::after(self.file.set_len(0))?;
        }
        if self.file.metadata()?.len() < bytes {
            crash_point::after(self.file.set_len(bytes))?;
        }
        Ok(())
    }

    /// Ends a file here.
    ///
    /// # Errors
    /// Those of ftruncate.
    pub fn shorten(&self, bytes: u64) -> io::Result<()> {
        if self.device { Ok(()) } else { self.file.set_len(bytes) }
    }

    /// Writes the header, both copies of it.
    ///
    /// # Errors
    /// Those of writing.
    pub fn write_header(&self, id: FileId, segments: u32) -> io::Result<()> {
        crash_point::after(self.file.write_all_at(header::encode(id, segments).bytes(), 0))
    }

    /// Gives a range back to the file system or the device.
    ///
    /// # Errors
    /// Those of fallocate and BLKDISCARD.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        crash_point::after(if self.device {
            discard::discard_blocks(&self.file, offset, bytes)
        } else {
            discard::punch(&self.file, offset, bytes)
        })
    }

    /// After a write of the I/O: a copy that is left in the page cache would cost the memory that writeback is to free.
    pub fn written(&self, offset: u64, bytes: usize) {
        crash_point::passed();
        if !self.direct {
            let _ = rustix::fs::fadvise(&self.file, offset, NonZeroU64::new(bytes as u64), Advice::DontNeed);
        }
    }
}

fn open_locked(path: &Path, device: bool, may_create: bool) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    if device {
        // Without O_CREAT this refuses a device that is mounted or otherwise claimed.
        options.custom_flags(OFlags::EXCL.bits().cast_signed());
    } else {
        options.create(may_create).truncate(false).mode(0o600);
    }
    let file = match crash_point::after(options.open(path)) {
        Ok(file) => file,
        Err(err) if err.kind() == io::ErrorKind::ResourceBusy => return Ok(None),
        Err(err) => return Err(err),
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(err) => Err(err.into()),
    }
}
