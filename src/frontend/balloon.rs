//! A balloon's driver and its VMM: pages that are given up, taken back and reported, statistics, the configuration space,
//! and the channel by which a back end says that it has changed. As its sister for disks it knows nothing of Ballast and
//! sends whatever nonsense it is told to; [`Device`] does the talking.

use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{FrontendReqHandler, HandlerResult, VhostUserFrontend, VhostUserFrontendReqHandler};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::Device;
use super::memory::Memory;
use super::negotiation::Options;
use super::queue::Queue;
use super::ring::Descriptor;
use super::{Error, Wait};

/// How long the back end may take for what it does at once.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes of the list of pages that a driver gives up: far more than any names at once.
const LIST_BYTES: usize = 1 << 20;
const STATS_BYTES: usize = 4096;
const TAG: u16 = 0;

/// What the driver reads and writes of a balloon's configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonConfig {
    /// How large the balloon is to be, in pages of 4096 bytes.
    pub num_pages: u32,
    /// How large the driver has said that it is.
    pub actual: u32,
    /// What the driver has said to fill free pages with.
    pub poison_val: u32,
}

impl Options {
    /// For a balloon with this many queues, and the features of these bits beside those that every device has.
    #[must_use]
    pub fn for_balloon(queues: u16, features: &[u32]) -> Self {
        let bits = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        let features = bits.iter().chain(features).fold(0, |all, bit| all | 1 << bit);
        let defaults = Self::default();
        Self {
            queues,
            depth: 16,
            data_bytes: 4096,
            features: features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits(),
            protocol_features: defaults.protocol_features | VhostUserProtocolFeatures::BACKEND_REQ,
            ..defaults
        }
    }
}

#[derive(Default)]
struct Changes(AtomicU64);

impl VhostUserFrontendReqHandler for Changes {
    fn handle_config_change(&self) -> HandlerResult<u64> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(0)
    }
}

/// The VMM's end of the channel by which a back end says something by itself.
struct Channel {
    changes: Arc<Changes>,
    handler: FrontendReqHandler<Changes>,
    epoll: Epoll,
}

impl Channel {
    fn new(replies: bool) -> Result<Self, Error> {
        let changes = Arc::new(Changes::default());
        let made = FrontendReqHandler::new(Arc::clone(&changes));
        let mut handler = made.map_err(|err| failed(io::Error::other(err)))?;
        handler.set_reply_ack_flag(replies);
        let epoll = Epoll::new().map_err(failed)?;
        let event = EpollEvent::new(EventSet::IN, 0);
        epoll.ctl(ControlOperation::Add, handler.as_raw_fd(), event).map_err(failed)?;
        Ok(Self { changes, handler, epoll })
    }
}

fn failed(source: io::Error) -> Error {
    Error::Descriptor { action: "use the back end's channel", source }
}

/// A balloon, as a VMM and its guest's driver see it.
pub struct Balloon {
    device: Device,
    /// In the order of their numbers.
    queues: Vec<Queue>,
    channel: Option<Channel>,
    list: GuestAddress,
    stats: GuestAddress,
}

