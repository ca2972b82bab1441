//! A VM's balloon, as one of its sessions is attached to it. Its rings run on the session's own thread, between two
//! messages, so that a ring has stopped when the message that stops it is answered.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};
use vhost_user_backend::VringT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Balloon;
use super::channel::Channel;
use super::config_space::{self, PAGE_POISON, QUEUES, has, role, says_actual};
use super::given::Given;
use super::numbers::Numbers;
use super::pages::memory_bytes;
use super::ring::Ring;
use super::state::{Guest, Waker};
use super::turn::{TURN_COST, Turn};
use crate::device::attached::{Attached, Startable};
use crate::device::doorbell;
use crate::device::memory_share::VmExtent;
use crate::device::ring::{Ending, GuestMemory};
use crate::device::session::Session;
use crate::device::signals::blame;
use crate::device::vm::DeviceVm;
use crate::store::state::StateId;

/// What an event is of, beside the numbers of rings.
const OF_CONNECTION: u64 = 1 << 32;
const OF_WAKER: u64 = 1 << 33;

/// A session's side of a VM's balloon.
pub struct Attachment {
    number: u64,
    balloon: Arc<Balloon>,
    connection: UnixStream,
    epoll: Epoll,
    waker: Waker,
    rings: Vec<Option<Ring>>,
    memory: Option<GuestMemory>,
    features: u64,
    replies: bool,
    channel: Option<Arc<Channel>>,
    /// Whether the guest was told to look since there is this channel.
    greeted: bool,
    poison_val: u32,
    given: Given,
    /// Whether these are the rings that run.
    claimed: bool,
    /// Whether the driver has begun from nothing. Its first ring says so, which has its turn before the others.
    is_new_driver: bool,
    batch: Vec<u32>,
}

impl Attachment {
    /// For the connection to a VMM.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn new(number: u64, balloon: Arc<Balloon>, connection: UnixStream) -> io::Result<Self> {
        let (epoll, waker) = (Epoll::new()?, Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?));
        for (fd, of) in [(connection.as_raw_fd(), OF_CONNECTION), (waker.as_raw_fd(), OF_WAKER)] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, of))?;
        }
        Ok(Self {
            number,
            balloon,
            connection,
            epoll,
            waker,
            rings: (0..QUEUES).map(|_| None).collect(),
            memory: None,
            features: 0,
            replies: false,
            channel: None,
            greeted: false,
            poison_val: 0,
            given: Given::default(),
            claimed: false,
            is_new_driver: false,
            batch: Vec::new(),
        })
    }

    /// Gives every ring a turn. Says whether any may have more to do.
    fn turn(&mut self) -> bool {
        if self.rings.iter().all(Option::is_none) || !self.claim() {
            return false;
        }
        let Some(memory) = self.memory.as_ref().map(GuestAddressSpace::memory) else { return false };
        let pages = self.balloon.vm.pages();
        let _working = pages.as_ref().map(|pages| blame::working(pages.table()));
        let mut busy = false;
        for ring in self.rings.iter_mut().flatten() {
            let wish = self.balloon.state.lock().guest_of(self.number).is_some_and(|guest| guest.wish);
            let mut turn = Turn {
                memory: &memory,
                vm: &self.balloon.vm,
                given: &mut self.given,
                poisoned: has(self.features, PAGE_POISON) && self.poison_val != 0,
                wish,
                stats: None,
                is_new_driver: self.is_new_driver,
                begins: false,
                numbers: Numbers::default(),
                cost_left: TURN_COST,
                batch: std::mem::take(&mut self.batch),
            };
            busy |= ring.turn(&mut turn);
            let asked = wish && !turn.wish;
            let (numbers, stats, begins) = (turn.numbers, turn.stats, turn.begins);
            (self.batch, self.is_new_driver) = (turn.batch, turn.is_new_driver);
            let mut state = self.balloon.state.lock();
            state.numbers = state.numbers.and(numbers);
            if begins {
                state.begin_driver();
                self.balloon.note(&state);
            }
            let Some(guest) = state.guest_of(self.number) else { continue };
            guest.given_pages = self.given.pages();
            if asked {
                (guest.wish, guest.asked) = (false, Some(Instant::now()));
            }
            guest.stats = stats.map(|stats| (stats, Instant::now())).or(guest.stats);
        }
        busy
    }

    fn claim(&mut self) -> bool {
        if !self.claimed {
            let guest = || Guest {
                session: self.number,
                waker: Arc::clone(&self.waker),
                channel: self.channel.clone(),
                features: self.features,
                configured_bytes: self.memory.as_ref().map_or(0, |memory| memory_bytes(&memory.memory())),
                given_pages: 0,
                stats: None,
                asked: None,
                wish: false,
            };
            self.claimed = self.balloon.state.lock().claim(guest, self.number, &self.waker);
        }
        self.claimed
    }

    /// Changes what is known of the guest, if its rings run.
    fn tell(&self, change: impl FnOnce(&mut Guest)) {
        if let Some(guest) = self.balloon.state.lock().guest_of(self.number) {
            change(guest);
        }
    }

    /// Waits until something can be done, or only looks if a ring has more to do. True when there is a message.
    fn wait(&self, busy: bool) -> io::Result<bool> {
        let mut events = [EpollEvent::default(); 8];
        let timeout_ms = if busy { 0 } else { -1 };
        let count = match self.epoll.wait(timeout_ms, &mut events) {
            Err(err) if err.kind() == io::ErrorKind::Interrupted => 0,
            waited => waited?,
        };
        let mut message = false;
        for event in events.iter().take(count) {
            match event.data() {
                OF_CONNECTION => message = true,
                OF_WAKER => drop(self.waker.read()),
                index => {
                    let ring = usize::try_from(index).ok().and_then(|index| self.rings.get(index));
                    let ring = ring.and_then(Option::as_ref);
                    ring.map_or(Ok(()), |ring| doorbell::take_kicks(&ring.vring().get_ref()))
                        .map_err(io::Error::other)?;
                }
            }
        }
        Ok(message)
    }

    /// Runs rings until a message comes that is not for us.
    fn run(&mut self) -> VhostResult<()> {
        loop {
            let mut busy = self.turn();
            self.greet();
            if !busy && self.claimed {
                // Each has to ask, whatever the others find.
                busy = self.rings.iter().flatten().filter(|ring| ring.listen()).count() > 0;
            }
            if !self.wait(busy).map_err(VhostError::ReqHandlerError)? {
                continue;
            }
            let channel =
                Channel::take(&self.connection, self.replies).map_err(VhostError::ReqHandlerError)?;
            let Some(channel) = channel.map(Arc::new) else { return Ok(()) };
            self.channel = Some(Arc::clone(&channel));
            self.tell(|guest| guest.channel = Some(Arc::clone(&channel)));
            self.greeted = false;
        }
    }

    /// Has the guest look, once there is a way to say so and its rings run, whichever comes first: it may have been told in
    /// vain, while its VMM had no back end. One for whose balloon nobody has said a size yet is not told, because it would
    /// take back what we don't know of.
    fn greet(&mut self) {
        if let Some(channel) = self.channel.as_ref().filter(|_| self.claimed && !self.greeted) {
            if self.balloon.state.lock().target_pages.is_some() {
                let _ = channel.config_changed();
            }
            self.greeted = true;
        }
    }

    fn ring_slot(&mut self, index: u32) -> VhostResult<&mut Option<Ring>> {
        let slot = usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index));
        slot.ok_or(VhostError::InvalidParam)
    }
}

