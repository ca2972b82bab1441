//! The file by io_uring, on one thread that an eventfd wakes. The thread only submits, waits and calls whoever waits
//! for a request's end; it is what keeps a worker from ever entering the kernel for a disk.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;
use rustix::event::EventfdFlags;

use super::ring::Ring;
use super::{BackingFile, IoKind, Request};
use crate::threads::{self, Role};
use crate::writeback::file::Target;

/// Requests that the kernel has at a time; a device keeps up with fewer. What is more waits in the queue.
const REQUESTS_MAX: u16 = 127;

/// One ring and its thread. Dropping it ends what was submitted, then the thread.
#[derive(Debug)]
pub struct Uring {
    shared: Arc<Shared>,
    target: Target,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Written after the queue has changed.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct Queue {
    /// As long as the callers of the seam let it become.
    requests: VecDeque<Request>,
    stopping: bool,
}

impl Uring {
    /// Sets a ring up and starts its thread.
    ///
    /// # Errors
    /// When io_uring is forbidden or too old, or the system starts no more threads.
    pub fn new(target: Target) -> io::Result<Self> {
        let ring = Ring::new(target.clone(), REQUESTS_MAX)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let shared = Arc::new(Shared { queue: Mutex::default(), wake });
        let theirs = Arc::clone(&shared);
        let thread = threads::spawn("writeback-io", Role::FileIo, move || theirs.run(ring))?;
        Ok(Self { shared, target, thread: Some(thread) })
    }
}

impl Shared {
    fn run(&self, mut ring: Ring) {
        while self.feed(&mut ring) {
            // Without its ring the daemon knows neither what was written nor what may be read: recovery does.
            let ended = ring.wait(self.wake.as_fd()).expect("a ring that was set up goes on working");
            self.clear_wake();
            for (request, result) in ended {
                request.complete(result);
            }
        }
    }

    /// Starts what there is room for. False when everything is done and nothing more will come.
    fn feed(&self, ring: &mut Ring) -> bool {
        let mut queue = self.queue.lock();
        while ring.has_room() {
            let Some(request) = queue.requests.pop_front() else { break };
            ring.start(request);
        }
        !(queue.stopping && ring.is_idle())
    }

    fn wake(&self) {
        // The counter can't overflow before the thread reads it, and a full one would wake as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    fn clear_wake(&self) {
        // Nothing to read means that a request's end woke the thread.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }
}

impl BackingFile for Uring {
    fn submit(&self, request: Request) {
        self.shared.queue.lock().requests.push_back(request);
        self.shared.wake();
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.target.discard(offset, bytes)
    }

    fn shorten(&self, bytes: u64) -> io::Result<()> {
        self.target.shorten(bytes)
    }

    fn kind(&self) -> IoKind {
        IoKind::IoUring
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        self.shared.queue.lock().stopping = true;
        self.shared.wake();
        // The last owner may be a request's end, on the thread itself: then it ends by itself.
        if let Some(thread) =
            self.thread.take().filter(|thread| thread.thread().id() != thread::current().id())
        {
            let ended = thread.join();
            debug_assert!(ended.is_ok());
        }
    }
}
