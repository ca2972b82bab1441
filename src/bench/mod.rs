//! The bench: drives any vhost-user-blk back end through the front end, compares every byte that comes back,
//! and reports throughput and latency. It trusts nothing but its own copy of the pages: a back end that
//! loses or mixes up a page fails the run, however fast it was. It knows nothing of how pages are kept; a
//! Ballast daemon is asked for the ratio.

mod drive;
mod phases;
mod ratio;
mod report;
mod source;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::control::client::ClientError;
use crate::frontend::{self, Device, Memory, Options, Wait};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

pub use drive::Figures;
pub use report::{Phases, Report};
use source::Source;

/// How many pages are taken unless told otherwise: 512 MiB.
const DEFAULT_PAGES: u64 = 131_072;

/// The largest request, as the largest that a device must take.
const BLOCK_BYTES_MAX: u64 = 1 << 20;

/// How long the back end may keep a request before the run fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// What to measure and with which pages.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// The back end's vhost-user socket
    pub socket: PathBuf,
    /// Files of raw 4 KiB pages to store, cycled; without any, synthetic pages of mixed compressibility
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub corpus: Vec<PathBuf>,
    /// Pages to store; default: what fits the device, 131072 at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub pages: Option<u64>,
    /// Requests in flight
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub qd: u16,
    /// Size of each request: 4KiB, 128KiB or any whole number of pages up to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_block)]
    pub block_size: Bytes,
    /// First slot to use; slot 0 holds a swap header on Ballast's devices
    #[arg(long, value_name = "SLOT", default_value_t = 1)]
    pub first_slot: u64,
    /// Parts of the run, in their fixed order
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Phase::ALL)]
    pub phases: Vec<Phase>,
    /// Sleep on event descriptors instead of polling the ring
    #[arg(long)]
    pub no_poll: bool,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
}

/// A part of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Phase {
    /// Store all pages in order
    Store,
    /// Load all pages in shuffled order and compare
    Load,
    /// Overwrite every second block, in shuffled order, then load and compare all
    Overwrite,
    /// Load with one request in flight, and compare
    Latency,
    /// Discard everything and make part of it zeros, if the device can
    Discard,
}

impl Phase {
    const ALL: [Self; 5] = [Self::Store, Self::Load, Self::Overwrite, Self::Latency, Self::Discard];
}

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
        "the back end at {socket} failed the bench: look at its log; is it still there, and is nobody else attached?"
    )]
    Frontend {
        /// The back end's socket.
        socket: PathBuf,
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
    /// The device has no room for what was asked.
    #[error(
        "the device has {device_pages} pages: not enough for {pages} from slot {first_slot} on: ask for fewer with --pages, or take a larger disk"
    )]
    Room {
        /// Pages on the device.
        device_pages: u64,
        /// Pages asked for.
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

impl Error {
    fn of(args: &BenchArgs, source: frontend::Error) -> Self {
        let socket = args.socket.clone();
        match source {
            frontend::Error::Connect { .. } => Self::Connect { socket, source },
            source => Self::Frontend { socket, source },
        }
    }
}

/// Runs the bench and prints its report. The compression ratio in it is that of the daemon with this control socket;
/// without one, of a daemon with a control socket beside the device's.
///
/// # Errors
/// When the back end fails, pages come back wrong, there is nothing to measure, or the daemon that was named doesn't
/// answer.
pub fn run(args: &BenchArgs, control: Option<&Path>) -> Result<(), Error> {
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
    let daemon = ratio::Daemon::of(&args.socket, control)?;
    let failed = |source| Error::of(args, source);
    let block_pages = usize::try_from(args.block_size.0 / PAGE_SIZE_U64).unwrap_or(1);
    let source = Source::open(&args.corpus, block_pages)?;
    let options = options(args);
    let spare_bytes = usize::from(args.qd) * (options.data_bytes + 4096) + (4 << 20);
    let memory = Memory::with_bytes(source.bytes() + spare_bytes).map_err(failed)?;
    let mut device = Device::connect(&args.socket, memory.clone(), options).map_err(failed)?;
    let span = span(args, device.config().pages(), block_pages)?;
    let pages_at = source.place(&memory).map_err(failed)?;
    let mut queue = device.start().map_err(failed)?.remove(0);
    queue.set_wait(if args.no_poll { Wait::Sleep } else { Wait::Poll });

    let mut run = phases::Run::new(&source, pages_at, span, args.qd);
    let mut report = Report::new(args, &source, &span, device.config(), queue.id().ok());
    let id = report.device_id.clone();
    let ratio = || daemon.as_ref()?.ratio(id.as_deref());
    run.all(&args.phases, &mut queue, device.config(), &mut report, &ratio).map_err(failed)?;
    device.stop().map_err(failed)?;
    Ok(report)
}

/// Which part of the device is used: whole blocks from a slot on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) first_slot: u64,
    pub(crate) blocks: u64,
    pub(crate) block_pages: usize,
}