impl Balloon {
    /// Attaches, starts all queues, and hands over a channel if the back end takes one. The first two queues are those for
    /// pages that are given up and taken back.
    ///
    /// # Errors
    /// As [`Device::connect`] and [`Device::start`].
    pub fn attach(path: impl AsRef<Path>, memory: Memory, options: Options) -> Result<Self, Error> {
        let (list, stats) = (memory.allocate(LIST_BYTES)?, memory.allocate(STATS_BYTES)?);
        let mut device = Device::connect(path, memory, options)?;
        let mut queues = device.start()?;
        queues.iter_mut().for_each(|queue| queue.set_wait(Wait::Sleep));
        let mut balloon = Self { device, queues, channel: None, list, stats };
        let protocol_features = balloon.device.protocol_features();
        if protocol_features.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
            let replies = protocol_features.contains(VhostUserProtocolFeatures::REPLY_ACK);
            balloon.channel = Some(Channel::new(replies)?);
            balloon.hand_channel_over()?;
        }
        Ok(balloon)
    }

    fn hand_channel_over(&mut self) -> Result<(), Error> {
        let Some(channel) = &self.channel else { return Ok(()) };
        let sent = self.device.frontend()?.set_backend_request_fd(&channel.handler.get_tx_raw_fd());
        sent.map_err(Error::message("SET_BACKEND_REQ_FD"))
    }

    /// The VMM's side.
    pub fn device(&mut self) -> &mut Device {
        &mut self.device
    }

    /// A queue, for what no driver does.
    ///
    /// # Panics
    /// When there is no such queue.
    pub fn queue(&mut self, index: usize) -> &mut Queue {
        &mut self.queues[index]
    }

    /// As [`Device::reconnect`], with the channel that is there.
    ///
    /// # Errors
    /// As [`Device::reconnect`].
    pub fn reconnect(&mut self, within: Duration) -> Result<(), Error> {
        self.device.reconnect(within)?;
        self.hand_channel_over()
    }

    /// Gives pages up, by their numbers; returns when they are taken.
    ///
    /// # Errors
    /// When nothing came back.
    pub fn inflate(&mut self, pages: &[u32]) -> Result<(), Error> {
        self.name(0, pages)?;
        self.finish(0)
    }

    /// Takes pages back.
    ///
    /// # Errors
    /// When nothing came back.
    pub fn deflate(&mut self, pages: &[u32]) -> Result<(), Error> {
        self.name(1, pages)?;
        self.finish(1)
    }

    /// Puts a list of pages on a queue and waits for nothing.
    ///
    /// # Errors
    /// When the list is too long, or the one before it isn't back yet.
    pub fn name(&mut self, queue: usize, pages: &[u32]) -> Result<(), Error> {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        if bytes.len() > LIST_BYTES {
            return Err(Error::Usage("the list of pages is too long"));
        }
        self.device.memory().write(self.list, &bytes)?;
        let length = u32::try_from(bytes.len()).map_err(|_| Error::Usage("the list of pages is too long"))?;
        self.put(queue, &[Descriptor { address: self.list.0, bytes: length, flags: 0, next: 0 }])
    }

    /// Reports ranges as free, by addresses and lengths in bytes, through the queue with this number.
    ///
    /// # Errors
    /// When there are more ranges than eight, or nothing came back.
    pub fn report(&mut self, queue: usize, ranges: &[(u64, u32)]) -> Result<(), Error> {
        let first = self.queues[queue].descriptor_index(TAG, 0);
        let mut chain = Vec::new();
        for (next, (address, bytes)) in (first + 1..).zip(ranges) {
            let last = chain.len() + 1 == ranges.len();
            let flags = Descriptor::WRITE | if last { 0 } else { Descriptor::NEXT };
            chain.push(Descriptor { address: *address, bytes: *bytes, flags, next });
        }
        self.put(queue, &chain)?;
        self.finish(queue)
    }

    /// Puts a chain on a queue as it stands and waits for nothing.
    ///
    /// # Errors
    /// When the one before it isn't back yet.
    pub fn put(&mut self, queue: usize, chain: &[Descriptor]) -> Result<(), Error> {
        let queue = &mut self.queues[queue];
        queue.stage_raw(TAG, chain)?;
        queue.publish()
    }

    /// Waits for what was put on a queue.
    ///
    /// # Errors
    /// When it doesn't come back.
    pub fn finish(&mut self, queue: usize) -> Result<(), Error> {
        self.queues[queue].wait(PATIENCE).map(|_| ())
    }

    /// Leaves statistics, tags and values, in the buffer through which the next are asked for.
    ///
    /// # Errors
    /// When the buffer is there already.
    pub fn say_stats(&mut self, queue: usize, stats: &[(u16, u64)]) -> Result<(), Error> {
        let entry = |(tag, value): &(u16, u64)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        let bytes: Vec<u8> = stats.iter().flat_map(entry).take(STATS_BYTES).collect();
        self.device.memory().write(self.stats, &bytes)?;
        let length = u32::try_from(bytes.len()).unwrap_or(0);
        self.put(queue, &[Descriptor { address: self.stats.0, bytes: length, flags: 0, next: 0 }])
    }

    /// Whether statistics were asked for: the buffer is back.
    ///
    /// # Errors
    /// When the ring makes no sense.
    pub fn are_stats_wanted(&mut self, queue: usize) -> Result<bool, Error> {
        Ok(self.queues[queue].poll()?.is_some())
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// When not connected.
    pub fn config(&mut self) -> Result<BalloonConfig, Error> {
        let read = self.device.frontend()?.get_config(0, 16, VhostUserConfigFlags::empty(), &[0; 16]);
        let (_, space) = read.map_err(Error::message("GET_CONFIG"))?;
        let field = |at: usize| {
            let bytes = space.get(at..).and_then(|rest| rest.first_chunk::<4>());
            bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
        };
        Ok(BalloonConfig { num_pages: field(0), actual: field(4), poison_val: field(12) })
    }

    /// Writes to the configuration space.
    ///
    /// # Errors
    /// When not connected.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Error> {
        let written = self.device.frontend()?.set_config(offset, VhostUserConfigFlags::WRITABLE, bytes);
        written.map_err(Error::message("SET_CONFIG"))
    }

    /// Says how large the balloon is.
    ///
    /// # Errors
    /// As [`Self::write_config`].
    pub fn say_actual(&mut self, pages: u32) -> Result<(), Error> {
        self.write_config(4, &pages.to_le_bytes())
    }

    /// Says what free pages are filled with.
    ///
    /// # Errors
    /// As [`Self::write_config`].
    pub fn say_poison(&mut self, value: u32) -> Result<(), Error> {
        self.write_config(12, &value.to_le_bytes())
    }

    /// How often the back end has said so far that the configuration space has changed. Waits until it says so once more,
    /// for that long.
    ///
    /// # Errors
    /// When there is no channel, or something else comes through it.
    pub fn changes(&mut self, wait: Duration) -> Result<u64, Error> {
        let channel = self.channel.as_mut().ok_or(Error::Usage("there is no channel"))?;
        let mut timeout_ms = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
        let mut events = [EpollEvent::default()];
        while channel.epoll.wait(timeout_ms, &mut events).map_err(failed)? > 0 {
            channel.handler.handle_request().map_err(|err| failed(io::Error::other(err)))?;
            timeout_ms = 0;
        }
        Ok(channel.changes.0.load(Ordering::Relaxed))
    }
}
