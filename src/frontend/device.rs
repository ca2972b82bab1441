//! The VMM's side of the socket: attach, negotiate, tell of memory and rings, stop them, come back after the
//! back end died. It holds what must outlive a connection (guest memory, where the rings are, the event
//! descriptors, the in-flight region) and never touches a request: queues go on in their own threads.

use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Error;
use super::blk::{BlkConfig, CONFIG_BYTES};
use super::conversation::region_info;
use super::memory::Memory;
use super::negotiation::{MemoryMessages, Options};
use super::queue::Queue;
use super::ring::Place;

/// How long the back end may take to answer a message.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// Time between two attempts to connect; VMMs take 100 ms, tests have less patience.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// The in-flight region: kept by the front end, so that a restarted back end finds what was not done.
#[derive(Debug)]
pub struct Inflight {
    /// What GET_INFLIGHT_FD answered.
    pub description: InflightDescription,
    /// The shared memory.
    pub file: File,
}

/// Where the in-flight records are in their file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InflightDescription {
    /// Size in bytes.
    pub bytes: u64,
    /// Offset in bytes.
    pub offset: u64,
    /// Number of queues it is for.
    pub queues: u16,
    /// Descriptors in each.
    pub queue_size: u16,
}

impl InflightDescription {
    pub(super) fn message(self) -> VhostUserInflight {
        VhostUserInflight::new(self.bytes, self.offset, self.queues, self.queue_size)
    }
}

/// What the back end is told of one queue.
pub(super) struct Vring {
    pub(super) place: Place,
    pub(super) kick: EventFd,
    pub(super) call: EventFd,
    /// Where the back end stopped, after GET_VRING_BASE.
    pub(super) stopped_at: Option<u16>,
}

/// A vhost-user-blk device, as a VMM sees it.
pub struct Device {
    pub(super) path: PathBuf,
    pub(super) options: Options,
    pub(super) memory: Memory,
    pub(super) connection: Option<(Frontend, UnixStream)>,
    pub(super) features: u64,
    pub(super) protocol_features: VhostUserProtocolFeatures,
    pub(super) config: BlkConfig,
    pub(super) config_space: Vec<u8>,
    pub(super) vrings: Vec<Vring>,
    pub(super) inflight: Option<Inflight>,
    /// Where the back end notes what it writes, once it was asked to.
    pub(super) log: Option<File>,
    /// Whether that goes on: the next back end gets another log.
    pub(super) logged: bool,
}

impl Device {
    /// Connects and negotiates, up to and including the configuration space.
    ///
    /// # Errors
    /// When nobody listens, or the back end lacks `VIRTIO_F_VERSION_1`, protocol features or CONFIG.
    pub fn connect(path: impl AsRef<Path>, memory: Memory, options: Options) -> Result<Self, Error> {
        let path = path.as_ref().to_owned();
        let connection = Some(open(&path, &options)?);
        let mut device = Self {
            path,
            options,
            memory,
            connection,
            features: 0,
            protocol_features: VhostUserProtocolFeatures::empty(),
            config: BlkConfig::parse(&[0; CONFIG_BYTES], 0)?,
            config_space: Vec::new(),
            vrings: Vec::new(),
            inflight: None,
            log: None,
            logged: false,
        };
        device.negotiate()?;
        device.read_config()?;
        Ok(device)
    }

