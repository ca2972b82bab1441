//! Messages that no VMM sends, on connections that end anywhere: each is refused or ends its own connection, and the
//! next VMM finds the device as it was.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]
#![allow(clippy::cast_possible_truncation, reason = "patterns made of numbers may wrap")]

mod support;
#[path = "support/wire.rs"]
mod wire;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Error, Inflight, Memory, Options, Queue};
use support::{Host, page_of};
use wire::{
    FLAGS, GET_FEATURES, GET_INFLIGHT_FD, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM, GET_VRING_BASE,
    PROTOCOL_FEATURES, SET_FEATURES, SET_INFLIGHT_FD, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_NUM, half_words, message, words,
};

/// Several queues, REPLY_ACK, INFLIGHT_SHMFD.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 12;

fn inflight(queues: u32, queue_size: u32) -> Vec<u8> {
    wire::inflight(0, queues, queue_size)
}

/// What a VMM says before it hands over its first file descriptor. Nine of these messages are answered.
fn greeting() -> Vec<u8> {
    [
        message(GET_FEATURES, 1, &[]),
        message(SET_FEATURES, 1, &words(&[PROTOCOL_FEATURES | 1 << 32])),
        message(GET_PROTOCOL_FEATURES, 1, &[]),
        message(SET_PROTOCOL_FEATURES, 1, &words(&[PROTOCOL])),
        message(SET_OWNER, FLAGS, &[]),
        message(GET_QUEUE_NUM, 1, &[]),
        message(SET_VRING_NUM, FLAGS, &half_words(&[0, 128])),
        message(SET_VRING_BASE, FLAGS, &half_words(&[0, 0])),
        message(SET_VRING_ENABLE, FLAGS, &half_words(&[0, 1])),
        message(GET_VRING_BASE, 1, &half_words(&[0, 0])),
        message(GET_INFLIGHT_FD, 1, &inflight(1, 128)),
    ]
    .concat()
}

