//! Signals that end a process by its own doing: memory that isn't there, an impossible instruction, an abort. Some of
//! them are a VMM's doing, who cut the memory short that it shares: [`watch`] puts zeros there and the thread goes on;
//! and some come from a page of the arena that can't be read any more, which [`mend`] replaces. For all others it is written down whose request was carried out ([`blame`]), and the process ends as if nobody had
//! looked. What is sent from outside is nobody's fault here.
//!
//! The handler runs on the thread that it is about, whatever that holds: it reads and writes atomics, makes a few system
//! calls, and never unwinds, allocates or locks.

#![allow(unsafe_code)]

pub mod blame;
pub mod interrupt;
pub mod mend;
pub mod watch;

use std::io;
use std::ptr::null_mut;
use std::sync::OnceLock;

use libc::{SIGABRT, SIGBUS, SIGFPE, SIGILL, SIGSEGV, c_int, c_void, sigaction, siginfo_t};

const FATAL: [c_int; 5] = [SIGSEGV, SIGILL, SIGFPE, SIGABRT, SIGBUS];

/// What is said before a SIGBUS ends the daemon, where nothing can be formatted any more.
const LAST_WORDS: &str = "ballast: a file in the state directory was cut short, can't be read any more or can't be backed with \
                          memory, and the daemon ends; start it again, and it says which VMs that took out of service\n";

/// What was done about each of them before.
static BEFORE: [OnceLock<sigaction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// Installs the handler, once.
///
/// # Errors
/// When the kernel refuses.
pub fn install() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), io::ErrorKind>> = OnceLock::new();
    let install_all =
        || FATAL.into_iter().zip(&BEFORE).try_for_each(|(signal, before)| install_for(signal, before));
    INSTALLED.get_or_init(|| install_all().map_err(|err| err.kind())).map_err(Into::into)
}

fn install_for(signal: c_int, before: &OnceLock<sigaction>) -> io::Result<()> {
    // SAFETY: `sigaction` is a structure of numbers and an optional function, for which zeros are values: no flags, an
    // empty mask, the default action.
    let (mut action, mut old): (sigaction, sigaction) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    action.sa_sigaction = on_fatal as *const () as usize;
    // On the stack that each thread has for this: its own may be what has run out.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both pointers are to structures that live here, and the handler is one for SA_SIGINFO that keeps to what
    // is safe in a handler.
    unsafe {
        if libc::sigaction(signal, null_mut(), &raw mut old) != 0 {
            return Err(io::Error::last_os_error());
        }
        let _ = before.set(old);
        if libc::sigaction(signal, &raw const action, null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

extern "C" fn on_fatal(signal: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel hands a handler that was installed with SA_SIGINFO a valid siginfo.
    let info = unsafe { &*info };
    let by_instruction = info.si_code > 0;
    // Memory has failed that nobody touches now. Whoever does gets another signal for it.
    if signal == SIGBUS && info.si_code == libc::BUS_MCEERR_AO {
        return;
    }
    if signal == SIGBUS && by_instruction {
        // SAFETY: for a SIGBUS that an instruction caused the address is a field of its siginfo.
        let address = unsafe { info.si_addr() }.addr();
        if watch::put_zeros_at(address) {
            return;
        }
        // SAFETY: `write` is async-signal-safe, and the message is as long as it says.
        unsafe { libc::write(libc::STDERR_FILENO, LAST_WORDS.as_ptr().cast(), LAST_WORDS.len()) };
    }
    // An abort is a signal that the process sends to its own thread.
    // SAFETY: for a signal that was sent the sender is a field of its siginfo; `getpid` can't fail.
    if by_instruction || (info.si_code == libc::SI_TKILL && unsafe { info.si_pid() == libc::getpid() }) {
        blame::note();
    }
    hand_on(signal, by_instruction);
}

/// Lets happen what would have happened without us. With the old action back in place an instruction faults again; a
/// signal that was sent is sent again, which arrives when the handler has returned.
fn hand_on(signal: c_int, by_instruction: bool) {
    let before =
        FATAL.iter().zip(&BEFORE).find(|(other, _)| **other == signal).and_then(|(_, before)| before.get());
    // SAFETY: `sigaction`, `signal` and `raise` are async-signal-safe; the old action is one that the kernel gave.
    unsafe {
        if let Some(before) = before.filter(|_| by_instruction) {
            libc::sigaction(signal, before, null_mut());
        } else {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
    }
}
