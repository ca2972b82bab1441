//! A file that fails as told, for tests: errors, short transfers, torn writes, requests that are held back. It wraps
//! another one and is no part of the daemon; it is public so that integration tests can use it.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::io::Errno;

use super::{BackingFile, IoKind, Op, Request};
use crate::writeback::place::BLOCK_BYTES;

/// What happens to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It fails without having moved a byte: `Errno::IO`, `Errno::NOSPC`.
    Error(Errno),
    /// It moves at most so many bytes and says so.
    Short(usize),
    /// So many blocks of it arrive, then it fails.
    Torn(usize, Errno),
    /// It is carried out after a while.
    Delay(Duration),
    /// It is carried out at [`Faulty::release`].
    Hold,
}

/// A backing file with faults. Requests are counted from zero, reads and writes apart, in the order of submission.
pub struct Faulty {
    inner: Arc<dyn BackingFile>,
    state: Mutex<State>,
    helper: Sender<Job>,
}

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    reads: u64,
    writes: u64,
    read_faults: HashMap<u64, Fault>,
    write_faults: HashMap<u64, Fault>,
    /// How the next ranges that are given back fail.
    discard_faults: Vec<Errno>,
    /// Bytes of the file that can't be read.
    bad: Option<Range<u64>>,
    held: Vec<Request>,
}

impl Faulty {
    /// Wraps `inner`, which does what is asked for until a fault is planned.
    #[must_use]
    pub fn new(inner: Arc<dyn BackingFile>) -> Self {
        let (helper, jobs) = mpsc::channel::<Job>();
        // A thread for each: they may take their time. Workers, which submit reads, may start none themselves.
        thread::spawn(move || jobs.into_iter().for_each(|job| drop(thread::spawn(job))));
        Self { inner, state: Mutex::default(), helper }
    }

    /// Plans a fault for the read that comes after `later` others from now on.
    pub fn fail_read(&self, later: u64, fault: Fault) {
        let mut state = self.state.lock();
        let number = state.reads + later;
        state.read_faults.insert(number, fault);
    }

    /// Plans a fault for the write that comes after `later` others from now on.
    pub fn fail_write(&self, later: u64, fault: Fault) {
        let mut state = self.state.lock();
        let number = state.writes + later;
        state.write_faults.insert(number, fault);
    }

    /// Ranges that are given back fail, once for each of these.
    pub fn fail_discards(&self, errors: &[Errno]) {
        self.state.lock().discard_faults.extend(errors.iter().rev());
    }

    /// From now on no read that touches this range of the file succeeds.
    pub fn damage(&self, range: Range<u64>) {
        self.state.lock().bad = Some(range);
    }

    /// Forgets the faults that have not happened, and damage.
    pub fn heal(&self) {
        let mut state = self.state.lock();
        state.read_faults.clear();
        state.write_faults.clear();
        state.bad = None;
    }

    /// Reads and writes submitted so far.
    #[must_use]
    pub fn submitted(&self) -> (u64, u64) {
        let state = self.state.lock();
        (state.reads, state.writes)
    }

    /// Carries out what was held back; returns how many requests that were.
    pub fn release(&self) -> usize {
        let held = std::mem::take(&mut self.state.lock().held);
        let count = held.len();
        for request in held {
            self.inner.submit(request);
        }
        count
    }

    fn fault(&self, request: &Request) -> Option<Fault> {
        let mut state = self.state.lock();
        let State { reads, writes, read_faults, write_faults, bad, .. } = &mut *state;
        let end = request.offset + request.range.len() as u64;
        let touched = bad.as_ref().is_some_and(|bad| request.offset < bad.end && bad.start < end);
        if touched && request.op == Op::Read {
            return Some(Fault::Error(Errno::IO));
        }
        let (count, faults) = match request.op {
            Op::Read => (reads, read_faults),
            Op::Write => (writes, write_faults),
        };
        let number = *count;
        *count += 1;
        faults.remove(&number)
    }

    fn tear(&self, mut request: Request, blocks: usize, errno: Errno) {
        let Request { range, done, .. } = request;
        let end = range.end.min(range.start + blocks * BLOCK_BYTES);
        request.range = range.start..end;
        request.done = Box::new(move |_, buffer| done(Err(errno.into()), buffer));
        if request.range.is_empty() {
            self.complete(request, Ok(0));
        } else {
            self.inner.submit(request);
        }
    }

    /// Ends a request as the world does: on a thread that is not the caller's.
    fn complete(&self, request: Request, result: io::Result<usize>) {
        self.elsewhere(move || request.complete(result));
    }

    fn elsewhere(&self, job: impl FnOnce() + Send + 'static) {
        self.helper.send(Box::new(job)).expect("the helper lives as long as the file");
    }
}

impl BackingFile for Faulty {
    fn submit(&self, mut request: Request) {
        match self.fault(&request) {
            None => self.inner.submit(request),
            Some(Fault::Error(errno)) => self.complete(request, Err(errno.into())),
            Some(Fault::Short(bytes)) => {
                // A direct transfer ends at a block boundary; what it says may be less than what it moved.
                let done = request.done;
                let length = request.range.len().min(bytes.next_multiple_of(BLOCK_BYTES));
                request.range.end = request.range.start + length;
                request.done =
                    Box::new(move |result, buffer| done(result.map(|moved| moved.min(bytes)), buffer));
                self.inner.submit(request);
            }
            Some(Fault::Torn(blocks, errno)) => self.tear(request, blocks, errno),
            Some(Fault::Delay(time)) => {
                let inner = Arc::clone(&self.inner);
                self.elsewhere(move || {
                    thread::sleep(time);
                    inner.submit(request);
                });
            }
            Some(Fault::Hold) => self.state.lock().held.push(request),
        }
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.state.lock().discard_faults.pop() {
            Some(errno) => Err(errno.into()),
            None => self.inner.discard(offset, bytes),
        }
    }

    fn shorten(&self, bytes: u64) -> io::Result<()> {
        self.inner.shorten(bytes)
    }

    fn kind(&self) -> IoKind {
        self.inner.kind()
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Faulty").field("inner", &self.inner).finish_non_exhaustive()
    }
}
