//! One virtqueue with up to `depth` requests in flight, each known by its tag. A tag owns fixed descriptors,
//! a header, a status byte and a data buffer, all laid out once, so that a request costs a header, an entry
//! in the available ring and nothing else: no allocation, no search. A queue belongs to one thread at a
//! time and needs nothing of the [`super::Device`], which may reconnect meanwhile.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vm_memory::GuestAddress;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::Error;
use super::areas::Areas;
use super::memory::Memory;
use super::negotiation::Options;
use super::request::{Op, Range, Status};
use super::ring::{Descriptor, Ring};

/// How many turns of polling pass between two looks at the clock.
const SPINS_PER_CLOCK: u32 = 64;

/// How [`Queue::wait`] waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wait {
    /// Spin on the used ring, with notifications suppressed.
    #[default]
    Poll,
    /// Ask for a notification and sleep on the call event descriptor.
    Sleep,
}

/// A request that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Whose it was.
    pub tag: u16,
    /// The device's answer.
    pub status: Status,
    /// Bytes that the device says it wrote, the status byte included.
    pub used_bytes: u32,
    /// From the publishing of its batch until it was seen to be back.
    pub latency: Duration,
}

/// What a tag is doing.
#[derive(Clone, Copy, Debug)]
struct Tag {
    in_flight: bool,
    published: Instant,
    /// Data length and direction that the tag's descriptors describe; `None` after anything unusual.
    shape: Option<(u32, bool)>,
}

/// One virtqueue, driver's side.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    tags: Vec<Tag>,
    staged: Vec<u16>,
    in_flight: u16,
    areas: Areas,
    kick: EventFd,
    call: EventFd,
    call_epoll: Epoll,
    wait: Wait,
    kicks: u64,
}

impl Queue {
    pub(crate) fn new(
        memory: &Memory,
        options: &Options,
        event_idx: bool,
        kick: EventFd,
        call: EventFd,
    ) -> Result<Self, Error> {
        let areas = Areas::new(memory, options)?;
        let tags = usize::from(options.depth);
        let event = |source| Error::Descriptor { action: "wait for an event descriptor", source };
        let call_epoll = Epoll::new().map_err(event)?;
        call_epoll
            .ctl(ControlOperation::Add, call.as_raw_fd(), EpollEvent::new(EventSet::IN, 0))
            .map_err(event)?;
        Ok(Self {
            ring: Ring::new(memory, options.queue_size, event_idx)?,
            tags: vec![Tag { in_flight: false, published: Instant::now(), shape: None }; tags],
            staged: Vec::with_capacity(tags),
            in_flight: 0,
            areas,
            kick,
            call,
            call_epoll,
            wait: Wait::Poll,
            kicks: 0,
        })
    }

    /// How many requests can be in flight; tags go from 0 to one less.
    #[must_use]
    pub fn depth(&self) -> u16 {
        u16::try_from(self.tags.len()).unwrap_or(u16::MAX)
    }

