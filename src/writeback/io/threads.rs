//! The file by pread and pwrite on a few threads, for hosts and sandboxes that forbid io_uring.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex};
use rustix::io::ReadWriteFlags;

use super::{BackingFile, IoKind, Op, Request};
use crate::threads::{self, Role};
use crate::writeback::file::Target;

/// Enough that one slow read does not hold up the others; each is one fault of a guest.
const THREADS: usize = 4;

/// A fixed number of threads that take requests from one queue. Dropping it ends what was submitted, then them.
#[derive(Debug)]
pub struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    target: Target,
    queue: Mutex<Queue>,
    submitted: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    /// As long as the callers of the seam let it become.
    requests: VecDeque<Request>,
    stopping: bool,
}

impl Threads {
    /// Starts the threads.
    ///
    /// # Errors
    /// When the system starts no more threads.
    pub fn new(target: Target) -> io::Result<Self> {
        let shared = Arc::new(Shared { target, queue: Mutex::default(), submitted: Condvar::new() });
        let mut threads = Self { shared, threads: Vec::with_capacity(THREADS) };
        for _ in 0..THREADS {
            let shared = Arc::clone(&threads.shared);
            let thread = threads::spawn("writeback-io", Role::FileIo, move || shared.run())?;
            threads.threads.push(thread);
        }
        Ok(threads)
    }
}

impl Shared {
    fn run(&self) {
        while let Some(request) = self.next() {
            self.carry_out(request);
        }
    }

    fn next(&self) -> Option<Request> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(request) = queue.requests.pop_front() {
                return Some(request);
            }
            if queue.stopping {
                return None;
            }
            self.submitted.wait(&mut queue);
        }
    }

    fn carry_out(&self, mut request: Request) {
        let result = loop {
            match self.attempt(&mut request) {
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        if let (Op::Write, Ok(bytes)) = (request.op, &result) {
            self.target.written(request.offset, *bytes);
        }
        request.complete(result);
    }

    fn attempt(&self, request: &mut Request) -> io::Result<usize> {
        let range = request.range.clone();
        match request.op {
            Op::Read => self.target.file().read_at(&mut request.buffer.bytes_mut()[range], request.offset),
            Op::Write => {
                let flags =
                    if self.target.direct() { ReadWriteFlags::empty() } else { ReadWriteFlags::DSYNC };
                let bytes = [IoSlice::new(&request.buffer.bytes()[range])];
                Ok(rustix::io::pwritev2(self.target.file(), &bytes, request.offset, flags)?)
            }
        }
    }
}

impl BackingFile for Threads {
    fn submit(&self, request: Request) {
        self.shared.queue.lock().requests.push_back(request);
        self.shared.submitted.notify_one();
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.shared.target.discard(offset, bytes)
    }

    fn shorten(&self, bytes: u64) -> io::Result<()> {
        self.shared.target.shorten(bytes)
    }

    fn kind(&self) -> IoKind {
        IoKind::Threads
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.queue.lock().stopping = true;
        self.shared.submitted.notify_all();
        for thread in self.threads.drain(..) {
            // The last owner may be a request's end, on one of these threads: that one ends by itself.
            if thread.thread().id() != thread::current().id() {
                let ended = thread.join();
                debug_assert!(ended.is_ok());
            }
        }
    }
}
