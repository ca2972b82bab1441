//! A vhost-user-blk front end, and one for a balloon: what a VMM and its guest's driver are to the device, for the bench
//! and the tests. [`Device`] speaks the socket (negotiation, memory, in-flight region, reconnect), [`Queue`] is one
//! virtqueue with requests known by tag, [`Ring`] is the bare split ring under it, from which malformed
//! chains can be built. It knows nothing of Ballast and must work against any vhost-user-blk back end;
//! it trusts the back end no further than its own memory: bad answers are errors, never panics.
//!
//! ```no_run
//! use ballast::frontend::{Device, Memory, Op, Options};
//!
//! # fn main() -> Result<(), ballast::frontend::Error> {
//! let memory = Memory::with_bytes(64 << 20)?;
//! let mut device = Device::connect("/run/ballast/web1.sock", memory, Options::default())?;
//! let mut queue = device.start()?.remove(0);
//! queue.write_pages(1, &[[7; 4096]])?;
//! assert_eq!(queue.read_page(1)?, [7; 4096]);
//!
//! // Many requests in flight, by tag:
//! for tag in 0..queue.depth() {
//!     queue.stage(tag, Op::Read { sector: 8 * u64::from(tag), bytes: 4096 })?;
//! }
//! queue.publish()?;
//! while queue.in_flight() > 0 {
//!     let done = queue.wait(std::time::Duration::from_secs(1))?;
//!     println!("{} {:?} {:?}", done.tag, done.status, done.latency);
//! }
//! # Ok(())
//! # }
//! ```

mod areas;
mod balloon;
mod blk;
mod conversation;
mod device;
mod disk;
mod memory;
mod migration;
mod negotiation;
mod queue;
mod request;
mod ring;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use balloon::{Balloon, BalloonConfig};
pub use blk::{BlkConfig, SECTOR_BYTES, SECTORS_PER_PAGE};
pub use device::{Device, Inflight, InflightDescription};
pub use memory::Memory;
pub use negotiation::{Manners, MemoryMessages, Options};
pub use queue::{Completion, Queue, Wait};
pub use request::{Op, Range, Status};
pub use ring::{Descriptor, Ring, Used};

/// Why the front end could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens there, or not any more.
    #[error("can't connect to {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A vhost-user message failed or was refused.
    #[error("the back end did not accept {message}")]
    Message {
        /// The vhost-user name of the message.
        message: &'static str,
        /// What was wrong with it.
        #[source]
        source: vhost::Error,
    },
    /// The back end lacks something that can't be done without.
    #[error("the back end does not offer {feature}")]
    Missing {
        /// The feature's name in the specification.
        feature: &'static str,
    },
    /// The back end has fewer queues than are to be set up.
    #[error("the back end has {offered} queues, not {wanted}")]
    Queues {
        /// What it says; 1 without `VHOST_USER_PROTOCOL_F_MQ`.
        offered: u64,
        /// What was asked for.
        wanted: u16,
    },
    /// The back end's configuration space makes no sense.
    #[error("the back end's configuration space is malformed: {reason}")]
    Config {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Guest memory could not be made.
    #[error("can't make {bytes} bytes of guest memory at {address:#x}: {reason}")]
    MakeMemory {
        /// Its guest physical address.
        address: u64,
        /// Its size.
        bytes: usize,
        /// Which step failed, and how.
        reason: String,
    },
    /// The guest memory has no room left for another allocation.
    #[error("guest memory has no {bytes} bytes left")]
    MemoryFull {
        /// What was asked for.
        bytes: usize,
    },
    /// An address that is in no region.
    #[error("guest address {address:#x} with {bytes} bytes is outside guest memory")]
    Address {
        /// The address.
        address: u64,
        /// The length of the access.
        bytes: usize,
    },
    /// A descriptor of the front end's own failed.
    #[error("can't {action}")]
    Descriptor {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// Nothing came back in time.
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    /// The back end returned something that was not in flight.
    #[error("the back end returned descriptor {head}, which is not in flight")]
    UnknownHead {
        /// The id in the used ring.
        head: u32,
    },
    /// The back end claims more completions than there were requests.
    #[error("the back end's used index {used} is ahead of the available index {available}")]
    UsedIndex {
        /// What the back end wrote.
        used: u16,
        /// What we had published.
        available: u16,
    },
    /// A request that the caller may not make in this state.
    #[error("{0}")]
    Usage(&'static str),
    /// A request came back with something other than OK.
    #[error("the device answered {op} at sector {sector} with {status:?}")]
    Failed {
        /// The kind of request.
        op: &'static str,
        /// Its first sector.
        sector: u64,
        /// The device's answer.
        status: Status,
    },
}

impl Error {
    /// Wraps a failure of the `vhost` crate with the name of the message that it happened to.
    pub(crate) fn message(message: &'static str) -> impl FnOnce(vhost::Error) -> Self {
        move |source| Self::Message { message, source }
    }
}
