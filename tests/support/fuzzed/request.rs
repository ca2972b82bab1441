//! A descriptor chain in guest memory that holds these bytes: it is parsed, and what comes out is a request that can be
//! carried out.

use std::fs::File;

use ballast::device::blk::config_space::{RANGES_MAX, SECTOR_BYTES};
use ballast::device::blk::request::{Kind, Malformed, parse};
use ballast::device::chain::DescriptorTable;
use ballast::device::guest_memory::{Memory, Region};
use ballast::device::view::View;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend};

use super::script::Script;

/// Two regions with a hole between them.
const REGION_BYTES: usize = 8 << 10;
const SECOND: u64 = 24 << 10;
const CAPACITY: u64 = 1 << 20;

/// The table's size, the head, then what is in memory from address 0 on and from the second region on.
pub fn run(bytes: &[u8]) {
    thread_local! {
        static MEMORY: Memory = memory();
    }
    MEMORY.with(|memory| parse_in(memory, bytes));
}

fn memory() -> Memory {
    let region = |start| {
        let file = File::from(memfd_create("fuzzed", MemfdFlags::CLOEXEC).expect("a memfd"));
        file.set_len(REGION_BYTES as u64).expect("its length");
        Region::map(FileOffset::new(file, 0), REGION_BYTES, GuestAddress(start), None).expect("it is mapped")
    };
    Memory::from_regions(vec![region(0), region(SECOND)]).expect("they don't overlap")
}

fn parse_in(memory: &Memory, bytes: &[u8]) {
    let mut script = Script(bytes);
    let size = script.half_word();
    let head = script.half_word();
    for start in [0, SECOND] {
        let mut content = [0; REGION_BYTES];
        let given = script.bytes(REGION_BYTES);
        content[..given.len()].copy_from_slice(given);
        memory.write_slice(&content, GuestAddress(start)).expect("it is there");
    }
    let is_there = |address, length| GuestMemoryBackend::check_range(memory, address, length);
    let table = DescriptorTable { address: GuestAddress(0), size };
    // As in a turn: it remembers where the one before was.
    let view = View::new(memory);
    let before = parse(&view, table, head.wrapping_add(1), CAPACITY).map(drop);
    let again = parse(&View::new(memory), table, head.wrapping_add(1), CAPACITY).map(drop);
    assert_eq!(before, again);
    let request = match parse(&view, table, head, CAPACITY) {
        Ok(request) => request,
        // Its status byte may be outside, which whoever answers finds out.
        Err(Malformed::Answer(..) | Malformed::NoAnswer) => return,
    };
    assert!(head < size);
    assert!(is_there(request.status, 1), "a status byte outside");
    let segments = request.data.left();
    assert!(segments.iter().all(|segment| segment.length > 0));
    assert!(segments.iter().all(|segment| is_there(segment.address, segment.length as usize)));
    assert_eq!(segments.iter().map(|segment| u64::from(segment.length)).sum::<u64>(), request.length);
    match request.kind {
        Kind::Load | Kind::Store => {
            assert!(request.position + request.length <= CAPACITY);
            assert!(request.length.is_multiple_of(SECTOR_BYTES));
        }
        Kind::Discard | Kind::WriteZeroes => {
            assert!((1..=u64::from(RANGES_MAX)).contains(&(request.length / 16)));
        }
        Kind::GetId => assert!(request.length > 0),
        Kind::Flush => assert!(segments.is_empty()),
    }
}
