//! What ends a program that shows something on a terminal: a signal, or a terminal that is gone. Both are waited for on a
//! thread, the screen ends as if a key had been pressed, and when the terminal is as it was the program dies by the signal
//! after all, so that whoever sent it sees what they expect. A terminal that goes sends its SIGHUP to the leader of its
//! session, who may have been started to ignore it (`nohup`) and so tell nobody; that it is gone is seen on it, too.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// How long the screen may take to end. One whose terminal is gone waits for a key for ever.
const PATIENCE: Duration = Duration::from_secs(1);

/// What came, if anything did.
pub(super) struct Signals {
    waited_for: SigSet,
    came: Arc<OnceLock<Signal>>,
}

impl Signals {
    /// Waits from now on for a signal, or for the end of `terminal`. Threads that were started before may still be killed by one.
    ///
    /// # Errors
    /// When the thread can't be started, or there are too many open files.
    pub(super) fn watch(terminal: impl AsFd + Send + 'static) -> io::Result<Self> {
        let mut waited_for = SigSet::empty();
        // A terminal that is shown on sends no SIGINT: Ctrl-C is a key there.
        for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
            waited_for.add(signal);
        }
        waited_for.thread_block()?;
        let pending = SignalFd::with_flags(&waited_for, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let came = Arc::new(OnceLock::new());
        let tell = Arc::clone(&came);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            let _ = tell.set(next(&pending, &terminal));
            std::thread::sleep(PATIENCE);
            Self { waited_for, came: tell }.die();
        })?;
        Ok(Self { waited_for, came })
    }

    /// Whether it is time to end.
    pub(super) fn came(&self) -> bool {
        self.came.get().is_some()
    }

    /// Does what the signal would have done, if one came. One that is ignored kills nobody, so the program ends with the
    /// exit code that a shell would give.
    pub(super) fn die(&self) {
        let Some(signal) = self.came.get() else { return };
        let _ = self.waited_for.thread_unblock().and_then(|()| raise(*signal));
        std::process::exit(128 + *signal as i32);
    }
}

/// Waits for one of the signals. A terminal that is gone is the signal that it should have sent.
fn next(pending: &SignalFd, terminal: &impl AsFd) -> Signal {
    loop {
        // Nothing is asked of the terminal: its end is told unasked.
        let mut fds = [
            PollFd::new(pending.as_fd(), PollFlags::POLLIN),
            PollFd::new(terminal.as_fd(), PollFlags::empty()),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            // Without memory for it: a screen that can't be ended by a signal isn't worth keeping.
            Err(_) => return Signal::SIGTERM,
        }
        let gone = fds[1].any().unwrap_or(true);
        if let Ok(Some(info)) = pending.read_signal()
            && let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed())
        {
            return signal;
        }
        if gone {
            return Signal::SIGHUP;
        }
    }
}
