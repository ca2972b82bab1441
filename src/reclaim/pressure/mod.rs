//! Whether the host runs short of memory: a thread that waits for the kernel's PSI triggers, of the whole host and of
//! the daemon's own cgroup, and where the kernel keeps none looks at `MemAvailable` once a second. It tells its callback
//! and decides nothing: how much leaves the pool is the shrinker's affair. While pressure lasts it is told again, at
//! most once a second from each origin and level.

mod cgroup;
mod meminfo;
mod psi;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::threads::{self, Role};
use meminfo::Meminfo;
use psi::Trigger;

/// How often `MemAvailable` is looked at.
const PERIOD: Duration = Duration::from_secs(1);
/// What a descriptor says whose trigger is gone.
const ENDED: PollFlags = PollFlags::ERR.union(PollFlags::HUP).union(PollFlags::NVAL);

/// The host, or the daemon's own cgroup, runs short of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    /// What said so.
    pub origin: Origin,
    /// How bad it is.
    pub level: Level,
}

/// What said that memory is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The host's PSI.
    Host,
    /// The PSI of the daemon's own cgroup.
    Cgroup,
    /// The host's `MemAvailable`.
    MemAvailable,
}

/// How bad it is; the worse is the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Somebody waits for memory, or less than 10 % of it is available.
    Moderate,
    /// Everybody waits for memory, or less than 5 % of it is available.
    Severe,
}

/// How the daemon learns of pressure. `status` shows it as `psi`, `psi+cgroup` or `meminfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PressureSource {
    /// By PSI triggers.
    Psi {
        /// Whether the daemon's own cgroup is watched besides the host.
        cgroup: bool,
    },
    /// By looking at `MemAvailable`.
    MemAvailable,
}

impl fmt::Display for PressureSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Psi { cgroup: false } => "psi",
            Self::Psi { cgroup: true } => "psi+cgroup",
            Self::MemAvailable => "meminfo",
        })
    }
}

/// The files that tell of pressure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The host's PSI; may be missing.
    pub host_psi: PathBuf,
    /// The PSI of the daemon's own cgroup, when it has one.
    pub cgroup_psi: Option<PathBuf>,
    /// What is looked at without PSI.
    pub meminfo: PathBuf,
}

impl Files {
    /// Those of this host.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self {
            host_psi: "/proc/pressure/memory".into(),
            cgroup_psi: cgroup::pressure_file(),
            meminfo: "/proc/meminfo".into(),
        }
    }
}

/// The running thread. Dropping it stops and joins the thread; the callback isn't called any more after that.
#[derive(Debug)]
pub struct Monitor {
    source: Arc<Mutex<PressureSource>>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts watching. `tell` is called on the thread, and should not keep it long.
    ///
    /// # Errors
    /// When there can be no eventfd or no thread. That there is no PSI is no error.
    pub fn start(files: Files, tell: impl FnMut(Pressure) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let triggers = triggers(&files);
        let source = Arc::new(Mutex::new(source_of(&triggers)));
        let mut watch = Watch {
            triggers,
            meminfo: files.meminfo,
            level: None,
            blind: false,
            next_look: Instant::now(),
            source: Arc::clone(&source),
            tell,
        };
        let stopped = Arc::clone(&stop);
        let thread = threads::spawn("pressure", Role::Listener, move || watch.run(&stopped))?;
        Ok(Self { source, stop, thread: Some(thread) })
    }

