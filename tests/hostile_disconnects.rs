//! A front end that hangs up: after every message of a whole conversation, and in the middle of every message's header
//! and body, with its descriptors handed over or not. The next front end finds the VM free, and nothing of the one
//! before is left: no thread, no descriptor, no mapping. Alone in its file, because it counts those of the process.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;
#[path = "support/wire.rs"]
mod wire;

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use support::{Host, page_of};
use wire::{FLAGS, HEADER_BYTES, PROTOCOL, PROTOCOL_FEATURES, half_words, message, words};

const MEMORY_BYTES: u64 = 1 << 20;
const MEMORY_NAME: &str = "hangs-up";
/// Where the front end says that it has the guest's memory.
const VMM: u64 = 0x7f00_0000_0000;
/// Where the ring's parts, a request's header and status, and its page are in that memory.
const TABLE: u64 = 0;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
const HEADER: u64 = 0x3000;
const STATUS: u64 = 0x3100;
const PAGE: u64 = 0x4000;
const PATIENCE: Duration = Duration::from_secs(30);

/// What a front end does next.
enum Step {
    /// Says something; the answer has so many bytes.
    Say { name: &'static str, bytes: Vec<u8>, fds: Vec<OwnedFd>, answer: usize },
    /// Hands back the in-flight region that was given.
    GiveInflight,
    /// Has the ring store or load a page, and waits for it or not.
    Request { kind: u32, sector: u64, waits: bool },
}

/// Where a front end hangs up.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Cut {
    HalfHeader,
    Header,
    HalfBody,
    /// The whole message was sent, and nobody waits for its answer.
    Unanswered,
    Answered,
}

struct FrontEnd {
    stream: UnixStream,
    memory: File,
    kick: OwnedFd,
    /// The region that the session gave, and where it is in its file.
    inflight: Option<(OwnedFd, Vec<u8>)>,
    available_index: u16,
}

/// Bytes of an answer that is a word: of a header and a `u64`.
const WORD: usize = HEADER_BYTES + 8;

fn conversation(front_end: &FrontEnd) -> Vec<Step> {
    let say = |name, request, payload: &[u8], fds: Vec<OwnedFd>| Step::Say {
        name,
        bytes: message(request, FLAGS, payload),
        fds,
        answer: WORD,
    };
    let ask = |name, request, payload: &[u8], answer| Step::Say {
        name,
        bytes: message(request, 1, payload),
        fds: Vec::new(),
        answer: HEADER_BYTES + answer,
    };
    // Not answered until REPLY_ACK was agreed upon.
    let tell = |name, request, payload: &[u8]| Step::Say {
        name,
        bytes: message(request, 1, payload),
        fds: Vec::new(),
        answer: 0,
    };
    let memory = || front_end.memory.try_clone().unwrap().into();
    let kick = || front_end.kick.try_clone().unwrap();
    let event = || eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let table = wire::region(0, MEMORY_BYTES, VMM, 0);
    let ring = wire::addresses(0, VMM + TABLE, VMM + USED, VMM + AVAILABLE);
    let start = || {
        vec![
            say("SET_VRING_NUM", wire::SET_VRING_NUM, &half_words(&[0, 16]), vec![]),
            say("SET_VRING_BASE", wire::SET_VRING_BASE, &half_words(&[0, 0]), vec![]),
            say("SET_VRING_ADDR", wire::SET_VRING_ADDR, &ring, vec![]),
            say("SET_VRING_KICK", wire::SET_VRING_KICK, &words(&[0]), vec![kick()]),
            say("SET_VRING_CALL", wire::SET_VRING_CALL, &words(&[0]), vec![event()]),
            say("SET_VRING_ERR", wire::SET_VRING_ERR, &words(&[0]), vec![event()]),
            say("SET_VRING_ENABLE", wire::SET_VRING_ENABLE, &half_words(&[0, 1]), vec![]),
        ]
    };
    let mut steps = vec![
        tell("SET_OWNER", wire::SET_OWNER, &[]),
        ask("GET_FEATURES", wire::GET_FEATURES, &[], 8),
        tell("SET_FEATURES", wire::SET_FEATURES, &words(&[PROTOCOL_FEATURES | 1 << 32])),
        ask("GET_PROTOCOL_FEATURES", wire::GET_PROTOCOL_FEATURES, &[], 8),
        tell("SET_PROTOCOL_FEATURES", wire::SET_PROTOCOL_FEATURES, &words(&[PROTOCOL])),
        ask("GET_QUEUE_NUM", wire::GET_QUEUE_NUM, &[], 8),
        ask("GET_CONFIG", wire::GET_CONFIG, &[half_words(&[0, 60, 0]), vec![0; 60]].concat(), 72),
        ask("GET_INFLIGHT_FD", wire::GET_INFLIGHT_FD, &wire::inflight(0, 1, 16), 24),
        Step::GiveInflight,
        say("SET_MEM_TABLE", wire::SET_MEM_TABLE, &table, vec![memory()]),
    ];
    steps.extend(start());
    steps.extend([
        Step::Request { kind: 1, sector: 64, waits: true },
        Step::Request { kind: 0, sector: 64, waits: true },
        // Its answer finds nobody.
        Step::Request { kind: 1, sector: 72, waits: false },
        say("SET_VRING_ENABLE off", wire::SET_VRING_ENABLE, &half_words(&[0, 0]), vec![]),
        say("SET_VRING_ENABLE on", wire::SET_VRING_ENABLE, &half_words(&[0, 1]), vec![]),
        Step::Request { kind: 0, sector: 72, waits: true },
        ask("GET_VRING_BASE", wire::GET_VRING_BASE, &half_words(&[0, 0]), 8),
        say("SET_MEM_TABLE again", wire::SET_MEM_TABLE, &table, vec![memory()]),
        say("SET_VRING_KICK again", wire::SET_VRING_KICK, &words(&[0]), vec![kick()]),
        Step::Request { kind: 0, sector: 64, waits: true },
        say("REM_MEM_REG", wire::REM_MEM_REG, &table, vec![]),
        say("ADD_MEM_REG", wire::ADD_MEM_REG, &table, vec![memory()]),
        ask("GET_VRING_BASE again", wire::GET_VRING_BASE, &half_words(&[0, 0]), 8),
        say("RESET_DEVICE", wire::RESET_DEVICE, &[], vec![]),
    ]);
    steps
}

