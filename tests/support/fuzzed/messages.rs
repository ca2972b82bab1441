//! A front end that says what these bytes tell it to, to a real session over a real socket: messages with the right and
//! the wrong sizes, flags and descriptors, in any order, among them those that make rings run. The session answers or
//! ends, and forgets its front end.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ballast::device::Device;
use ballast::device::vm::DeviceVm;
use ballast::store::codec::Compressor;
use ballast::store::vm::Limits;
use ballast::store::{Store, VmSpec};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};

use super::script::Script;
use super::store_config;
use super::wire::{self, FLAGS, PROTOCOL, PROTOCOL_FEATURES, half_words, message, words};

const QUEUES: u16 = 2;
const SLOTS: u32 = 256;
const MEMORY_BYTES: u64 = 64 << 10;
/// Where the front end says that it has the guest's memory.
const VMM: u64 = 0x7f00_0000_0000;
const MESSAGES_MAX: usize = 40;

pub fn run(bytes: &[u8]) {
    thread_local! {
        static HOST: Host = Host::new();
    }
    HOST.with(|host| host.hear(&mut Script(bytes)));
}

struct Host {
    _dir: tempfile::TempDir,
    store: Arc<Store>,
    vm: Arc<DeviceVm>,
    _device: Arc<Device>,
    socket: PathBuf,
}

/// What a front end can hand over.
struct Fds {
    memory: File,
    all: [OwnedFd; 7],
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").expect("a directory on a tmpfs");
        let config = store_config(&dir.path().join("state"), Compressor::Lz4, 1 << 20);
        let spec = VmSpec { name: "web1".to_owned(), slots: SLOTS, limits: Limits::NONE };
        let store = Arc::new(Store::open(config, vec![spec], || Ok(None)).expect("the state opens"));
        let device = Device::start(1, Duration::from_micros(50), Duration::ZERO, store.state_id());
        let device = Arc::new(device.expect("a worker starts"));
        let vm = Arc::new(DeviceVm::new("web1", QUEUES, true, store.ready("web1")));
        let socket = dir.path().join("web1.sock");
        let listener = UnixListener::bind(&socket).expect("a socket");
        device.listen(listener, Arc::clone(&vm)).expect("a thread");
        Self { _dir: dir, store, vm, _device: device, socket }
    }

    fn hear(&self, script: &mut Script<'_>) {
        let mut stream = UnixStream::connect(&self.socket).expect("somebody listens");
        let fds = Fds::new();
        if script.byte() & 1 != 0 {
            let _ = greet(&stream, &fds);
        }
        for _ in 0..MESSAGES_MAX {
            if script.is_over() || !say(&stream, &fds, script) {
                break;
            }
            drain(&mut stream);
        }
        // It closes its end when it has forgotten us.
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_nonblocking(false).expect("a socket can block");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a socket has a timeout");
        let end = std::io::copy(&mut stream, &mut std::io::sink());
        let ended =
            !matches!(&end, Err(err) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&err.kind()));
        assert!(ended, "the session neither answers nor ends");
        assert!(!self.vm.connected(), "the session is not forgotten");
        self.store.validate();
    }
}

