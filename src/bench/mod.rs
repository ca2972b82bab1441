//! The bench: drives any vhost-user-blk back end through the front end, compares every byte that comes back,
//! and reports throughput and latency. It trusts nothing but its own copy of the pages: a back end that
//! loses or mixes up a page fails the run, however fast it was. It knows nothing of how pages are kept; a
//! Ballast daemon is asked for the ratio. Beside that it measures what compressor, checksum and copies take alone.

mod args;
mod codec;
mod drive;
mod fleet;
mod lanes;
mod order;
mod phases;
mod ratio;
mod report;
mod source;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::control::client::ClientError;
use crate::frontend::{self, Memory};
use crate::ids::Bytes;
use crate::store::codec::TrainError;

pub use args::{BenchArgs, Phase};
pub use codec::{CodecFigures, CodecReport};
pub use drive::Figures;
use fleet::Fleet;
use lanes::Lanes;
pub use lanes::Pauses;
pub use report::{Phases, Report};
use source::Source;

/// How many pages are taken unless told otherwise: 512 MiB.
const DEFAULT_PAGES: u64 = 131_072;

/// How long the back end may keep a request before the run fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// Why the bench failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is nothing to drive.
    #[error(
        "no back end answers on {socket}: name the socket of a VM, which `ballast vm show NAME` says, while its daemon runs"
    )]
    Connect {
        /// The back end's socket.
        socket: PathBuf,
        /// What happened.
        #[source]
        source: frontend::Error,
    },
    /// The front end could not go on.
    #[error(
        "the back end at {sockets} failed the bench: look at its log; is it still there, and is nobody else attached?"
    )]
    Frontend {
        /// The back end's socket, or the first and how many more.
        sockets: String,
        /// What happened.
        #[source]
        source: frontend::Error,
    },
    /// A corpus file can't be used.
    #[error("can't read pages from {path}: give files of pages of 4096 bytes, back to back")]
    Corpus {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// No corpus file has a whole page.
    #[error(
        "the corpus holds no whole page of 4096 bytes: give other files, or leave out --corpus for synthetic pages"
    )]
    EmptyCorpus,
    /// No dictionary comes out of the corpus.
    #[error(
        "no dictionary: every second page of the corpus is learned from; give other pages, or more of them, or leave \"+dictionary\" out"
    )]
    Train(#[source] TrainError),
    /// A socket is there twice.
    #[error("{socket} is given twice: each VM has a socket of its own, and one front end at a time")]
    Twice {
        /// The socket.
        socket: PathBuf,
    },
    /// What the device has taken goes with it.
    #[error(
        "the back end at {socket} has no in-flight region (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD): what it has taken is lost with it; leave out --reconnect"
    )]
    NoInflight {
        /// The socket.
        socket: PathBuf,
    },
    /// Only one queue can be slept on.
    #[error("--no-poll sleeps until one queue answers: give it one socket and one queue, or leave it out")]
    Sleep,
    /// There would be VMs without a block.
    #[error(
        "{pages} pages are not a block of {block} for each of {vms} VMs: ask for more with --pages, for smaller blocks, or name fewer sockets"
    )]
    Few {
        /// Pages asked for.
        pages: u64,
        /// Size of a request.
        block: Bytes,
        /// VMs.
        vms: u64,
    },
    /// The device has fewer queues than were asked for.
    #[error(
        "the device at {socket} has {offered} queues, not {queues}: ask for fewer with --queues, or give its VM more"
    )]
    Queues {
        /// The socket.
        socket: PathBuf,
        /// Queues that it has.
        offered: u64,
        /// Queues that were asked for.
        queues: u16,
    },
    /// The device has no room for what was asked.
    #[error(
        "the device has {device_pages} pages: not enough for {pages} from slot {first_slot} on: ask for fewer with --pages, or take a larger disk"
    )]
    Room {
        /// Pages on the device.
        device_pages: u64,
        /// Pages asked for of this device.
        pages: u64,
        /// The slot to start at.
        first_slot: u64,
    },
    /// Pages came back other than they were stored, or not at all. The report has been printed.
    #[error("{mismatched_pages} pages came back wrong and {failed_requests} requests failed")]
    Damage {
        /// Pages with at least one wrong byte.
        mismatched_pages: u64,
        /// Requests that the device did not answer with OK.
        failed_requests: u64,
    },
    /// The daemon that was named for the ratio doesn't answer.
    #[error("the daemon can't be asked for the compression ratio")]
    Control(#[source] ClientError),
    /// There is no event loop to ask a daemon with.
    #[error("an event loop can't be made")]
    EventLoop(#[source] std::io::Error),
    /// The report could not be printed.
    #[error("can't print the report")]
    Print(#[source] serde_json::Error),
}

/// Runs the bench and prints its report. The compression ratio in it is that of the daemon with this control socket;
/// without one, of a daemon with a control socket beside the (first) device's.
///
/// # Errors
/// When the back end fails, pages come back wrong, there is nothing to measure, or the daemon that was named doesn't
/// answer.
pub fn run(args: &BenchArgs, control: Option<&Path>) -> Result<(), Error> {
    if args.codec_alone {
        return codec::run(args);
    }
    let report = measure(args, control)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Print)?);
    } else {
        print!("{report}");
    }
    match (report.mismatched_pages, report.failed_requests) {
        (0, 0) => Ok(()),
        (mismatched_pages, failed_requests) => Err(Error::Damage { mismatched_pages, failed_requests }),
    }
}

