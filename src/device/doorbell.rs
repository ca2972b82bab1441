//! The eventfds of a ring: a guest's kicks come through one, our calls go through the other. They are the VMM's as well,
//! who may fill or empty them and let them block; so each use of them is short ([`interrupt`]), and a VMM that makes one
//! block has broken that ring.

#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use vhost_user_backend::VringState;

use super::ring::GuestMemory;
use super::signals::interrupt;

/// The VMM lets an eventfd block.
#[derive(Debug, thiserror::Error)]
#[error("an eventfd of the ring blocks")]
pub struct Blocks;

/// Tells the guest that there are answers. A call that fails otherwise is the VMM's loss: they are in the ring.
///
/// # Errors
/// When the VMM lets it block.
pub fn call(vring: &VringState<GuestMemory>) -> Result<(), Blocks> {
    use_briefly(vring.get_call().as_ref(), |fd| rustix::io::write(fd, &1u64.to_ne_bytes()))
}

/// Takes the kicks that came. Only the wake-up matters: what there is to do, the ring itself says.
///
/// # Errors
/// When the VMM lets it block.
pub fn take_kicks(vring: &VringState<GuestMemory>) -> Result<(), Blocks> {
    use_briefly(vring.get_kick().as_ref(), |fd| rustix::io::read(fd, &mut [0; 8]))
}

fn use_briefly(
    eventfd: Option<&impl AsRawFd>,
    call: impl FnOnce(BorrowedFd<'_>) -> Result<usize, Errno>,
) -> Result<(), Blocks> {
    let Some(eventfd) = eventfd else { return Ok(()) };
    // SAFETY: the vring owns the descriptor, and is borrowed for as long as this takes.
    let fd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    match interrupt::briefly(|| call(fd)) {
        Err(Errno::INTR) => Err(Blocks),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use rustix::event::{EventfdFlags, eventfd};
    use vhost_user_backend::VringT;
    use vm_memory::GuestMemoryAtomic;

    use crate::device::guest_memory::Memory;
    use crate::device::ring::Vring;

    #[test]
    fn eventfds_that_block_are_found_out_and_others_used() {
        interrupt::start_guard().unwrap();
        let vring = Vring::new(GuestMemoryAtomic::new(Memory::new()), 16).unwrap();
        let use_both = || {
            let vring = vring.get_ref();
            (call(&vring).is_ok(), take_kicks(&vring).is_ok())
        };
        assert_eq!(use_both(), (true, true), "there is none");
        for (flags, kicks, calls, works) in [
            (EventfdFlags::empty(), 1u64, 7, (true, true)),
            (EventfdFlags::empty(), 0, u64::MAX - 1, (false, false)),
            // Nothing to take, and nobody who takes: no reason to wait.
            (EventfdFlags::NONBLOCK, 0, u64::MAX - 1, (true, true)),
        ] {
            let [kick, call] = [kicks, calls].map(|count| {
                let event = eventfd(0, flags).unwrap();
                rustix::io::write(&event, &count.to_ne_bytes()).unwrap();
                File::from(event)
            });
            vring.set_kick(Some(kick));
            vring.set_call(Some(call));
            assert_eq!(use_both(), works);
        }
    }
}
