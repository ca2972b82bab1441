//! The seam to the file: who wants bytes moved submits a request that owns its buffer, and gets the buffer back on
//! the I/O thread when the kernel is done with it. Three things are behind it: io_uring, a few threads with pread
//! and pwrite where io_uring is forbidden, and a fake that fails as told.
//!
//! What is submitted is done in no order. The seam knows nothing of segments and records.

mod buffer;
pub mod faulty;
mod ring;
mod threads;
mod uring;

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use buffer::Buffer;
pub use threads::Threads;
pub use uring::Uring;

use super::file::Target;
use super::place::BLOCK_BYTES;

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// From the file into the buffer.
    Read,
    /// From the buffer into the file.
    Write,
}

/// Called once, on the I/O thread, with the bytes moved (which may be fewer than asked for) and the buffer.
pub type Done = Box<dyn FnOnce(io::Result<usize>, Buffer) + Send>;

/// One transfer. It owns its buffer, so the buffer is there for as long as the kernel may use it.
pub struct Request {
    /// Read or write.
    pub op: Op,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// The memory.
    pub buffer: Buffer,
    /// Which part of it.
    pub range: Range<usize>,
    /// Who waits for the end. Must not block.
    pub done: Done,
}

impl Request {
    /// Ends the request.
    pub fn complete(self, result: io::Result<usize>) {
        (self.done)(result, self.buffer);
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} of {} bytes at {:#x}", self.op, self.range.len(), self.offset)
    }
}

/// Which mechanism moves the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IoKind {
    /// io_uring.
    IoUring,
    /// pread and pwrite on a few threads.
    Threads,
}

impl IoKind {
    /// The name that status and metrics show.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// The writeback file, as those see it who read and write it.
pub trait BackingFile: Send + Sync + fmt::Debug {
    /// Starts a transfer. Returns at once; the request's `done` is called exactly once. May be called from a `done`.
    fn submit(&self, request: Request);

    /// Gives a range back to the file system or the device. Blocks; what the range holds afterwards is undefined.
    ///
    /// # Errors
    /// Those of fallocate and BLKDISCARD.
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Ends the file here, unless it is a device. Blocks; nothing behind may be in use.
    ///
    /// # Errors
    /// Those of ftruncate.
    fn shorten(&self, bytes: u64) -> io::Result<()>;

    /// The mechanism.
    fn kind(&self) -> IoKind;
}

/// Starts the I/O on an opened file: io_uring, or threads where the kernel or the sandbox forbids it.
///
/// # Errors
/// When no thread can be started.
pub fn start(target: Target) -> io::Result<Arc<dyn BackingFile>> {
    match Uring::new(target.clone()) {
        Ok(uring) => Ok(Arc::new(uring)),
        Err(err) => {
            tracing::info!(%err, "io_uring can't be used; reading and writing with threads");
            Ok(Arc::new(Threads::new(target)?))
        }
    }
}

/// Moves the whole buffer to or from the file, submitting the rest again after a short transfer.
pub(super) fn transfer(
    file: &Arc<dyn BackingFile>,
    op: Op,
    offset: u64,
    buffer: Buffer,
    done: impl FnOnce(io::Result<()>, Buffer) + Send + 'static,
) {
    transfer_from(Arc::clone(file), op, offset, buffer, 0, Box::new(done));
}

type TransferDone = Box<dyn FnOnce(io::Result<()>, Buffer) + Send>;

fn transfer_from(
    file: Arc<dyn BackingFile>,
    op: Op,
    offset: u64,
    buffer: Buffer,
    from: usize,
    done: TransferDone,
) {
    let length = buffer.bytes().len();
    let again = Arc::clone(&file);
    let next = move |result: io::Result<usize>, buffer| match result {
        Err(err) => done(Err(err), buffer),
        Ok(moved) if from + moved >= length => done(Ok(()), buffer),
        Ok(moved) => {
            // Direct I/O goes on at a block boundary; less than a block is no progress.
            let reached = (from + moved) / BLOCK_BYTES * BLOCK_BYTES;
            if reached > from {
                transfer_from(again, op, offset, buffer, reached, done);
            } else {
                let kind =
                    if op == Op::Read { io::ErrorKind::UnexpectedEof } else { io::ErrorKind::WriteZero };
                done(Err(kind.into()), buffer);
            }
        }
    };
    file.submit(Request {
        op,
        offset: offset + from as u64,
        buffer,
        range: from..length,
        done: Box::new(next),
    });
}

/// For so long a transfer is tried again that a signal or a kernel short of memory has ended, and with such pauses.
const TRYING_MAX: Duration = Duration::from_secs(5);
const TRYING_PAUSE: Duration = Duration::from_millis(20);

/// [`transfer`], waiting for its end. Not for a worker, and never on the I/O thread. What fails for a reason that passes
/// is tried again for some seconds: to the file it says nothing.
pub(super) fn transfer_blocking(
    file: &Arc<dyn BackingFile>,
    op: Op,
    offset: u64,
    mut buffer: Buffer,
) -> (io::Result<()>, Buffer) {
    let began = Instant::now();
    loop {
        let (result, back) = transfer_once(file, op, offset, buffer);
        match result {
            Err(err) if is_passing(&err) && began.elapsed() < TRYING_MAX => buffer = back,
            result => return (result, back),
        }
        std::thread::sleep(TRYING_PAUSE);
    }
}

/// A signal, or a kernel that is short of memory or of requests for the moment.
fn is_passing(err: &io::Error) -> bool {
    use io::ErrorKind::{Interrupted, OutOfMemory, ResourceBusy, WouldBlock};
    [Interrupted, OutOfMemory, ResourceBusy, WouldBlock].contains(&err.kind())
}

fn transfer_once(
    file: &Arc<dyn BackingFile>,
    op: Op,
    offset: u64,
    buffer: Buffer,
) -> (io::Result<()>, Buffer) {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    transfer(file, op, offset, buffer, move |result, buffer| {
        // The receiver waits below; it can't be gone.
        let _ = sender.send((result, buffer));
    });
    receiver.recv().expect("every request that is submitted ends")
}
