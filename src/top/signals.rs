//! The signals that end a program, while there is a terminal to give back: they are waited for on a thread, the screen ends
//! as if a key had been pressed, and when the terminal is as it was the program dies by the signal after all, so that
//! whoever sent it sees what they expect.

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::sys::signal::{SigSet, Signal, raise};

/// How long the screen may take to end. One whose terminal is gone waits for a key for ever.
const PATIENCE: Duration = Duration::from_secs(1);

/// What came, if anything did.
pub(super) struct Signals {
    waited_for: SigSet,
    came: Arc<OnceLock<Signal>>,
}

impl Signals {
    /// Waits for them from now on. Threads that were started before may still be killed by one.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub(super) fn watch() -> io::Result<Self> {
        let mut waited_for = SigSet::empty();
        // A terminal that is shown on sends no SIGINT: Ctrl-C is a key there.
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
            waited_for.add(signal);
        }
        waited_for.thread_block()?;
        let came = Arc::new(OnceLock::new());
        let tell = Arc::clone(&came);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            while tell.get().is_none() {
                if let Ok(signal) = waited_for.wait() {
                    let _ = tell.set(signal);
                }
            }
            std::thread::sleep(PATIENCE);
            let _ = Self { waited_for, came: tell }.die();
        })?;
        Ok(Self { waited_for, came })
    }

    /// Whether it is time to end.
    pub(super) fn came(&self) -> bool {
        self.came.get().is_some()
    }

    /// Does what the signal would have done, if one came.
    ///
    /// # Errors
    /// When it can't be raised.
    pub(super) fn die(&self) -> io::Result<()> {
        let Some(signal) = self.came.get() else { return Ok(()) };
        self.waited_for.thread_unblock()?;
        Ok(raise(*signal)?)
    }
}
