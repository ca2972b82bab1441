//! What `ballast bench` is asked for, and what makes no sense together.

use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use super::Error;
use crate::config::parse_duration;
use crate::frontend::Wait;
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;
use crate::store::codec::Compressor;

/// The largest request, as the largest that a device must take.
const BLOCK_BYTES_MAX: u64 = 1 << 20;

/// What to measure and with which pages.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// The back end's vhost-user socket; of several VMs one each, and the same load is spread over all
    #[arg(value_name = "SOCKET", required_unless_present = "codec_alone", conflicts_with = "codec_alone")]
    pub sockets: Vec<PathBuf>,
    /// Files of raw 4 KiB pages to store, cycled; without any, synthetic pages of mixed compressibility
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub corpus: Vec<PathBuf>,
    /// Pages to store, of all VMs together; default: what fits the devices, 131072 at most
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub pages: Option<u64>,
    /// Requests in flight, in all queues of all VMs together
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub qd: u16,
    /// Queues of each VM that the requests go round
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Size of each request: 4KiB, 128KiB or any whole number of pages up to 1MiB
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = parse_block)]
    pub block_size: Bytes,
    /// First slot to use; slot 0 holds a swap header on Ballast's devices
    #[arg(long, value_name = "SLOT", default_value_t = 1)]
    pub first_slot: u64,
    /// Parts of the run, in their fixed order
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Phase::ALL)]
    pub phases: Vec<Phase>,
    /// Sleep on event descriptors instead of polling the ring; with one queue
    #[arg(long)]
    pub no_poll: bool,
    /// When a back end goes, connect again for up to this long, and have it carry out what was in flight; the report has
    /// the longest pause
    #[arg(long, value_name = "TIME", value_parser = parse_wait, conflicts_with_all = ["no_poll", "codec_alone"])]
    pub reconnect: Option<Duration>,
    /// Measure no back end, but what the compressor, the checksum and one copy of each page take alone, on one core
    #[arg(long)]
    pub codec_alone: bool,
    /// The compressor to measure alone: lz4, zstd or zstd:LEVEL, and with "+dictionary" behind zstd one that learned from every
    /// second page
    #[arg(long, value_name = "COMPRESSOR", default_value = "lz4", value_parser = parse_compressor, conflicts_with = "sockets")]
    pub compressor: Compressor,
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
    /// Overwrite about half of the blocks and load and compare the others, in shuffled order
    Mixed,
    /// Load with one request in flight, and compare
    Latency,
    /// Discard all blocks, in shuffled order, and make part of them zeros, if the device can
    Discard,
}

impl Phase {
    const ALL: [Self; 6] =
        [Self::Store, Self::Load, Self::Overwrite, Self::Mixed, Self::Latency, Self::Discard];
}

impl BenchArgs {
    /// What one option alone doesn't show.
    pub(super) fn check(&self) -> Result<(), Error> {
        let mut seen = HashSet::new();
        if let Some(socket) = self.sockets.iter().find(|socket| !seen.insert(*socket)) {
            return Err(Error::Twice { socket: socket.clone() });
        }
        if self.no_poll && self.lanes() > 1 {
            return Err(Error::Sleep);
        }
        Ok(())
    }

    /// Queues of all VMs.
    pub(super) fn lanes(&self) -> usize {
        self.sockets.len() * usize::from(self.queues)
    }

    /// How answers are waited for.
    pub(super) fn wait(&self) -> Wait {
        if self.no_poll { Wait::Sleep } else { Wait::Poll }
    }

    /// Pages in a request.
    pub(super) fn block_pages(&self) -> usize {
        usize::try_from(self.block_size.0 / PAGE_SIZE_U64).unwrap_or(1)
    }

    /// The sockets in a few words.
    pub(super) fn sockets_named(&self) -> String {
        match &*self.sockets {
            [] => String::new(),
            [only] => only.display().to_string(),
            [first, others @ ..] => format!("{} and {} more", first.display(), others.len()),
        }
    }
}

fn parse_block(text: &str) -> Result<Bytes, String> {
    let block: Bytes = text.parse().map_err(|err: crate::ids::ParseBytesError| err.to_string())?;
    if block.0 == 0 || !block.0.is_multiple_of(PAGE_SIZE_U64) || block.0 > BLOCK_BYTES_MAX {
        return Err(format!("{text} is not a whole number of 4KiB pages between 4KiB and 1MiB"));
    }
    Ok(block)
}

fn parse_wait(text: &str) -> Result<Duration, String> {
    let wait = parse_duration(text).filter(|wait| !wait.is_zero());
    wait.ok_or_else(|| "must be a whole number and s, m, h or d, for example \"30s\"".to_owned())
}

fn parse_compressor(text: &str) -> Result<Compressor, String> {
    text.parse().map_err(|err: crate::store::codec::ParseCompressorError| err.to_string())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    pub(in crate::bench) fn parse(line: &str) -> Result<BenchArgs, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.bench)
    }

    #[test]
    fn the_defaults_are_those_of_the_yardsticks() {
        let args = parse("bench /run/x.sock").unwrap();
        assert_eq!((args.qd, args.queues, args.block_size, args.first_slot), (32, 1, Bytes(4096), 1));
        assert_eq!((args.phases.len(), args.no_poll, args.json), (6, false, false));
    }

    #[test]
    fn options_are_read_and_bad_ones_refused() {
        let args = parse("bench s t --corpus a b --qd 1 --block-size 128KiB --phases store,load").unwrap();
        assert_eq!((args.sockets.len(), args.corpus.len(), args.qd, args.block_size.0), (2, 2, 1, 128 << 10));
        assert_eq!(args.phases, [Phase::Store, Phase::Load]);
        for bad in [
            "s --qd 0",
            "s --qd 4096",
            "s --queues 0",
            "s --queues 65",
            "s --block-size 5000",
            "s --block-size 2MiB",
            "s --pages 0",
            "s --phases x",
            "s --reconnect 30",
            "s --reconnect 0s",
            "s --reconnect 30s --no-poll",
            "s --compressor lz4",
            "s --codec-alone",
            "--qd 1",
        ] {
            assert!(parse(&format!("bench {bad}")).is_err(), "{bad}");
        }
        for compressor in ["zstd:3", "zstd:9+dictionary"] {
            assert!(parse(&format!("bench --codec-alone --compressor {compressor}")).is_ok());
        }
    }

    #[test]
    fn what_makes_no_sense_together_is_refused() {
        let check = |line| parse(line).unwrap().check();
        assert!(matches!(check("bench a b a"), Err(Error::Twice { socket }) if socket.as_os_str() == "a"));
        assert!(matches!(check("bench a b --no-poll"), Err(Error::Sleep)));
        assert!(matches!(check("bench a --queues 2 --no-poll"), Err(Error::Sleep)));
        assert!(check("bench a --no-poll").is_ok() && check("bench a b --queues 2").is_ok());
    }
}
