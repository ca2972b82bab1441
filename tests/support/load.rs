//! A VM under load that knows what its disk must hold, whatever becomes of the daemon meanwhile: every page that it
//! reads is compared with what was last answered. A store that failed may or may not have been done.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ballast::frontend::{Device, Manners, Memory, Op, Options, Queue, Range, Status};
use ballast::page::{Page, ZERO_PAGE};

use super::page_of;

/// Slots that are used, from 1 on: slot 0 has the swap header.
pub const SLOTS: u64 = 6000;
/// How long a daemon may take to answer.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long one attempt to attach again may take, so that a load whose daemon is gone finds out when it is to end.
const ATTEMPT: Duration = Duration::from_millis(50);

/// One VM under load.
pub struct Load {
    pub device: Device,
    queues: Vec<Queue>,
    /// What each slot may hold; zeros where nothing is said.
    held: HashMap<u64, Vec<Page>>,
    asked: HashMap<(usize, u16), Asked>,
    noise: u64,
    /// Pages that were compared.
    pub checked: u64,
    /// Stores that failed.
    pub failed_stores: u64,
}

/// What was asked for and not answered yet.
enum Asked {
    Store(u64, Box<Page>),
    Load(u64),
    Discard(u64),
}

impl Asked {
    fn slot(&self) -> u64 {
        match self {
            Self::Store(slot, _) | Self::Load(slot) | Self::Discard(slot) => *slot,
        }
    }
}

impl Load {
    /// Attaches to an empty VM.
    pub fn attach(socket: PathBuf, manners: Manners) -> Self {
        let options = Options {
            manners,
            queues: 2,
            queue_size: 256,
            depth: 64,
            data_bytes: 8192,
            ..Options::default()
        };
        let memory = Memory::with_bytes(16 << 20).expect("memory for a guest");
        let mut device = Device::connect(socket, memory, options).expect("a daemon listens");
        let queues = device.start().expect("the rings start");
        let (held, asked) = (HashMap::new(), HashMap::new());
        Self { device, queues, held, asked, noise: 7, checked: 0, failed_stores: 0 }
    }

    /// Pages that are stored, or `None` while that isn't known for all.
    pub fn stored_pages(&self) -> Option<usize> {
        let known = self.asked.is_empty() && self.held.values().all(|pages| pages.len() == 1);
        known.then_some(self.held.len())
    }

    /// Whether everything that was asked for is answered.
    pub fn is_settled(&self) -> bool {
        self.asked.is_empty()
    }

    fn random(&mut self) -> u64 {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        self.noise
    }

    /// Asks for something on so many free tags, if there are. A slot has one request at a time, so that its content is
    /// known.
    fn ask(&mut self, n: usize, count: usize) {
        for _ in 0..count {
            let Some(tag) = self.queues[n].free_tag() else { break };
            let slot = 1 + self.random() % (SLOTS - 1);
            if self.asked.values().any(|asked| asked.slot() == slot) {
                break;
            }
            let asked = match self.noise >> 32 & 7 {
                0..=4 => {
                    let kind = u8::try_from(self.noise >> 40 & 0xff).expect("a byte");
                    // One of four is the same as others of this load.
                    let seed = if self.noise >> 48 & 3 == 0 { self.noise >> 50 & 31 | 1 } else { self.noise };
                    Asked::Store(slot, Box::new(page_of(kind, seed)))
                }
                5 | 6 => Asked::Load(slot),
                _ => Asked::Discard(slot),
            };
            self.stage(n, tag, asked);
        }
        self.publish(n);
    }

    fn publish(&mut self, n: usize) {
        self.queues[n].publish().expect("the ring has room");
        self.queues[n].kick().expect("the eventfd is ours");
    }

