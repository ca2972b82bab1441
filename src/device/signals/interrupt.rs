//! System calls that must not last. The eventfds of a ring are a VMM's: it can let them block at any time, whatever mode
//! they had when they were looked at, and keep whoever writes to one, with all that this thread has to do for others. So
//! such a call is announced, and a guard interrupts the thread when it is still at it some milliseconds later, by a signal
//! that does nothing else. The guard sleeps while nobody calls, and looks round a hundred times a second otherwise.

#![allow(unsafe_code)]

use std::cell::OnceCell;
use std::io;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::Thread;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::thread::Pid;

use crate::threads::{self, Role};

const LOOK_EVERY: Duration = Duration::from_millis(10);
/// Looks without a call after which the guard sleeps.
const QUIET_LOOKS: u32 = 200;

/// One thread's calls.
#[derive(Debug)]
struct Calls {
    thread: Pid,
    /// Odd while it is at one.
    count: AtomicU64,
}

static THREADS: Mutex<Vec<Weak<Calls>>> = Mutex::new(Vec::new());
static GUARD: OnceLock<Thread> = OnceLock::new();
static ASLEEP: AtomicBool = AtomicBool::new(false);

thread_local! {
    static MINE: OnceCell<Arc<Calls>> = const { OnceCell::new() };
}

/// Starts the guard, once.
///
/// # Errors
/// When there can be no thread, or no handler for its signal.
pub fn start_guard() -> io::Result<()> {
    static STARTED: Mutex<bool> = Mutex::new(false);
    let mut started = STARTED.lock();
    if !*started {
        // SAFETY: `sigaction` is a structure of numbers and an optional function, for which zeros are values; the handler
        // does nothing. No SA_RESTART: to end the call is what the signal is for.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            if libc::sigaction(signal(), &raw const action, null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        let guard = threads::spawn("guard", Role::Listener, guard)?;
        let _ = GUARD.set(guard.thread().clone());
        *started = true;
    }
    Ok(())
}

/// Makes a system call that may fail with EINTR, and does so when it lasts.
pub fn briefly<T>(call: impl FnOnce() -> T) -> T {
    MINE.with(|mine| {
        let mine = mine.get_or_init(enlist);
        mine.count.fetch_add(1, Ordering::Relaxed);
        // In one order with the guard's: either it sees the count, or this thread that it sleeps.
        std::sync::atomic::fence(Ordering::SeqCst);
        if ASLEEP.load(Ordering::Relaxed) && ASLEEP.swap(false, Ordering::Relaxed) {
            GUARD.get().inspect(|guard| guard.unpark());
        }
        let result = call();
        mine.count.fetch_add(1, Ordering::Release);
        result
    })
}

fn enlist() -> Arc<Calls> {
    let calls = Arc::new(Calls { thread: rustix::thread::gettid(), count: AtomicU64::new(0) });
    let mut threads = THREADS.lock();
    threads.retain(|calls| calls.strong_count() > 0);
    threads.push(Arc::downgrade(&calls));
    calls
}

fn guard() {
    let (mut seen, mut quiet) = (Vec::new(), 0u32);
    loop {
        let now: Vec<_> = THREADS.lock().iter().filter_map(Weak::upgrade).collect();
        let counts: Vec<_> =
            now.iter().map(|calls| (calls.thread, calls.count.load(Ordering::Acquire))).collect();
        drop(now);
        for (thread, _) in counts.iter().filter(|call| call.1 % 2 == 1 && seen.contains(*call)) {
            interrupt(*thread);
        }
        quiet = if counts == seen { quiet.saturating_add(1) } else { 0 };
        let at_work = counts.iter().any(|(_, count)| count % 2 == 1);
        if quiet < QUIET_LOOKS || at_work {
            std::thread::sleep(LOOK_EVERY);
        } else {
            ASLEEP.store(true, Ordering::Relaxed);
            std::sync::atomic::fence(Ordering::SeqCst);
            let called = |(calls, (_, count)): (Arc<Calls>, &(Pid, u64))| {
                calls.count.load(Ordering::Relaxed) != *count
            };
            let again: Vec<_> = THREADS.lock().iter().filter_map(Weak::upgrade).collect();
            if again.len() == counts.len() && !again.into_iter().zip(&counts).any(called) {
                std::thread::park();
            }
            ASLEEP.store(false, Ordering::Relaxed);
            quiet = 0;
        }
        seen = counts;
    }
}

fn signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// A thread that has ended meanwhile, or another with its number, is none the worse for it.
fn interrupt(thread: Pid) {
    // SAFETY: takes numbers alone, and the signal's handler does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread.as_raw_nonzero().get(), signal()) };
}

extern "C" fn nothing(_: libc::c_int) {}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::Errno;

    #[test]
    fn a_call_that_blocks_is_interrupted_as_often_as_it_is_made() {
        start_guard().unwrap();
        start_guard().unwrap();
        let full = eventfd(0, EventfdFlags::empty()).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let empty = eventfd(0, EventfdFlags::empty()).unwrap();
        for pause_ms in [0, 30, 2500, 0] {
            // Long enough once for the guard to fall asleep.
            std::thread::sleep(Duration::from_millis(pause_ms));
            assert_eq!(briefly(|| rustix::io::write(&full, &1u64.to_ne_bytes())), Err(Errno::INTR));
            assert_eq!(briefly(|| rustix::io::read(&empty, &mut [0u8; 8])), Err(Errno::INTR));
        }
        assert_eq!(briefly(|| 7), 7);
    }

    #[test]
    fn threads_that_are_gone_are_forgotten() {
        let threads = || THREADS.lock().iter().filter(|calls| calls.strong_count() > 0).count();
        for _ in 0..50 {
            std::thread::spawn(|| briefly(|| ())).join().unwrap();
        }
        // Those of other tests that run meanwhile.
        assert!(threads() < 40, "{}", threads());
    }
}
