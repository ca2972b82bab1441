//! Ctrl-C and its kin as a flag that the demo's loop looks at, so that every way out goes through `Drop`.

use std::ffi::c_void;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::Signal;
use vmm_sys_util::signal::register_signal_handler;

use super::error::Error;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Generic only because the second argument points to a type of libc, which this package does not name.
extern "C" fn note<T>(_signal: i32, _info: *mut T, _context: *mut c_void) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From here on SIGINT, SIGTERM and SIGHUP set the flag and nothing else.
pub(super) fn watch() -> Result<(), Error> {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        register_signal_handler(signal.as_raw(), note)
            .map_err(|error| Error::io("watch for signals")(error.into()))?;
    }
    Ok(())
}

/// Fails once a signal has come.
pub(super) fn check() -> Result<(), Error> {
    if INTERRUPTED.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