    /// How many requests are in flight, staged ones included.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Bytes of each tag's data buffer.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.areas.data_bytes
    }

    /// How often the back end was kicked.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Chooses how to wait. Polling is the default.
    pub fn set_wait(&mut self, wait: Wait) {
        self.wait = wait;
        self.ring.suppress_notifications();
    }

    /// The ring itself, for chains that no driver would build. Chains that are pushed here are taken with
    /// [`Ring::take_used`]; [`Self::poll`] would call their heads unknown.
    pub fn ring(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// Index of a tag's `n`th descriptor in the ring; its first is the head of its chains.
    #[must_use]
    pub fn descriptor_index(&self, tag: u16, n: u16) -> u16 {
        self.areas.descriptor_index(tag, n)
    }

    /// Guest address of a tag's header: 16 bytes.
    #[must_use]
    pub fn header_address(&self, tag: u16) -> GuestAddress {
        self.areas.header_address(tag)
    }

    /// Guest address of a tag's status byte.
    #[must_use]
    pub fn status_address(&self, tag: u16) -> GuestAddress {
        self.areas.status_address(tag)
    }

    /// Guest address of a tag's data buffer.
    #[must_use]
    pub fn data_address(&self, tag: u16) -> GuestAddress {
        self.areas.data_address(tag)
    }

    /// Guest address of a tag's indirect table, if tags have any.
    #[must_use]
    pub fn table_address(&self, tag: u16) -> Option<GuestAddress> {
        self.areas.table_address(tag).map(GuestAddress)
    }

    /// Copies into a tag's data buffer, `offset` bytes from its start.
    ///
    /// # Errors
    /// When it doesn't fit.
    #[inline]
    pub fn write_data(&self, tag: u16, offset: usize, bytes: &[u8]) -> Result<(), Error> {
        self.areas.data_slice(tag, offset, bytes.len())?.copy_from(bytes);
        Ok(())
    }

    /// Copies out of a tag's data buffer, from `offset` bytes after its start.
    ///
    /// # Errors
    /// When there is not so much.
    #[inline]
    pub fn read_data(&self, tag: u16, offset: usize, bytes: &mut [u8]) -> Result<(), Error> {
        self.areas.data_slice(tag, offset, bytes.len())?.copy_to(bytes);
        Ok(())
    }

    /// Puts the ranges of a discard or write-zeroes into a tag's data buffer.
    ///
    /// # Errors
    /// When they don't fit.
    pub fn write_ranges(&self, tag: u16, ranges: &[Range]) -> Result<(), Error> {
        for (n, range) in ranges.iter().enumerate() {
            self.write_data(tag, n * 16, &range.to_bytes())?;
        }
        Ok(())
    }

    /// Prepares a request with its data in the tag's own buffer. It goes out with the next
    /// [`Self::publish`].
    ///
    /// # Errors
    /// When the tag doesn't exist, is in flight, or its buffer is too small.
    #[inline]
    pub fn stage(&mut self, tag: u16, op: Op) -> Result<(), Error> {
        self.check_free(tag)?;
        let shape = (op.bytes(), op.device_writes());
        if self.tags[usize::from(tag)].shape != Some(shape) {
            // Only looked up for its bounds: the device must not be sent beyond the buffer by mistake.
            self.areas.data_slice(tag, 0, usize::try_from(shape.0).unwrap_or(usize::MAX))?;
            let buffer = [(self.data_address(tag), shape.0)];
            self.areas.lay_out(&mut self.ring, tag, if shape.0 == 0 { &[] } else { &buffer }, shape.1)?;
            self.tags[usize::from(tag)].shape = Some(shape);
        }
        self.areas.write_frame(tag, op);
        self.push(tag);
        Ok(())
    }

    /// Prepares a request whose data lies in the given buffers: guest address and length of each. The
    /// tag's own data buffer is not used.
    ///
    /// # Errors
    /// When the tag doesn't exist, is in flight, or has fewer descriptors than this takes.
    pub fn stage_buffers(&mut self, tag: u16, op: Op, buffers: &[(GuestAddress, u32)]) -> Result<(), Error> {
        self.check_free(tag)?;
        self.tags[usize::from(tag)].shape = None;
        self.areas.lay_out(&mut self.ring, tag, buffers, op.device_writes())?;
        self.areas.write_frame(tag, op);
        self.push(tag);
        Ok(())
    }

    /// Prepares a chain of exactly these descriptors, placed one after another from
    /// [`Self::descriptor_index`]`(tag, 0)` on, whatever their flags and `next` say. The header is whatever
    /// is in memory: see [`Self::write_header`].
    ///
    /// # Errors
    /// When the tag doesn't exist, is in flight, or has fewer descriptors than that.
    pub fn stage_raw(&mut self, tag: u16, descriptors: &[Descriptor]) -> Result<(), Error> {
        self.check_free(tag)?;
        if descriptors.len() > usize::from(self.areas.descriptors_per_tag()) {
            return Err(Error::Usage("the chain has more descriptors than its tag"));
        }
        self.tags[usize::from(tag)].shape = None;
        for (index, descriptor) in (self.descriptor_index(tag, 0)..).zip(descriptors) {
            self.ring.write_descriptor(index, *descriptor);
        }
        self.push(tag);
        Ok(())
    }

    /// Writes a request's header into the tag's frame and clears its status byte. Staging does this; raw
    /// chains may want it, too.
    pub fn write_header(&self, tag: u16, op: Op) {
        self.areas.write_frame(tag, op);
    }

    /// The tag's status byte, as it stands now.
    #[must_use]
    pub fn status(&self, tag: u16) -> Status {
        self.areas.status(tag)
    }

    /// Sends what was staged, with at most one kick, and only if the back end asks for one.
    ///
    /// # Errors
    /// When the kick can't be written.
    #[inline]
    pub fn publish(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        for tag in self.staged.drain(..) {
            self.tags[usize::from(tag)].published = now;
        }
        if self.ring.publish() { self.kick() } else { Ok(()) }
    }

    /// Kicks the back end without being asked, as after a reconnect.
    ///
    /// # Errors
    /// When the kick can't be written.
    pub fn kick(&mut self) -> Result<(), Error> {
        self.kicks += 1;
        self.kick.write(1).map_err(|source| Error::Descriptor { action: "write an event descriptor", source })
    }

    /// The eventfd for calls: for who wants to misuse it.
    #[must_use]
    pub fn call_event(&self) -> RawFd {
        self.call.as_raw_fd()
    }

    /// The next request that is back, if there is one.
    ///
    /// # Errors
    /// When the back end's used ring makes no sense.
    #[inline]
    pub fn poll(&mut self) -> Result<Option<Completion>, Error> {
        let Some(used) = self.ring.take_used()? else { return Ok(None) };
        let unknown = || Error::UnknownHead { head: used.head };
        let index = self.areas.tag_of(used.head).ok_or_else(unknown)?;
        let tag = &mut self.tags[usize::from(index)];
        if !tag.in_flight {
            return Err(unknown());
        }
        tag.in_flight = false;
        self.in_flight -= 1;
        let latency = tag.published.elapsed();
        let status = self.areas.status(index);
        Ok(Some(Completion { tag: index, status, used_bytes: used.bytes, latency }))
    }

    /// The next request that is back, waited for as [`Self::set_wait`] says.
    ///
    /// # Errors
    /// When nothing came back in time, or the used ring makes no sense.
    pub fn wait(&mut self, timeout: Duration) -> Result<Completion, Error> {
        match self.wait {
            Wait::Poll => self.wait_polling(timeout),
            Wait::Sleep => self.wait_sleeping(timeout),
        }
    }

    fn wait_polling(&mut self, timeout: Duration) -> Result<Completion, Error> {
        let mut start = None;
        loop {
            for _ in 0..SPINS_PER_CLOCK {
                if let Some(completion) = self.poll()? {
                    return Ok(completion);
                }
                std::hint::spin_loop();
            }
            if start.get_or_insert_with(Instant::now).elapsed() > timeout {
                return Err(Error::Timeout(timeout));
            }
        }
    }

    fn wait_sleeping(&mut self, timeout: Duration) -> Result<Completion, Error> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(completion) = self.poll()? {
                return Ok(completion);
            }
            if self.ring.request_notification()? {
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Timeout(timeout));
            }
            // Rounded up: a wait of 0 ms would spin through the last millisecond.
            let left_ms = i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX);
            let mut events = [EpollEvent::default()];
            match self.call_epoll.wait(left_ms, &mut events) {
                // The counter only wakes us; what it says is in the used ring.
                Ok(1..) => drop(self.call.read()),
                Ok(0) => {}
                Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(Error::Descriptor { action: "wait for an event descriptor", source });
                }
            }
        }
    }

    /// A tag that is not in flight.
    #[must_use]
    pub fn free_tag(&self) -> Option<u16> {
        self.tags.iter().position(|tag| !tag.in_flight).and_then(|tag| u16::try_from(tag).ok())
    }

    #[inline]
    fn check_free(&self, tag: u16) -> Result<(), Error> {
        match self.tags.get(usize::from(tag)) {
            Some(tag) if !tag.in_flight => Ok(()),
            Some(_) => Err(Error::Usage("the tag is in flight")),
            None => Err(Error::Usage("the queue has no such tag")),
        }
    }

    #[inline]
    fn push(&mut self, tag: u16) {
        self.tags[usize::from(tag)].in_flight = true;
        self.in_flight += 1;
        self.staged.push(tag);
        self.ring.push(self.descriptor_index(tag, 0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vhost::vhost_user::message::VhostUserProtocolFeatures;
    use virtio_queue::{Queue as DeviceQueue, QueueT};
    use vm_memory::{Bytes, GuestMemoryMmap};

    /// A queue and, on the other side, rust-vmm's own view of the same ring.
    fn queue(options: &Options) -> (Queue, DeviceQueue, GuestMemoryMmap) {
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let fd = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let queue = Queue::new(&memory, options, true, fd(), fd()).unwrap();
        let size = options.queue_size;
        let mut device = DeviceQueue::new(size).unwrap();
        let place = queue.ring.place().guest_addresses();
        device.set_size(size);
        device.try_set_desc_table_address(place.0).unwrap();
        device.try_set_avail_ring_address(place.1).unwrap();
        device.try_set_used_ring_address(place.2).unwrap();
        device.set_event_idx(true);
        device.set_ready(true);
        (queue, device, memory.map())
    }

    fn options(indirect_entries: u16) -> Options {
        let protocol_features = VhostUserProtocolFeatures::empty();
        Options { indirect_entries, protocol_features, data_bytes: 8192, depth: 8, ..Options::default() }
    }

    #[test]
    fn a_device_sees_header_data_and_status_direct_and_indirect() {
        for indirect_entries in [0, 16] {
            let (mut queue, mut device, memory) = queue(&options(indirect_entries));
            queue.stage(5, Op::Read { sector: 24, bytes: 4096 }).unwrap();
            queue.publish().unwrap();
            let chain = device.pop_descriptor_chain(&memory).unwrap();
            let head = chain.head_index();
            assert_eq!(
                chain.map(|d| (d.len(), d.is_write_only())).collect::<Vec<_>>(),
                [(16, false), (4096, true), (1, true)]
            );
            memory.write_obj(0u8, queue.status_address(5)).unwrap();
            device.add_used(&memory, head, 4097).unwrap();
            let done = queue.poll().unwrap().unwrap();
            assert_eq!((done.tag, done.status, done.used_bytes), (5, Status::Ok, 4097));
            assert_eq!((queue.poll().unwrap(), queue.in_flight()), (None, 0));
        }
    }

    #[test]
    fn a_flush_has_no_data_and_buffers_are_taken_as_given() {
        let (mut queue, mut device, memory) = queue(&options(0));
        queue.stage(0, Op::Flush).unwrap();
        let at = queue.data_address(7);
        queue.stage_buffers(1, Op::Write { sector: 0, bytes: 0 }, &[(at, 100), (at, 412)]).unwrap();
        queue.publish().unwrap();
        let mut lengths = || {
            let chain = device.pop_descriptor_chain(&memory).unwrap();
            chain.map(|d| d.len()).collect::<Vec<_>>()
        };
        assert_eq!(lengths(), [16, 1]);
        assert_eq!(lengths(), [16, 100, 412, 1]);
    }

    #[test]
    fn one_batch_is_one_kick_and_a_silent_device_gets_none() {
        let (mut queue, mut device, memory) = queue(&options(0));
        for round in 0..2 {
            for tag in 0..4 {
                queue.stage(round * 4 + tag, Op::Flush).unwrap();
            }
            queue.publish().unwrap();
        }
        assert_eq!(queue.kicks(), 1);
        while device.pop_descriptor_chain(&memory).is_some() {}
        assert!(!device.enable_notification(&memory).unwrap());
        for _ in 0..8 {
            assert!(matches!(queue.stage(1, Op::Flush), Err(Error::Usage(_))));
        }
    }

    #[test]
    fn what_was_not_in_flight_is_an_error() {
        let (mut queue, mut device, memory) = queue(&options(0));
        queue.stage(0, Op::Flush).unwrap();
        queue.publish().unwrap();
        device.add_used(&memory, 17, 0).unwrap();
        assert!(matches!(queue.poll(), Err(Error::UnknownHead { head: 17 })));
    }

    #[test]
    fn requests_that_do_not_fit_are_refused() {
        let (mut queue, ..) = queue(&options(0));
        assert!(queue.stage(8, Op::Flush).is_err());
        assert!(queue.stage(0, Op::Read { sector: 0, bytes: 8193 }).is_err());
        let at = queue.data_address(0);
        assert!(queue.stage_buffers(0, Op::Flush, &[(at, 1); 15]).is_err());
        assert!(queue.stage_raw(0, &[Descriptor::default(); 17]).is_err());
        assert_eq!(queue.in_flight(), 0);
    }

    #[test]
    fn both_ways_of_waiting_give_up_in_time() {
        let (mut queue, ..) = queue(&options(0));
        for wait in [Wait::Poll, Wait::Sleep] {
            queue.set_wait(wait);
            assert!(matches!(queue.wait(Duration::from_millis(2)), Err(Error::Timeout(_))));
        }
    }
}
