//! The virtio balloon: a device by which a guest gives memory up. Somebody says how large it is to be; the guest takes
//! so many pages away from itself and names them, and they are returned to the host by punching them out of the memory
//! that its VMM shares ([`pages`]). What the guest reports as free is returned as well, and is its own again at once.
//! What is given up or free holds nothing that anybody wants, so no page is kept: who touches one all the same finds
//! zeros.
//!
//! A VM's balloon has a socket of its own. Each connection is a session, as of a disk, but one thread does all of it
//! ([`session`]): a hole takes as long as the file system makes it, which its VMM can draw out, and so no worker may wait
//! for it. cloud-hypervisor attaches it as `--generic-vhost-user socket=…,device_type=5,queue_sizes=[128,128]`.
//!
//! Two things are to be known of cloud-hypervisor. As of 2026 it passes none of a generic device's own features on, so its
//! guests have neither statistics nor reporting there and don't deflate when they are out of memory; how large the balloon is
//! to be reaches them. And it ends when a guest looks at the configuration space of such a device while no back end is
//! there, which a guest does whose balloon is changing: hold its size before the daemon is started again.
//!
//! A VM that has devices passed through to it must have no balloon: a device goes on writing to pages that were returned.

pub mod channel;
pub mod config_space;
pub mod given;
mod numbers;
pub mod pages;
pub mod ring;
mod session;
mod state;
mod stats;
pub mod turn;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

pub use numbers::Numbers;
pub use state::STATS_EVERY;
pub use stats::Stats;

use super::connections::Connections;
use super::memory_share::VmExtent;
use super::serving;
use super::session::Session;
use super::vm::DeviceVm;
use crate::page::PAGE_SIZE_U64;
use crate::threads::{self, Role};
use config_space::{DEFLATE_ON_OOM, REPORTING, STATS_VQ, has};
use session::Attachment;
use state::State;

/// A VM's balloon.
pub struct Balloon {
    vm: Arc<DeviceVm>,
    /// Guest memory that is mapped, of all sessions.
    mapped: VmExtent,
    connections: Connections,
    sessions: AtomicU64,
    state: Mutex<State>,
}

/// When a guest learns how large its balloon is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Told {
    /// It was told.
    Now,
    /// When it has one: no guest is attached.
    Later,
    /// When it looks by itself: its VMM has given no way to tell it.
    Unasked,
}

/// A size that no balloon can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a balloon of {bytes} bytes for a guest of {configured_bytes}: it has to leave the guest some memory"
)]
pub struct TooLarge {
    /// Bytes wanted.
    pub bytes: u64,
    /// Bytes of the guest's memory, or as many as a driver can count.
    pub configured_bytes: u64,
}

/// What is known of a balloon at a moment. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Whether a guest has it: its rings run.
    pub attached: bool,
    /// Whether its VMM can be told of a new target.
    pub listens: bool,
    /// Whether its driver says statistics.
    pub has_stats: bool,
    /// Whether it reports free pages.
    pub reports: bool,
    /// Whether it deflates the balloon by itself when it is out of memory.
    pub deflates_on_oom: bool,
    /// All of the guest's memory, as its VMM shares it; 0 without a guest.
    pub configured_bytes: u64,
    /// How large the balloon is to be; `None` while nobody has said so since the guest's driver began.
    pub target_bytes: Option<u64>,
    /// How large it is, as the driver says; `None` until it does.
    pub actual_bytes: Option<u64>,
    /// What the guest has given up in this session and not taken back.
    pub given_bytes: u64,
    /// What the guest said last of its memory, and how long ago.
    pub stats: Option<(Stats, Duration)>,
    /// What was counted since the daemon started.
    pub numbers: Numbers,
}

impl Balloon {
    /// The balloon of a VM, as a daemon before this one may have left it; nobody can connect to it yet.
    #[must_use]
    pub fn new(vm: Arc<DeviceVm>) -> Self {
        let [target_pages, actual_pages] =
            vm.pages().map_or([None; 2], |pages| pages.table().balloon_pages());
        let mut state = State::default();
        (state.target_pages, state.actual_pages) = (target_pages, actual_pages);
        let (mapped, connections) = (VmExtent::default(), Connections::default());
        Self { vm, mapped, connections, sessions: AtomicU64::new(0), state: Mutex::new(state) }
    }

    /// Whose it is.
    #[must_use]
    pub fn vm(&self) -> &Arc<DeviceVm> {
        &self.vm
    }