    /// The virtio features in use.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The protocol features in use.
    #[must_use]
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol_features
    }

    /// The configuration space, read.
    #[must_use]
    pub fn config(&self) -> &BlkConfig {
        &self.config
    }

    /// The configuration space as it came.
    #[must_use]
    pub fn config_space(&self) -> &[u8] {
        &self.config_space
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The in-flight region, once rings were started with a back end that has one.
    #[must_use]
    pub fn inflight(&self) -> Option<&Inflight> {
        self.inflight.as_ref()
    }

    /// Gives the next start or reconnect another in-flight region, or none, as a VMM with a mistaken idea
    /// of its past would. Returns the one that was there.
    pub fn replace_inflight(&mut self, inflight: Option<Inflight>) -> Option<Inflight> {
        std::mem::replace(&mut self.inflight, inflight)
    }

    /// The `vhost` crate's end of the connection, for messages that no well-behaved VMM sends.
    ///
    /// # Errors
    /// When not connected.
    pub fn frontend(&mut self) -> Result<&mut Frontend, Error> {
        match &mut self.connection {
            Some((frontend, _)) => Ok(frontend),
            None => Err(Error::Usage("the device is not connected")),
        }
    }

    /// Makes the queues and starts their rings.
    ///
    /// # Errors
    /// When memory is short or the back end refuses.
    pub fn start(&mut self) -> Result<Vec<Queue>, Error> {
        if !self.vrings.is_empty() {
            return Err(Error::Usage("the device was started already"));
        }
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let mut queues = Vec::new();
        for _ in 0..self.options.queues {
            let (kick, call) = (event_fd()?, event_fd()?);
            let ours = (clone_fd(&kick)?, clone_fd(&call)?);
            let mut queue = Queue::new(&self.memory, &self.options, event_idx, ours.0, ours.1)?;
            self.vrings.push(Vring { place: queue.ring().place(), kick, call, stopped_at: Some(0) });
            queues.push(queue);
        }
        self.start_rings()?;
        Ok(queues)
    }

    /// Stops every ring with GET_VRING_BASE and returns the available index at which each stopped. What
    /// the back end had taken is then done.
    ///
    /// # Errors
    /// When not connected or the back end refuses.
    pub fn stop(&mut self) -> Result<Vec<u16>, Error> {
        (0..self.vrings.len()).map(|index| self.stop_ring(index)).collect()
    }

    /// Stops one ring, as [`Self::stop`] does with all.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn stop_ring(&mut self, index: usize) -> Result<u16, Error> {
        let base = self.frontend()?.get_vring_base(index).map_err(Error::message("GET_VRING_BASE"))?;
        let base = u16::try_from(base).map_err(|_| Error::Usage("the back end stopped at no ring index"))?;
        if let Some(vring) = self.vrings.get_mut(index) {
            vring.stopped_at = Some(base);
        }
        Ok(base)
    }

    /// Starts the rings again on the same connection, where [`Self::stop`] stopped them.
    ///
    /// # Errors
    /// When not connected or the back end refuses.
    pub fn resume(&mut self) -> Result<(), Error> {
        self.start_rings()
    }

    /// Enables or disables one ring with SET_VRING_ENABLE.
    ///
    /// # Errors
    /// When not connected or the back end refuses.
    pub fn enable_ring(&mut self, index: usize, enable: bool) -> Result<(), Error> {
        let frontend = self.frontend()?;
        frontend.set_vring_enable(index, enable).map_err(Error::message("SET_VRING_ENABLE"))
    }

    /// Closes the connection without a word, as a VMM that dies. Memory, rings and in-flight region stay.
    pub fn disconnect(&mut self) {
        self.connection = None;
    }

    /// Whether the back end still holds its end of the connection.
    #[must_use]
    pub fn is_connected(&self) -> bool {
        let Some((_, stream)) = &self.connection else { return false };
        let mut fds = [PollFd::new(stream, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match poll(&mut fds, Some(&now)) {
            Ok(_) => !fds[0].revents().intersects(PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR),
            Err(_) => true,
        }
    }

    /// Waits for a back end on the same socket for up to `within`, and gives it the same memory, rings and
    /// in-flight region, so that requests in flight get their answers. Rings are not kicked: a back end
    /// must look by itself at what it is given.
    ///
    /// # Errors
    /// When none came in time, or it refuses.
    pub fn reconnect(&mut self, within: Duration) -> Result<(), Error> {
        self.disconnect();
        let deadline = Instant::now() + within;
        loop {
            match self.reattach() {
                Ok(()) => return Ok(()),
                // A back end that is only just dying lets one connect and then hangs up.
                Err(Error::Connect { .. }) if Instant::now() < deadline => thread::sleep(RETRY_INTERVAL),
                Err(_) if !self.is_connected() && Instant::now() < deadline => thread::sleep(RETRY_INTERVAL),
                Err(err) => return Err(err),
            }
        }
    }

    /// Makes a region of guest memory and tells the back end.
    ///
    /// # Errors
    /// When it overlaps another or the back end refuses.
    pub fn add_region(&mut self, address: u64, bytes: usize) -> Result<(), Error> {
        let region = self.memory.add(address, bytes)?;
        match self.options.memory_messages {
            MemoryMessages::Table => self.send_memory(),
            MemoryMessages::Slots => {
                let region = region_info(&region)?;
                self.frontend()?.add_mem_region(&region).map_err(Error::message("ADD_MEM_REG"))?;
                Ok(())
            }
        }
    }

    /// Takes the region that starts at `address` away from the back end and out of guest memory.
    ///
    /// # Errors
    /// When there is none or the back end refuses.
    pub fn remove_region(&mut self, address: u64) -> Result<(), Error> {
        let region = self.memory.remove(address)?;
        match self.options.memory_messages {
            MemoryMessages::Table => self.send_memory(),
            MemoryMessages::Slots => {
                let region = region_info(&region)?;
                self.frontend()?.remove_mem_region(&region).map_err(Error::message("REM_MEM_REG"))
            }
        }
    }
}

pub(super) fn open(path: &Path, options: &Options) -> Result<(Frontend, UnixStream), Error> {
    let failed = |source| Error::Connect { path: path.to_owned(), source };
    let stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(failed)?;
    let second = stream.try_clone().map_err(failed)?;
    Ok((Frontend::from_stream(stream, u64::from(options.queues)), second))
}

fn event_fd() -> Result<EventFd, Error> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
        .map_err(|source| Error::Descriptor { action: "make an event descriptor", source })
}

fn clone_fd(fd: &EventFd) -> Result<EventFd, Error> {
    fd.try_clone().map_err(|source| Error::Descriptor { action: "share an event descriptor", source })
}
