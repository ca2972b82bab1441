//! Starting the daemon's threads: each has a name, and as much of the processor as what it does is urgent. Where
//! guests, VMMs and the shrinker want more than there is, a guest that waits for its page comes first.

use std::io;
use std::thread::{Builder, JoinHandle};

/// How urgent a thread's work is. Steps of niceness, from that of the process: ten steps are ten times less.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// A guest's processor stands still meanwhile.
    GuestWaits,
    /// Somebody waits, but no guest.
    Usual,
    /// Work that is done ahead of time.
    Ahead,
}

impl Urgency {
    fn steps(self) -> i32 {
        match self {
            Self::GuestWaits => -10,
            Self::Usual => 0,
            Self::Ahead => 10,
        }
    }
}

/// Starts a thread. Where the kernel refuses it more than its share (that takes CAP_SYS_NICE), it has its share.
///
/// # Errors
/// When there can be no more threads.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    urgency: Urgency,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(move || {
        set_niceness(urgency.steps());
        run()
    })
}

/// Changes the calling thread's niceness by `steps`.
fn set_niceness(steps: i32) {
    // On Linux, "the process 0" is the calling thread.
    if steps != 0
        && let Ok(nice) = rustix::process::getpriority_process(None)
        && let Err(err) = rustix::process::setpriority_process(None, nice.saturating_add(steps))
    {
        tracing::debug!(%err, steps, "a thread keeps the niceness of its process");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn niceness() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }

    #[test]
    fn urgent_threads_get_more_and_others_keep_theirs() {
        let usual = niceness();
        let of = |urgency| spawn("of", urgency, niceness).unwrap().join().unwrap();
        assert_eq!(of(Urgency::Usual), usual);
        assert_eq!(of(Urgency::Ahead), (usual + 10).min(19));
        // Without the capability nothing changes.
        assert!([usual, (usual - 10).max(-20)].contains(&of(Urgency::GuestWaits)));
        assert_eq!(niceness(), usual);
    }
}
