//! An io_uring with the requests that it carries out. It owns each request, and so the memory that the kernel reads
//! or writes, until the kernel has reported the end of it; dropping the ring waits for that too. One of the room's
//! two files with unsafe code (the other is `file/discard`).

#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::squeue::Entry;
use io_uring::types::Fd;
use io_uring::{IoUring, Probe, cqueue, opcode};
use rustix::event::PollFlags;
use rustix::io::ReadWriteFlags;

use super::{Op, Request};
use crate::writeback::file::Target;

/// What the completion of the wake-up is told by; requests are told by their index.
const WAKE: u64 = u64::MAX;

/// All that the ring does: it has operations that make sockets and open files, which no filter of system calls sees.
const OPERATIONS: [u8; 3] = [opcode::Read::CODE, opcode::Write::CODE, opcode::PollAdd::CODE];

/// A ring, used by one thread.
pub struct Ring {
    ring: IoUring,
    target: Target,
    /// Requests that the kernel has or will be given; `None` where there is room for one.
    flying: Vec<Option<Request>>,
    /// Indices of the room in `flying`.
    room: Vec<usize>,
    /// True while the kernel watches the wake-up.
    watching: bool,
}

impl Ring {
    /// A ring for up to `requests_max` requests at a time.
    ///
    /// # Errors
    /// When io_uring is forbidden, or too old to be restricted to reading and writing (before Linux 5.10).
    pub fn new(target: Target, requests_max: u16) -> io::Result<Self> {
        // One more for the wake-up: the submission queue has room for everything at once.
        let ring = IoUring::builder().setup_r_disabled().build(u32::from(requests_max) + 1)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !OPERATIONS.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_restrictions(&mut OPERATIONS.map(Restriction::sqe_op))?;
        ring.submitter().register_enable_rings()?;
        // A sandbox may allow the set-up and forbid the use. An empty ring that may be entered says so at once.
        ring.submit()?;
        let requests_max = usize::from(requests_max);
        let flying = (0..requests_max).map(|_| None).collect();
        Ok(Self { ring, target, flying, room: (0..requests_max).collect(), watching: false })
    }

    /// Whether another request may be started.
    pub fn has_room(&self) -> bool {
        !self.room.is_empty()
    }

    /// Whether no request is being carried out.
    pub fn is_idle(&self) -> bool {
        self.room.len() == self.flying.len()
    }

    /// Starts a request; the next [`Ring::wait`] gives it to the kernel.
    ///
    /// # Panics
    /// When there is no room.
    pub fn start(&mut self, request: Request) {
        let index = self.room.pop().expect("the caller asked for room");
        let request = self.flying[index].insert(request);
        let (fd, offset) = (Fd(self.target.file().as_raw_fd()), request.offset);
        let memory = &mut request.buffer.bytes_mut()[request.range.clone()];
        let length = u32::try_from(memory.len()).expect("a transfer is at most a segment");
        let entry = match request.op {
            Op::Read => opcode::Read::new(fd, memory.as_mut_ptr(), length).offset(offset).build(),
            Op::Write => {
                let flags =
                    if self.target.direct() { ReadWriteFlags::empty() } else { ReadWriteFlags::DSYNC };
                let flags = flags.bits().cast_signed();
                opcode::Write::new(fd, memory.as_ptr(), length).offset(offset).rw_flags(flags).build()
            }
        };
        self.push(&entry.user_data(index as u64));
    }

    fn push(&mut self, entry: &Entry) {
        // SAFETY: the kernel may use the entry's file and memory until it reports the completion. The file is open
        // as long as `self.target`, or is the caller's wake-up, of which the kernel takes its own reference at
        // submission. The memory is the buffer of a request in `self.flying`; it stays there, unmoved (a `Buffer`
        // never reallocates) and untouched, until `reap` sees its completion, and `drop` waits for all of them. An
        // I/O thread that panics unwinds through that `drop`.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the submission queue has an entry for every request and the wake-up");
    }

    /// Waits until a request ends or `wake` is readable, and returns the requests that ended.
    ///
    /// # Errors
    /// When the kernel refuses to go on, which leaves the fate of the requests unknown.
    pub fn wait(&mut self, wake: BorrowedFd<'_>) -> io::Result<Vec<(Request, io::Result<usize>)>> {
        if !self.watching {
            let readable = u32::from(PollFlags::IN.bits());
            self.push(&opcode::PollAdd::new(Fd(wake.as_raw_fd()), readable).build().user_data(WAKE));
            self.watching = true;
        }
        self.enter()?;
        Ok(self.reap())
    }

    fn enter(&mut self) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(1) {
                Err(err) if is_passing(&err) => {}
                result => return result.map(|_| ()),
            }
        }
    }

    fn reap(&mut self) -> Vec<(Request, io::Result<usize>)> {
        let ended: Vec<_> =
            self.ring.completion().map(|entry| (entry.user_data(), result_of(&entry))).collect();
        let mut requests = Vec::with_capacity(ended.len());
        for (told, result) in ended {
            if told == WAKE {
                self.watching = false;
                continue;
            }
            let index = usize::try_from(told).expect("indices are small");
            let request = self.flying[index].take().expect("a request ends once");
            self.room.push(index);
            if let (Op::Write, Ok(bytes)) = (request.op, &result) {
                self.target.written(request.offset, *bytes);
            }
            requests.push((request, result));
        }
        requests
    }
}

fn result_of(entry: &cqueue::Entry) -> io::Result<usize> {
    usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()))
}

/// A signal, or a kernel that is short of memory or of room for completions for the moment.
fn is_passing(err: &io::Error) -> bool {
    matches!(
        rustix::io::Errno::from_io_error(err),
        Some(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN | rustix::io::Errno::BUSY)
    )
}

impl Drop for Ring {
    fn drop(&mut self) {
        while !self.is_idle() {
            if self.enter().is_err() {
                // The kernel may still write to this memory: it must never be used for anything else.
                std::mem::forget(std::mem::take(&mut self.flying));
                return;
            }
            // Their ends are not told: who drops the ring does so after the last, or is panicking.
            self.reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn the_ring_makes_no_sockets_and_opens_no_files() {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::open(&dir.path().join("file"), true, Duration::ZERO).unwrap().unwrap();
        // Where the kernel has none, threads do the work, which the filter of system calls sees.
        let mut ring = match Ring::new(target, 4) {
            Ok(ring) => ring,
            Err(err) => return eprintln!("no io_uring on this machine, nothing to restrict: {err}"),
        };
        let path = c"/dev/null";
        let entries = [
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
            opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build(),
            opcode::Nop::new().build(),
        ];
        for entry in entries {
            ring.push(&entry);
            ring.enter().unwrap();
            let results: Vec<_> = ring.ring.completion().map(|entry| entry.result()).collect();
            assert_eq!(results, [-libc::EACCES]);
        }
        assert!(ring.ring.submitter().register_probe(&mut Probe::new()).is_err(), "nor is more registered");
    }
}
