//! Which VMMs are connected to a VM, and whether one more is let in. Before a VM's pages are dropped its door is shut:
//! those that are in are asked out or hung up on, and nobody comes in until it is opened again, if it is.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// Sessions that a VM may have at once: one whose rings run, and some that are set up meanwhile or wait for a slow
/// file before they end. Each costs a thread.
pub const SESSIONS_MAX: u32 = 8;

/// Why a VMM was not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Its pages can't be served.
    #[error("the VM is out of service: see `ballast status`")]
    OutOfService,
    /// The daemon crashed too often while it worked for it.
    #[error("the VM is quarantined: see `ballast status`")]
    Quarantined,
    /// Its pages are being dropped.
    #[error("the VM's pages are being dropped")]
    Shut,
    /// Too many are in already.
    #[error(
        "the VM has {SESSIONS_MAX} connections already, and one of them can run: end the VMMs that are not needed"
    )]
    TooMany,
}

/// Why the door can't be shut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Busy {
    /// Somebody is in.
    #[error("a VMM is connected")]
    Connected,
    /// Somebody was hung up on, and what it had asked of the writeback file has not come yet.
    #[error("a VMM was hung up on, and its requests have not ended yet")]
    Ending,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Door {
    #[default]
    Open,
    /// For a moment.
    Shut,
    /// The VM is gone.
    Over,
}

#[derive(Debug, Default)]
struct Inside {
    door: Door,
    /// The connections by the numbers of their sessions, to hang up on them.
    streams: BTreeMap<u64, UnixStream>,
}

/// A VM's connections.
#[derive(Debug, Default)]
pub struct Connections {
    inside: Mutex<Inside>,
    left: Condvar,
    /// The last one was ended by us: its VMM may come back at once, and again.
    failing: AtomicBool,
}

impl Connections {
    /// Whether a VMM is connected.
    #[must_use]
    pub fn any(&self) -> bool {
        !self.inside.lock().streams.is_empty()
    }

    /// Whether the last one that ended was ended by us.
    pub fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Relaxed)
    }

    /// Notes whether the one that ends was ended by us.
    pub fn set_failing(&self, failing: bool) {
        self.failing.store(failing, Ordering::Relaxed);
    }

    /// Lets one in.
    ///
    /// # Errors
    /// When the door is shut, too many are in, or there are no more file descriptors.
    pub fn begin(&self, number: u64, stream: &UnixStream) -> io::Result<()> {
        let stream = stream.try_clone()?;
        let mut inside = self.inside.lock();
        match inside.door {
            Door::Open if inside.streams.len() >= SESSIONS_MAX as usize => {
                Err(io::Error::other(Refused::TooMany))
            }
            Door::Open => {
                inside.streams.insert(number, stream);
                Ok(())
            }
            Door::Shut | Door::Over => Err(io::Error::other(Refused::Shut)),
        }
    }

    /// Notes that one is gone.
    pub fn end(&self, number: u64) {
        self.inside.lock().streams.remove(&number);
        self.left.notify_all();
    }

    /// Lets nobody in any more. Whoever is in is hung up on if `wait` says how long they may take to leave.
    ///
    /// # Errors
    /// When somebody is in, or still is after that time; the door is then as open as before.
    pub fn shut(&self, wait: Option<Duration>) -> Result<(), Busy> {
        let mut inside = self.inside.lock();
        let Some(wait) = wait.filter(|_| !inside.streams.is_empty()) else {
            if !inside.streams.is_empty() {
                return Err(Busy::Connected);
            }
            inside.door = Door::Shut;
            return Ok(());
        };
        inside.door = Door::Shut;
        for stream in inside.streams.values() {
            // One that has hung up by itself needs no help.
            let _ = stream.shutdown(Shutdown::Both);
        }
        let now = Instant::now();
        let deadline = now.checked_add(wait).unwrap_or(now);
        while !inside.streams.is_empty() {
            if self.left.wait_until(&mut inside, deadline).timed_out() && !inside.streams.is_empty() {
                inside.door = Door::Open;
                return Err(Busy::Ending);
            }
        }
        Ok(())
    }

    /// Lets VMMs in again.
    pub fn open(&self) {
        self.inside.lock().door = Door::Open;
    }

    /// Notes that the VM is gone, whose door is shut.
    pub fn end_for_good(&self) {
        self.inside.lock().door = Door::Over;
    }

    /// Whether the VM is gone.
    #[must_use]
    pub fn are_over(&self) -> bool {
        self.inside.lock().door == Door::Over
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::sync::Arc;

    use super::*;

    #[test]
    fn nobody_comes_in_while_the_door_is_shut() {
        let connections = Connections::default();
        let (_vmm, stream) = UnixStream::pair().unwrap();
        connections.begin(1, &stream).unwrap();
        assert_eq!(connections.shut(None), Err(Busy::Connected));
        connections.end(1);
        connections.shut(None).unwrap();
        assert!(connections.begin(2, &stream).is_err());
        connections.open();
        connections.begin(3, &stream).unwrap();
        assert!(connections.any());
    }

    #[test]
    fn who_is_in_is_hung_up_on_and_waited_for() {
        let connections = Arc::new(Connections::default());
        let (_vmm, mut stream) = UnixStream::pair().unwrap();
        connections.begin(1, &stream).unwrap();
        assert_eq!(connections.shut(Some(Duration::from_millis(1))), Err(Busy::Ending));
        let session = Arc::clone(&connections);
        let thread = std::thread::spawn(move || {
            let read = stream.read(&mut [0]).unwrap();
            session.end(1);
            read
        });
        connections.shut(Some(Duration::from_secs(60))).unwrap();
        assert_eq!(thread.join().unwrap(), 0);
        connections.end_for_good();
        assert!(connections.are_over());
    }

    #[test]
    fn so_many_are_in_at_once_and_no_more() {
        let connections = Connections::default();
        let (_vmm, stream) = UnixStream::pair().unwrap();
        for number in 0..20 {
            assert_eq!(connections.begin(number, &stream).is_ok(), number < 8, "{number}");
        }
    }
}