    /// How the daemon learns of pressure now; a cgroup or a PSI that goes away while it is watched changes this.
    #[must_use]
    pub fn source(&self) -> PressureSource {
        *self.source.lock()
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let told = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        // A thread that wasn't told would be waited for in vain.
        if let (Ok(_), Some(thread)) = (told, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

/// The triggers that can be set. The cgroup's alone are not enough: the host's memory is what this is about.
fn triggers(files: &Files) -> Vec<Trigger> {
    let mut triggers = match psi::set(&files.host_psi, Origin::Host) {
        Ok(triggers) => triggers,
        Err(err) => {
            let psi = files.host_psi.display();
            tracing::info!(%psi, %err, "no PSI: memory pressure is told from MemAvailable");
            return Vec::new();
        }
    };
    if let Some(path) = &files.cgroup_psi {
        match psi::set(path, Origin::Cgroup) {
            Ok(of_cgroup) => triggers.extend(of_cgroup),
            Err(err) => {
                tracing::info!(psi = %path.display(), %err, "the pressure of the cgroup is not watched");
            }
        }
    }
    triggers
}

fn source_of(triggers: &[Trigger]) -> PressureSource {
    let any = |origin| triggers.iter().any(|trigger| trigger.pressure.origin == origin);
    if any(Origin::Host) {
        PressureSource::Psi { cgroup: any(Origin::Cgroup) }
    } else {
        PressureSource::MemAvailable
    }
}

/// What the thread holds.
struct Watch<F> {
    /// Empty when `MemAvailable` is looked at instead.
    triggers: Vec<Trigger>,
    meminfo: PathBuf,
    /// What the last look at `MemAvailable` found.
    level: Option<Level>,
    /// Whether somebody was told that there is nothing to look at.
    blind: bool,
    next_look: Instant,
    source: Arc<Mutex<PressureSource>>,
    tell: F,
}

impl<F: FnMut(Pressure)> Watch<F> {
    fn run(&mut self, stop: &OwnedFd) {
        while let Some(events) = self.wait(stop) {
            for (trigger, event) in self.triggers.iter().zip(&events) {
                // One that ends says both.
                if event.contains(PollFlags::PRI) && !event.intersects(ENDED) {
                    (self.tell)(trigger.pressure);
                }
            }
            self.forget_ended(&events);
            if self.triggers.is_empty() && Instant::now() >= self.next_look {
                self.next_look = Instant::now() + PERIOD;
                self.look();
            }
        }
    }

    /// Waits for the next event or the next look; gives what each trigger's descriptor says, or `None` to stop.
    fn wait(&self, stop: &OwnedFd) -> Option<Vec<PollFlags>> {
        let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
        fds.extend(
            self.triggers.iter().map(|trigger| PollFd::from_borrowed_fd(trigger.as_fd(), PollFlags::PRI)),
        );
        let timeout = self.triggers.is_empty().then(|| {
            let timeout = self.next_look.saturating_duration_since(Instant::now());
            Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() }
        });
        if let Err(err) = poll(&mut fds, timeout.as_ref()) {
            if err != rustix::io::Errno::INTR {
                tracing::error!(%err, "the pressure can't be waited for");
                std::thread::sleep(PERIOD);
            }
            return Some(Vec::new());
        }
        let mut events = fds.iter().map(PollFd::revents);
        events.next().is_some_and(|stop| stop.is_empty()).then(|| events.collect())
    }

    /// Drops the triggers whose cgroup was removed, or whose PSI was switched off; their descriptors would be ready
    /// for ever. Without the host's there are none.
    fn forget_ended(&mut self, events: &[PollFlags]) {
        if !events.iter().any(|event| event.intersects(ENDED)) {
            return;
        }
        let mut events = events.iter();
        self.triggers.retain(|_| events.next().is_none_or(|event| !event.intersects(ENDED)));
        let source = source_of(&self.triggers);
        if source == PressureSource::MemAvailable {
            self.triggers.clear();
        }
        *self.source.lock() = source;
        tracing::warn!(%source, "a PSI trigger ended");
    }

    fn look(&mut self) {
        let text = fs::read_to_string(&self.meminfo).unwrap_or_default();
        let meminfo = Meminfo::parse(&text);
        if meminfo.is_none() && !self.blind {
            self.blind = true;
            tracing::warn!(meminfo = %self.meminfo.display(), "it has no MemAvailable: memory pressure stays unseen");
        }
        self.level = meminfo.and_then(|meminfo| meminfo.level(self.level));
        if let Some(level) = self.level {
            (self.tell)(Pressure { origin: Origin::MemAvailable, level });
        }
    }
}

#[cfg(test)]
mod tests;
