//! Giving a range back: a hole in a file, a discard on a device. One of the room's two files with unsafe code (the
//! other is `io/ring`), because no safe wrapper of BLKDISCARD is at hand.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::fs::FallocateFlags;
use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

/// `_IO(0x12, 119)`: takes offset and length, two 64-bit numbers.
const BLKDISCARD: Opcode = opcode::none(0x12, 119);

/// Punches a hole. What was there reads as zeros.
pub fn punch(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, offset, bytes)?)
}

/// Tells a block device that a range holds nothing. What reads from there afterwards is up to the device.
pub fn discard_blocks(device: &File, offset: u64, bytes: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64 behind the pointer, which is what an array of two of them is; the kernel
    // keeps no reference, touches no other memory of ours, and refuses what is not a block device.
    let setter = unsafe { Setter::<BLKDISCARD, [u64; 2]>::new([offset, bytes]) };
    // SAFETY: as above; the range is on the device, and `Target::discard` is asked for free segments only.
    Ok(unsafe { ioctl(device, setter) }?)
}