fn kick_fd(ring: &Startable) -> Option<RawFd> {
    ring.vring.get_ref().get_kick().as_ref().map(AsRawFd::as_raw_fd)
}

impl Attached for Attachment {
    /// The kick's descriptor.
    type Seat = RawFd;

    const NAME: &'static str = "balloon";

    const QUEUES_ADVICE: &'static str =
        "a balloon has inflateq, deflateq, statsq and reporting_vq, and a place for free_page_vq";

    fn vm(&self) -> &Arc<DeviceVm> {
        &self.balloon.vm
    }

    fn mapped(&self) -> &VmExtent {
        &self.balloon.mapped
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn features(&self) -> u64 {
        config_space::features()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::BACKEND_REQ
    }

    fn stamp(&self) -> Option<StateId> {
        None
    }

    fn read_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.balloon.state.lock().fields(self.poison_val).read(offset, size)
    }

    fn write_config(&mut self, offset: u32, bytes: &[u8]) -> VhostResult<()> {
        let mut state = self.balloon.state.lock();
        let fields = state.fields(self.poison_val).written(offset, bytes);
        self.poison_val = fields.poison_val;
        if state.guest_of(self.number).is_some() && says_actual(offset, bytes.len()) {
            state.actual_pages = Some(fields.actual);
            self.balloon.note(&state);
        }
        Ok(())
    }

    fn agree(&mut self, features: u64) {
        self.features = features;
        self.tell(|guest| guest.features = features);
    }

    fn agree_protocol(&mut self, features: VhostUserProtocolFeatures) {
        self.replies = features.contains(VhostUserProtocolFeatures::REPLY_ACK);
    }

    fn start(&mut self, ring: Startable) -> VhostResult<RawFd> {
        let kick = kick_fd(&ring).ok_or(VhostError::InvalidParam)?;
        let event = EpollEvent::new(EventSet::IN, u64::from(ring.index));
        self.epoll.ctl(ControlOperation::Add, kick, event).map_err(VhostError::ReqHandlerError)?;
        let role = role(ring.index, self.features);
        *self.ring_slot(ring.index.into())? = Some(Ring::new(ring.vring, role));
        Ok(kick)
    }

    fn stop(&mut self, index: u32, kick: RawFd, _ending: Ending) -> VhostResult<()> {
        if let Some(ring) = self.ring_slot(index)?.take() {
            ring.stop();
        }
        let removed = self.epoll.ctl(ControlOperation::Delete, kick, EpollEvent::default());
        removed.map_err(VhostError::ReqHandlerError)
    }

    fn release(&mut self) {
        self.claimed = false;
        let woken = self.balloon.state.lock().release(self.number, &self.waker);
        for waker in woken {
            let _ = waker.write(1);
        }
    }

    /// No page of it is given up any more, and nothing is known of what its driver wants.
    fn reset(&mut self) {
        self.given.clear();
        self.poison_val = 0;
    }

    fn remember_memory(&mut self, memory: &GuestMemory) {
        self.memory = Some(memory.clone());
        let configured_bytes = memory_bytes(&memory.memory());
        self.tell(|guest| guest.configured_bytes = configured_bytes);
    }

    /// Nobody but this thread looks.
    fn pass_turns(&self) -> VhostResult<()> {
        Ok(())
    }

    fn until_message(session: &Mutex<Session<Self>>) -> VhostResult<()> {
        // Nobody else ever wants the lock while messages come.
        session.lock().map_err(|_| VhostError::BackendInternalError)?.device().run()
    }
}