/// Runs the bench and returns its report, mismatches and all.
///
/// # Errors
/// When the back end fails, there is nothing to measure, or the daemon that was named doesn't answer.
pub fn measure(args: &BenchArgs, control: Option<&Path>) -> Result<Report, Error> {
    let failed = |source| Error::Frontend { sockets: args.sockets_named(), source };
    args.check()?;
    let daemon = ratio::Daemon::of(&args.sockets, control)?;
    let source = Source::open(&args.corpus, args.block_pages())?;
    let memory = Memory::with_bytes(source.bytes() + fleet::memory_bytes(args)).map_err(failed)?;
    let mut fleet = Fleet::connect(args, &memory)?;
    let span = span(args, fleet.device_pages())?;
    let pages_at = source.place(&memory).map_err(failed)?;
    let (device_pages, config) = (fleet.device_pages(), fleet.config());
    let queues = fleet.start(args).map_err(failed)?;
    let mut lanes = Lanes::new(queues, args.wait(), fleet);
    let ids: Vec<_> = (0..args.sockets.len()).map(|vm| lanes.queue(vm).id().ok()).collect();
    let device_id = ids.first().cloned().flatten();

    let mut run = phases::Run::new(&source, pages_at, span, args.qd);
    let mut report = Report::new(args, &source, &span, device_pages, device_id);
    let ratio = || daemon.as_ref()?.ratio(&ids);
    run.all(&args.phases, &mut lanes, &config, &mut report, &ratio).map_err(failed)?;
    report.pauses = lanes.stop().map_err(failed)?;
    Ok(report)
}

/// Which part of each device is used: whole blocks from a slot on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first_slot: u64,
    /// Blocks of all devices.
    pub(crate) blocks: u64,
    pub(crate) block_pages: usize,
    pub(crate) vms: u64,
}

impl Span {
    fn pages(&self) -> u64 {
        self.blocks * self.block_pages as u64
    }
}

/// The span for devices with so many pages each.
fn span(args: &BenchArgs, device_pages: u64) -> Result<Span, Error> {
    let (first_slot, vms) = (args.first_slot, args.sockets.len() as u64);
    let block_pages = args.block_pages();
    // In whole blocks, as the first device has to have room for the one more that it may get.
    let room_blocks = device_pages.saturating_sub(first_slot) / block_pages as u64;
    let pages = args.pages.unwrap_or(DEFAULT_PAGES.min(room_blocks * block_pages as u64 * vms));
    let blocks = pages / block_pages as u64;
    let most = blocks.div_ceil(vms).max(1);
    if most > room_blocks {
        return Err(Error::Room { device_pages, pages: most * block_pages as u64, first_slot });
    }
    if blocks < vms {
        return Err(Error::Few { pages, block: args.block_size, vms });
    }
    Ok(Span { first_slot, blocks, block_pages, vms })
}

#[cfg(test)]
mod tests {
    use super::args::tests::parse;
    use super::*;

    #[test]
    fn the_span_fits_the_device_and_holds_whole_blocks() {
        let args = parse("bench s").unwrap();
        let large = parse("bench s --block-size 128KiB").unwrap();
        let taken = span(&large, 1001).unwrap();
        assert_eq!((taken.first_slot, taken.blocks, taken.pages()), (1, 31, 992));
        assert_eq!(span(&args, 1 << 30).unwrap().pages(), DEFAULT_PAGES);
        assert!(matches!(span(&args, 1), Err(Error::Room { .. })));
        assert!(matches!(
            span(&parse("bench s --pages 100").unwrap(), 100),
            Err(Error::Room { pages: 100, .. })
        ));
        let short = parse("bench s --block-size 128KiB --pages 31").unwrap();
        assert!(matches!(span(&short, 100), Err(Error::Few { pages: 31, .. })));
    }

    #[test]
    fn several_vms_share_the_span() {
        let three = |options: &str| parse(&format!("bench a b c{options}")).unwrap();
        assert_eq!(span(&three(""), 101).unwrap().pages(), 300);
        assert_eq!(span(&three(" --pages 7"), 4).unwrap().blocks, 7);
        assert!(matches!(span(&three(" --pages 10"), 4), Err(Error::Room { pages: 4, .. })));
        assert!(matches!(span(&three(" --pages 2"), 100), Err(Error::Few { vms: 3, .. })));
    }
}