    fn stage(&mut self, n: usize, tag: u16, asked: Asked) {
        let queue = &mut self.queues[n];
        let sector = asked.slot() * 8;
        let op = match &asked {
            Asked::Store(_, page) => {
                queue.write_data(tag, 0, &page[..]).expect("the buffer holds a page");
                Op::Write { sector, bytes: 4096 }
            }
            Asked::Load(_) => Op::Read { sector, bytes: 4096 },
            Asked::Discard(_) => {
                let range = Range { sector, sectors: 8, flags: 0 };
                queue.write_ranges(tag, &[range]).expect("the buffer holds a range");
                Op::Discard { ranges: 1 }
            }
        };
        queue.stage(tag, op).expect("the tag is free");
        self.asked.insert((n, tag), asked);
    }

    fn answered(&mut self, n: usize, tag: u16, status: Status) {
        match (self.asked.remove(&(n, tag)).expect("answered once"), status) {
            (Asked::Store(slot, page), Status::Ok) => drop(self.held.insert(slot, vec![*page])),
            (Asked::Store(slot, page), Status::IoError) => {
                self.failed_stores += 1;
                self.held.entry(slot).or_insert_with(|| vec![ZERO_PAGE]).push(*page);
            }
            (Asked::Discard(slot), Status::Ok) => drop(self.held.remove(&slot)),
            (Asked::Load(slot), Status::Ok) => {
                let mut found = ZERO_PAGE;
                self.queues[n].read_data(tag, 0, &mut found).expect("the buffer holds a page");
                self.compare(slot, found);
            }
            (asked, status) => panic!("slot {}: {status:?}", asked.slot()),
        }
    }

    fn compare(&mut self, slot: u64, found: Page) {
        let right = self.held.get(&slot).map_or(found == ZERO_PAGE, |pages| pages.contains(&found));
        assert!(right, "slot {slot} holds what nobody has written last");
        self.checked += 1;
        // Zeros that a failed store may have left are an empty slot: no store of this load has any.
        if found == ZERO_PAGE {
            self.held.remove(&slot);
        } else {
            self.held.insert(slot, vec![found]);
        }
    }

    fn poll(&mut self, n: usize) -> bool {
        let mut any = false;
        while let Some(done) = self.queues[n].poll().expect("the used ring makes sense") {
            self.answered(n, done.tag, done.status);
            any = true;
        }
        any
    }

    /// Works until `ended`, attaching again whenever the daemon went away and another came.
    pub fn work_until(&mut self, ended: &AtomicBool) {
        while !ended.load(Ordering::Acquire) {
            if !self.device.is_connected() {
                self.attach_again();
                continue;
            }
            let mut any = false;
            for n in 0..self.queues.len() {
                self.ask(n, usize::MAX);
                any |= self.poll(n);
            }
            if !any {
                std::thread::yield_now();
            }
        }
    }

    /// Asks for so many things at once and waits for the answers, as long as `alive` says so.
    pub fn ask_together(&mut self, count: usize, mut alive: impl FnMut() -> bool) {
        self.attach_again();
        self.ask(0, count);
        while alive() && !self.is_settled() {
            self.poll(0);
        }
    }

    fn attach_again(&mut self) {
        if let Err(err) = self.device.reconnect(ATTEMPT) {
            assert!(!self.device.is_connected(), "a daemon that lives refuses: {err}");
        }
    }

    /// Attaches again if need be, and waits until everything is answered.
    pub fn settle(&mut self) {
        if !self.device.is_connected() {
            self.device.reconnect(PATIENCE).expect("a daemon listens");
        }
        for n in 0..self.queues.len() {
            while self.queues[n].in_flight() > 0 {
                let done =
                    self.queues[n].wait(PATIENCE).expect("what was in flight is answered after a restart");
                self.answered(n, done.tag, done.status);
            }
        }
    }

    /// Compares every page. Everything is settled.
    pub fn check_everything(&mut self) {
        let mut slots = 1..SLOTS;
        loop {
            while let Some(tag) = self.queues[0].free_tag() {
                let Some(slot) = slots.next() else { break };
                self.stage(0, tag, Asked::Load(slot));
            }
            if self.queues[0].in_flight() == 0 && self.asked.is_empty() {
                return;
            }
            self.publish(0);
            let done = self.queues[0].wait(PATIENCE).expect("loads are answered");
            self.answered(0, done.tag, done.status);
        }
    }
}