    /// Who is connected. Before the VM's pages are dropped this door is to be shut as the VM's own is.
    #[must_use]
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// Says how large the balloon is to be, rounded down to pages, and tells the guest. The guest gets there as it can.
    ///
    /// A driver that begins from nothing (a guest that boots) has no balloon until this is said again: then
    /// [`Look::target_bytes`] is `None`. What is said is noted beside the VM's pages: a daemon that is started again offers
    /// what its predecessor did, or a guest that looks would take its memory back.
    ///
    /// # Errors
    /// When it would leave the guest no memory; nothing is changed then.
    pub fn set_target(&self, bytes: u64) -> Result<Told, TooLarge> {
        let mut state = self.state.lock();
        let countable_bytes = u64::from(u32::MAX).saturating_mul(PAGE_SIZE_U64);
        let configured_bytes = state.guest.as_ref().map_or(u64::MAX, |guest| guest.configured_bytes);
        let configured_bytes = configured_bytes.min(countable_bytes);
        let pages =
            u32::try_from(bytes / PAGE_SIZE_U64).ok().filter(|_| bytes == 0 || bytes < configured_bytes);
        state.target_pages = Some(pages.ok_or(TooLarge { bytes, configured_bytes })?);
        self.note(&state);
        let attached = state.guest.is_some();
        let channel = state.guest.as_ref().and_then(|guest| guest.channel.clone());
        drop(state);
        Ok(match channel {
            Some(channel) if channel.config_changed().is_ok() => Told::Now,
            _ if attached => Told::Unasked,
            _ => Told::Later,
        })
    }

    /// Has a daemon that comes after this one know what holds. For whoever has changed it, before others can.
    fn note(&self, state: &State) {
        self.vm.note_balloon_pages([state.target_pages, state.actual_pages]);
    }

    /// Asks the guest for statistics, [`STATS_EVERY`] at most; they are in a later [`Self::look`]. False when it has none to
    /// give.
    pub fn ask_stats(&self) -> bool {
        let (has_stats, waker) = self.state.lock().ask_stats(Instant::now());
        if let Some(waker) = waker {
            // Full only if it was not looked at since it was last written to.
            let _ = waker.write(1);
        }
        has_stats
    }

    /// What is known at this moment.
    #[must_use]
    pub fn look(&self) -> Look {
        let state = self.state.lock();
        let bytes = |pages: u32| u64::from(pages).saturating_mul(PAGE_SIZE_U64);
        let mut look = Look {
            target_bytes: state.target_pages.map(bytes),
            actual_bytes: state.actual_pages.map(bytes),
            numbers: state.numbers,
            ..Look::default()
        };
        if let Some(guest) = &state.guest {
            look.attached = true;
            look.listens = guest.channel.is_some();
            look.has_stats = has(guest.features, STATS_VQ);
            look.reports = has(guest.features, REPORTING);
            look.deflates_on_oom = has(guest.features, DEFLATE_ON_OOM);
            look.configured_bytes = guest.configured_bytes;
            look.given_bytes = guest.given_pages.saturating_mul(PAGE_SIZE_U64);
            look.stats = guest.stats.map(|(stats, at)| (stats, at.elapsed()));
        }
        look
    }

    /// Accepts VMMs on the balloon's socket, on a thread of its own, until the VM or its balloon is over and the socket is
    /// shut or somebody connects once more.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn listen(self: &Arc<Self>, listener: impl Into<Arc<UnixListener>>) -> io::Result<()> {
        let (balloon, of) = (Arc::clone(self), Arc::clone(self));
        let is_over = move || of.connections.are_over() || of.vm.is_removed();
        serving::accept(listener.into(), "balloons", Arc::clone(&self.vm), is_over, move |stream| {
            balloon.attach(stream)
        })
    }

    fn attach(self: &Arc<Self>, stream: UnixStream) -> io::Result<()> {
        self.vm.check_service()?;
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let attachment = Attachment::new(number, Arc::clone(self), stream.try_clone()?)?;
        let session = Session::new(attachment).map_err(io::Error::other)?;
        self.connections.begin(number, &stream)?;
        let balloon = Arc::clone(self);
        let spawned = threads::spawn(format!("balloon-{}", self.vm.name()), Role::Balloon, move || {
            serving::serve(stream, session, &balloon.vm, &balloon.connections);
            balloon.connections.end(number);
        });
        if spawned.is_err() {
            self.connections.end(number);
        }
        spawned.map(|_| ())
    }
}