fn attach(host: &Host) -> (Device, Vec<Queue>) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut device = loop {
        let memory = Memory::with_bytes(32 << 20).unwrap();
        match Device::connect(host.socket("web1"), memory, Options::default()) {
            Ok(device) => break device,
            // So many have come and gone that the last of them are still being forgotten.
            Err(err) => assert!(Instant::now() < deadline, "{err}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let queues = device.start().unwrap();
    (device, queues)
}

/// The device must serve a VMM as ever, and forget those that left.
fn works(host: &Host) {
    let (device, mut queues) = attach(host);
    let page = page_of(3, 9);
    queues[0].write_pages(7, &[page]).unwrap();
    assert!(queues[0].read_page(7).unwrap() == page);
    drop((device, queues));
    forgotten(host);
    host.store.validate();
}

fn forgotten(host: &Host) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while host.vms[0].connected() {
        assert!(Instant::now() < deadline, "a connection is not forgotten");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What comes back until the device hangs up or has no more to say.
fn replies(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (mut all, mut some) = (Vec::new(), [0; 4096]);
    loop {
        match stream.read(&mut some) {
            Ok(0) => return (all, true),
            Ok(count) => all.extend(&some[..count]),
            Err(err) if err.kind() == std::io::ErrorKind::ConnectionReset => return (all, true),
            Err(_) => return (all, false),
        }
    }
}

#[test]
fn a_vmm_that_leaves_amid_its_greeting_leaves_nothing_behind() {
    let host = Host::start(&["web1"]);
    let greeting = greeting();
    let deadline = Instant::now() + Duration::from_secs(60);
    for cut in 0..=greeting.len() {
        let mut stream = UnixStream::connect(host.socket("web1")).unwrap();
        // One that comes before the device has seen the last one go is hung up on, and comes again.
        while let Err(err) = stream.write_all(&greeting[..cut]) {
            let is_refusal = err.kind() == std::io::ErrorKind::BrokenPipe;
            assert!(is_refusal && Instant::now() < deadline, "after {cut} bytes: {err}");
            forgotten(&host);
            stream = UnixStream::connect(host.socket("web1")).unwrap();
        }
        if cut % 50 == 0 {
            drop(stream);
            works(&host);
        }
    }
    works(&host);
    assert_eq!(host.vms[0].errors(), 0);
}

#[test]
fn garbage_ends_its_connection_only() {
    let host = Host::start(&["web1"]);
    let (_device, mut queues) = attach(&host);
    let mut noise = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        noise ^= noise << 13;
        noise ^= noise >> 7;
        noise ^= noise << 17;
        noise
    };
    for variant in 0..400u64 {
        let mut stream = UnixStream::connect(host.socket("web1")).unwrap();
        let mut bytes = if variant % 3 == 0 { greeting() } else { Vec::new() };
        for _ in 0..=next() % 4 {
            // Every second message has a request that exists and a length that is right for some requests.
            let request = if next() % 2 == 0 { (next() % 48) as u32 } else { next() as u32 };
            let flags = if next() % 4 == 0 { next() as u32 } else { FLAGS };
            let length = [0, 8, 8, 12, 16, 24, 40, 44, 268, 4096][(next() % 10) as usize];
            let payload: Vec<u8> = (0..length).map(|_| (next() % 7) as u8).collect();
            let mut one = message(request, flags, &payload);
            if next() % 4 == 0 {
                one[8..12].copy_from_slice(&(next() as u32).to_le_bytes());
            }
            one.truncate(one.len() - if next() % 4 == 0 { (next() % one.len() as u64) as usize } else { 0 });
            bytes.extend(one);
        }
        // The device may have hung up before it has read everything.
        let _ = stream.write_all(&bytes);
        if variant % 20 == 0 {
            let page = page_of(variant as u8, variant);
            queues[0].write_pages(variant, &[page]).unwrap();
            assert!(queues[0].read_page(variant).unwrap() == page, "variant {variant}");
        }
    }
    drop((_device, queues));
    works(&host);
    assert_eq!(host.vms[0].errors(), 0);
}

#[test]
fn queues_sizes_and_addresses_that_cannot_be_are_refused_and_the_connection_ends() {
    let host = Host::start(&["web1"]);
    let address = |index: u32, at: u64| {
        let mut payload = half_words(&[index, 0]);
        payload.extend(words(&[at, at + 0x1000, at + 0x2000, 0]));
        payload
    };
    let cases: Vec<(u32, Vec<u8>)> = vec![
        (SET_VRING_NUM, half_words(&[4, 128])),
        (SET_VRING_NUM, half_words(&[u32::MAX, 128])),
        (SET_VRING_NUM, half_words(&[0, 0])),
        (SET_VRING_NUM, half_words(&[0, 3])),
        (SET_VRING_NUM, half_words(&[0, 4096])),
        (SET_VRING_NUM, half_words(&[0, 1 << 16])),
        (SET_VRING_NUM, half_words(&[0, u32::MAX])),
        (SET_VRING_BASE, half_words(&[4, 0])),
        (SET_VRING_BASE, half_words(&[0, 1 << 16])),
        (SET_VRING_ENABLE, half_words(&[4, 1])),
        (SET_VRING_ENABLE, half_words(&[0, 2])),
        (SET_VRING_CALL, words(&[1 << 8 | 4])),
        (SET_VRING_ADDR, address(0, 0)),
        (SET_VRING_ADDR, address(0, 0x7fff_0000_0000)),
        (SET_VRING_ADDR, address(0, u64::MAX - 0x8000)),
        (SET_VRING_ADDR, address(9, 0)),
        (SET_FEATURES, words(&[u64::MAX])),
        (SET_PROTOCOL_FEATURES, words(&[u64::MAX])),
        (SET_INFLIGHT_FD, words(&[0, 0, 0])),
        (GET_VRING_BASE, half_words(&[4, 0])),
        (GET_INFLIGHT_FD, inflight(5, 128)),
        (GET_INFLIGHT_FD, inflight(1, 2048)),
        (GET_INFLIGHT_FD, inflight(0, 0)),
        (77, vec![]),
    ];
    let expected = {
        let mut stream = UnixStream::connect(host.socket("web1")).unwrap();
        stream.write_all(&greeting()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        replies(&mut stream).0
    };
    assert_eq!(expected.len(), 8 * (12 + 8) + 12 + 24, "the greeting is answered to its end");
    for (request, payload) in cases {
        let mut stream = UnixStream::connect(host.socket("web1")).unwrap();
        stream.write_all(&greeting()).unwrap();
        stream.write_all(&message(request, FLAGS, &payload)).unwrap();
        let (got, ended) = replies(&mut stream);
        assert!(ended, "the connection lives on after {request} with {payload:?}");
        // A refusal that is told of is a one, as the last word.
        let (greeted, rest) = got.split_at_checked(expected.len()).expect("the greeting is answered");
        // The last four bytes are padding, which nobody fills.
        let known = expected.len() - 4;
        assert!(greeted[..known] == expected[..known], "{request} with {payload:?}: {greeted:?}");
        assert!(rest.is_empty() || rest.ends_with(&words(&[1])), "{request} with {payload:?}: {rest:?}");
    }
    works(&host);
}

#[test]
fn an_inflight_region_of_another_state_is_refused() {
    let (host, other) = (Host::start(&["web1"]), Host::start(&["web1"]));
    let (mut theirs, _queues) = attach(&other);
    let foreign = theirs.replace_inflight(None).expect("the device gave a region");
    let description = foreign.description;
    let memory = Memory::with_bytes(32 << 20).unwrap();
    let mut device = Device::connect(host.socket("web1"), memory, Options::default()).unwrap();
    device.replace_inflight(Some(foreign));
    let refused = device.start().unwrap_err();
    assert!(matches!(refused, Error::Message { message: "SET_INFLIGHT_FD", .. }), "{refused:?}");
    let deadline = Instant::now() + Duration::from_secs(10);
    while device.is_connected() {
        assert!(Instant::now() < deadline, "the connection lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(device);
    works(&host);
    // One of no state, too short for its queues, or none at all.
    let shapes = [(16, 1, 128), (1 << 20, 1, 128), (4096, 0, 0), (1 << 30, u16::MAX, u16::MAX)];
    for (bytes, queues, queue_size) in shapes {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let mut description = description;
        (description.bytes, description.queues, description.queue_size) = (bytes, queues, queue_size);
        let (mut device, _queues) = attach(&host);
        device.replace_inflight(Some(Inflight { description, file }));
        device.reconnect(Duration::ZERO).unwrap_err();
        drop(device);
        works(&host);
    }
}