impl FrontEnd {
    fn connect(host: &Host) -> Self {
        let stream = UnixStream::connect(host.socket("web1")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let memory = File::from(memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC).unwrap());
        memory.set_len(MEMORY_BYTES).unwrap();
        let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        Self { stream, memory, kick, inflight: None, available_index: 0 }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn half_word(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// Takes the step, or as much of it as `cut` says. True when it may go on.
    fn take(&mut self, step: &Step, cut: Option<Cut>) -> bool {
        match step {
            Step::Say { name, bytes, fds, answer } => {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                self.say(name, bytes, &fds, *answer, cut);
            }
            Step::GiveInflight => {
                let (fd, place) = self.inflight.take().expect("a region was given");
                let bytes = message(wire::SET_INFLIGHT_FD, FLAGS, &place);
                self.say("SET_INFLIGHT_FD", &bytes, &[fd.as_fd()], WORD, cut);
            }
            Step::Request { kind, sector, waits } => {
                self.request(*kind, *sector, *waits && cut != Some(Cut::Unanswered));
            }
        }
        cut.is_none()
    }

    fn say(&mut self, name: &str, bytes: &[u8], fds: &[BorrowedFd<'_>], answer: usize, cut: Option<Cut>) {
        let body = bytes.len() - HEADER_BYTES;
        let sent = match cut {
            Some(Cut::HalfHeader) => HEADER_BYTES / 2,
            Some(Cut::Header) => HEADER_BYTES,
            Some(Cut::HalfBody) => HEADER_BYTES + body / 2,
            Some(Cut::Unanswered | Cut::Answered) | None => bytes.len(),
        };
        assert!(wire::send(&self.stream, &bytes[..sent], fds), "{name}: the session is gone");
        if matches!(cut, None | Some(Cut::Answered)) && answer > 0 {
            let (answered, fd) =
                wire::receive(&self.stream, answer).unwrap_or_else(|err| panic!("{name}: {err}"));
            let acknowledged =
                answer != WORD || bytes[4..8] != FLAGS.to_le_bytes() || answered[12..] == [0; 8];
            assert!(acknowledged, "{name} was refused");
            self.inflight = fd.map(|fd| (fd, answered[HEADER_BYTES..].to_vec())).or(self.inflight.take());
        }
    }

    fn request(&mut self, kind: u32, sector: u64, waits: bool) {
        let mut header = half_words(&[kind, 0]);
        header.extend(words(&[sector]));
        self.write(HEADER, &header);
        self.write(STATUS, &[0xff]);
        if kind == 1 {
            self.write(PAGE, &page_of(3, sector));
        }
        let data_flags = if kind == 0 { 1 | 2 } else { 1 };
        for (index, (address, bytes, flags)) in
            (0u16..).zip([(HEADER, 16u32, 1u16), (PAGE, 4096, data_flags), (STATUS, 1, 2)])
        {
            let descriptor = [
                &address.to_le_bytes()[..],
                &bytes.to_le_bytes(),
                &flags.to_le_bytes(),
                &(index + 1).to_le_bytes(),
            ];
            self.write(TABLE + 16 * u64::from(index), &descriptor.concat());
        }
        self.write(AVAILABLE + 4 + 2 * u64::from(self.available_index % 16), &0u16.to_le_bytes());
        self.available_index += 1;
        self.write(AVAILABLE + 2, &self.available_index.to_le_bytes());
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
        if waits {
            let deadline = Instant::now() + PATIENCE;
            while self.half_word(USED + 2) != self.available_index {
                assert!(Instant::now() < deadline, "a request of kind {kind} is not answered");
                std::thread::sleep(Duration::from_micros(100));
            }
            let mut page = [0; 4096];
            self.memory.read_exact_at(&mut page, PAGE).unwrap();
            assert!(page == page_of(3, sector), "kind {kind}, sector {sector}");
        }
    }
}

/// What the process has: threads, descriptors, and mappings of a front end's memory or in-flight region.
#[derive(Debug, PartialEq)]
struct Usage {
    threads: usize,
    fds: usize,
    mappings: usize,
}

impl Usage {
    fn now() -> Self {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let is_theirs = |line: &&str| line.contains(MEMORY_NAME) || line.contains("inflight");
        Self {
            threads: fs::read_dir("/proc/self/task").unwrap().count(),
            fds: fs::read_dir("/proc/self/fd").unwrap().count(),
            mappings: maps.lines().filter(is_theirs).count(),
        }
    }
}

/// Waits until the process has what it had before, and no front end.
fn settles(host: &Host, before: &Usage, what: &str) {
    let deadline = Instant::now() + PATIENCE;
    while host.vms[0].connected() || Usage::now() != *before {
        assert!(Instant::now() < deadline, "{what}: {:?} of {before:?}", Usage::now());
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// The next front end attaches, stores and loads.
fn works(host: &Host, what: &str) {
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory, Options::default()).expect(what);
    let mut queues = device.start().expect(what);
    let page = page_of(3, 9);
    queues[0].write_pages(7, &[page]).expect(what);
    assert!(queues[0].read_page(7).expect(what) == page, "{what}");
}

fn hang_up(host: &Host, at: usize, cut: Cut) {
    let mut front_end = FrontEnd::connect(host);
    let steps = conversation(&front_end);
    for (index, step) in steps.iter().enumerate() {
        if !front_end.take(step, (index == at).then_some(cut)) {
            return;
        }
    }
    panic!("there is no step {at}");
}

#[test]
fn a_front_end_that_hangs_up_anywhere_leaves_the_vm_free_and_nothing_behind() {
    let host = Host::start(&["web1"]);
    works(&host, "before");
    let deadline = Instant::now() + PATIENCE;
    while host.vms[0].connected() {
        assert!(Instant::now() < deadline, "the first front end is not forgotten");
        std::thread::sleep(Duration::from_millis(1));
    }
    // The session's thread ends a moment after the session.
    std::thread::sleep(Duration::from_millis(100));
    let before = Usage::now();
    let steps = conversation(&FrontEnd::connect(&host)).len();
    settles(&host, &before, "one that said nothing");
    let mut hung_up = 0;
    for at in 0..steps {
        for cut in [Cut::HalfHeader, Cut::Header, Cut::HalfBody, Cut::Unanswered, Cut::Answered] {
            let what = format!("step {at}, {cut:?}");
            hang_up(&host, at, cut);
            settles(&host, &before, &what);
            works(&host, &what);
            settles(&host, &before, &what);
            host.store.validate();
            hung_up += 1;
        }
    }
    println!("{hung_up} front ends hung up");
    assert_eq!(host.vms[0].errors(), 0);
}