impl Span {
    fn pages(&self) -> u64 {
        self.blocks * self.block_pages as u64
    }
}

fn span(args: &BenchArgs, device_pages: u64, block_pages: usize) -> Result<Span, Error> {
    let first_slot = args.first_slot;
    let room = device_pages.saturating_sub(first_slot);
    let pages = args.pages.unwrap_or(DEFAULT_PAGES.min(room));
    let blocks = pages / block_pages as u64;
    if blocks == 0 || pages > room {
        return Err(Error::Room { device_pages, pages: pages.max(block_pages as u64), first_slot });
    }
    Ok(Span { first_slot, blocks, block_pages })
}

fn options(args: &BenchArgs) -> Options {
    // Four descriptors a request; 128 at least, QEMU's default, and so 1024 at most, what every back end takes.
    let queue_size = (args.qd * 4).next_power_of_two().max(128);
    Options {
        depth: args.qd,
        queue_size,
        data_bytes: usize::try_from(args.block_size.0).unwrap_or(1 << 20),
        ..Options::default()
    }
}

fn parse_block(text: &str) -> Result<Bytes, String> {
    let block: Bytes = text.parse().map_err(|err: crate::ids::ParseBytesError| err.to_string())?;
    if block.0 == 0 || !block.0.is_multiple_of(PAGE_SIZE_U64) || block.0 > BLOCK_BYTES_MAX {
        return Err(format!("{text} is not a whole number of 4KiB pages between 4KiB and 1MiB"));
    }
    Ok(block)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.bench)
    }

    #[test]
    fn the_defaults_are_those_of_the_yardsticks() {
        let args = parse("bench /run/x.sock").unwrap();
        assert_eq!((args.qd, args.block_size, args.first_slot), (32, Bytes(4096), 1));
        assert_eq!((args.phases.len(), args.no_poll, args.json), (5, false, false));
    }

    #[test]
    fn options_are_read_and_bad_ones_refused() {
        let args = parse("bench s --corpus a b --qd 1 --block-size 128KiB --phases store,load").unwrap();
        assert_eq!((args.corpus.len(), args.qd, args.block_size.0), (2, 1, 128 << 10));
        assert_eq!(args.phases, [Phase::Store, Phase::Load]);
        for bad in
            ["--qd 0", "--qd 4096", "--block-size 5000", "--block-size 2MiB", "--pages 0", "--phases x"]
        {
            assert!(parse(&format!("bench s {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_span_fits_the_device_and_holds_whole_blocks() {
        let args = parse("bench s").unwrap();
        let taken = span(&args, 1001, 32).unwrap();
        assert_eq!((taken.first_slot, taken.blocks, taken.pages()), (1, 31, 992));
        assert_eq!(span(&args, 1 << 30, 1).unwrap().pages(), DEFAULT_PAGES);
        assert!(span(&args, 1, 1).is_err());
        assert!(span(&parse("bench s --pages 100").unwrap(), 100, 1).is_err());
        assert!(span(&parse("bench s --pages 31").unwrap(), 100, 32).is_err());
    }

    #[test]
    fn queues_have_room_for_every_request_in_flight() {
        for qd in [1, 32, 33, 256] {
            let args = parse(&format!("bench s --qd {qd}")).unwrap();
            let options = options(&args);
            assert!(options.queue_size.is_power_of_two() && options.queue_size / qd >= 3, "{qd}");
        }
    }
}