impl Fds {
    fn new() -> Self {
        let memfd = |bytes| {
            let file = File::from(memfd_create("fuzzed", MemfdFlags::CLOEXEC).expect("a memfd"));
            file.set_len(bytes).expect("its length");
            file
        };
        // Of huge pages, where the kernel has them.
        let huge = memfd_create("fuzzed", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
        let huge = huge.and_then(|file| rustix::fs::ftruncate(&file, 2 << 20).map(|()| file));
        let event = || eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let (pipe, _) = std::io::pipe().expect("a pipe");
        let null = File::options().read(true).write(true).open("/dev/null").expect("it is there");
        let memory = memfd(MEMORY_BYTES);
        let all = [
            memory.try_clone().expect("a descriptor").into(),
            memfd(100).into(),
            event(),
            event(),
            pipe.into(),
            null.into(),
            huge.unwrap_or_else(|_| memfd(0).into()),
        ];
        Self { memory, all }
    }
}

/// What comes before a ring runs, as a VMM says it. False when the other end is gone.
fn greet(stream: &UnixStream, fds: &Fds) -> bool {
    let [memory, _, kick, call, ..] = &fds.all;
    let one = |request, payload: &[u8], fd: Option<&OwnedFd>| {
        let fds: Vec<_> = fd.map(AsFd::as_fd).into_iter().collect();
        wire::send(stream, &message(request, FLAGS, payload), &fds)
    };
    one(wire::SET_FEATURES, &words(&[PROTOCOL_FEATURES | 1 << 32]), None)
        && one(wire::SET_PROTOCOL_FEATURES, &words(&[PROTOCOL]), None)
        && one(wire::SET_MEM_TABLE, &wire::region(0, MEMORY_BYTES, VMM, 0), Some(memory))
        && one(wire::SET_VRING_NUM, &half_words(&[0, 16]), None)
        && one(wire::SET_VRING_BASE, &half_words(&[0, 0]), None)
        && one(wire::SET_VRING_ADDR, &wire::addresses(0, VMM, VMM + 0x2000, VMM + 0x1000), None)
        && one(wire::SET_VRING_CALL, &words(&[0]), Some(call))
        && one(wire::SET_VRING_KICK, &words(&[0]), Some(kick))
        && one(wire::SET_VRING_ENABLE, &half_words(&[0, 1]), None)
}

/// Says one thing. False when the other end is gone.
fn say(stream: &UnixStream, fds: &Fds, script: &mut Script<'_>) -> bool {
    let (kind, handed) = (script.byte(), script.byte());
    if kind == 255 {
        // The guest's memory changes, or its file becomes shorter.
        let (at, count) = (script.half_word(), script.byte());
        use std::os::unix::fs::FileExt;
        let _ = match count {
            0 => fds.memory.set_len(u64::from(at)),
            _ => fds.memory.write_all_at(script.bytes(count.into()), u64::from(at)),
        };
        return true;
    }
    let request = u32::from(kind % 48);
    let mut bytes = if kind < 96 {
        message(request, FLAGS, &well_formed(request, script))
    } else {
        let (flags, count) = (u32::from(script.byte()), script.byte());
        message(request, flags, script.bytes(count.into()))
    };
    if kind >= 192 {
        // A length that isn't so, or half of a message.
        bytes[8..12].copy_from_slice(&script.word().to_le_bytes());
        bytes.truncate(usize::from(script.byte()).max(1));
    }
    let which = [handed & 7, handed >> 3 & 7].map(usize::from);
    // As many as the message wants of this kind, or as the script says.
    let fds: Vec<_> =
        which.iter().filter_map(|index| Some(fds.all.get(index.checked_sub(1)?)?.as_fd())).collect();
    wire::send(stream, &bytes, &fds)
}

/// A payload of the right length whose numbers are near to what makes sense.
fn well_formed(request: u32, script: &mut Script<'_>) -> Vec<u8> {
    let queue = u32::from(script.byte() % 4);
    let number = script.half_word();
    let near = |at: u64| VMM + at + u64::from(number & 0xff);
    match request {
        wire::SET_FEATURES => words(&[PROTOCOL_FEATURES | 1 << 32 | u64::from(number) << 20]),
        wire::SET_PROTOCOL_FEATURES => words(&[u64::from(number)]),
        wire::SET_MEM_TABLE | wire::ADD_MEM_REG | wire::REM_MEM_REG => {
            let start = u64::from(number & 0xf) << 12;
            wire::region(start, MEMORY_BYTES >> (number >> 12), VMM + start, u64::from(queue) << 12)
        }
        wire::SET_VRING_NUM | wire::SET_VRING_BASE | wire::GET_VRING_BASE | wire::SET_VRING_ENABLE => {
            half_words(&[queue, number.into()])
        }
        wire::SET_VRING_ADDR => wire::addresses(queue, near(0), near(0x2000), near(0x1000)),
        wire::SET_VRING_KICK | wire::SET_VRING_CALL | wire::SET_VRING_ERR => {
            words(&[u64::from(queue) | u64::from(number & 1) << 8])
        }
        wire::GET_CONFIG => {
            [half_words(&[queue, number.into(), 0]), vec![0; usize::from(number % 300)]].concat()
        }
        wire::GET_INFLIGHT_FD | wire::SET_INFLIGHT_FD => wire::inflight(u64::from(number), queue, 16),
        // SET_LOG_BASE
        6 => words(&[u64::from(number), 0]),
        _ => Vec::new(),
    }
}

/// Reads what there is, so that nobody waits for us.
fn drain(stream: &mut UnixStream) {
    stream.set_nonblocking(true).expect("a socket need not block");
    let mut some = [0; 4096];
    while matches!(stream.read(&mut some), Ok(count) if count > 0) {}
    stream.set_nonblocking(false).expect("a socket can block");
}
