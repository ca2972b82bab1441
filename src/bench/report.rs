//! What a run found, as JSON (the names here are the schema) and as text.

use std::fmt;

use serde::Serialize;

use super::drive::Figures;
use super::source::Source;
use super::{BenchArgs, Span};
use crate::frontend::BlkConfig;
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

/// A run's findings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The back end's socket.
    pub socket: String,
    /// The name that the device gives itself, if it does.
    pub device_id: Option<String>,
    /// Pages on the device.
    pub device_pages: u64,
    /// Pages that were used.
    pub pages: u64,
    /// The slot of the first.
    pub first_slot: u64,
    /// Bytes of each request.
    pub block_bytes: u64,
    /// Requests in flight.
    pub queue_depth: u16,
    /// Whether the front end polled.
    pub polling: bool,
    /// Whether the pages were made up.
    pub synthetic: bool,
    /// Pages before they repeat.
    pub corpus_pages: u64,
    /// The phases that ran.
    pub phases: Phases,
    /// Pages discarded.
    pub discarded_pages: u64,
    /// Pages that were made zeros, and compared.
    pub zeroed_pages: u64,
    /// Bytes of the VM's pages in memory for each byte of the pool that they take; null when no daemon says that.
    pub compression_ratio: Option<f64>,
    /// Pages with at least one wrong byte.
    pub mismatched_pages: u64,
    /// Requests not answered with OK.
    pub failed_requests: u64,
}

/// The figures of each phase that ran.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Phases {
    /// Storing all pages in order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub store: Option<Figures>,
    /// Loading all in shuffled order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<Figures>,
    /// Overwriting half of them in shuffled order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overwrite: Option<Figures>,
    /// Loading all after that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_overwritten: Option<Figures>,
    /// Loading with one request in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_depth_1: Option<Figures>,
    /// Loading what was discarded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_discarded: Option<Figures>,
}

impl Report {
    pub(super) fn new(
        args: &BenchArgs,
        source: &Source,
        span: &Span,
        config: &BlkConfig,
        device_id: Option<String>,
    ) -> Self {
        Self {
            socket: args.socket.display().to_string(),
            device_id,
            device_pages: config.pages(),
            pages: span.pages(),
            first_slot: span.first_slot,
            block_bytes: span.block_pages as u64 * PAGE_SIZE_U64,
            queue_depth: args.qd,
            polling: !args.no_poll,
            synthetic: source.is_synthetic(),
            corpus_pages: source.distinct(),
            phases: Phases::default(),
            discarded_pages: 0,
            zeroed_pages: 0,
            compression_ratio: None,
            mismatched_pages: 0,
            failed_requests: 0,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = if self.polling { "polling" } else { "sleeping" };
        let origin = if self.synthetic { "synthetic" } else { "corpus" };
        writeln!(
            f,
            "{} {:?}: {} pages ({} {origin} pages cycled), {} requests, {} in flight, {waiting}",
            self.socket,
            self.device_id.as_deref().unwrap_or(""),
            self.pages,
            self.corpus_pages,
            Bytes(self.block_bytes),
            self.queue_depth
        )?;
        writeln!(
            f,
            "{:<18}{:>10}{:>9}{:>10}{:>10}{:>10}{:>10}{:>11}",
            "", "pages/s", "MiB/s", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "max µs"
        )?;
        let phases = &self.phases;
        for (name, figures) in [
            ("store", &phases.store),
            ("load", &phases.load),
            ("overwrite", &phases.overwrite),
            ("load overwritten", &phases.load_overwritten),
            ("load, depth 1", &phases.load_depth_1),
            ("load discarded", &phases.load_discarded),
        ] {
            let Some(x) = figures else { continue };
            writeln!(
                f,
                "{name:<18}{:>10.0}{:>9.0}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>11.1}",
                x.pages_per_second,
                x.mib_per_second,
                x.latency_us_p50,
                x.latency_us_p90,
                x.latency_us_p99,
                x.latency_us_p999,
                x.latency_us_max
            )?;
        }
        match self.compression_ratio {
            Some(ratio) => writeln!(f, "compression ratio {ratio:.2}")?,
            None => writeln!(f, "compression ratio unknown: no Ballast daemon says what these pages take")?,
        }
        writeln!(f, "discarded {} pages, zeroed {}", self.discarded_pages, self.zeroed_pages)?;
        writeln!(f, "mismatched pages {}, failed requests {}", self.mismatched_pages, self.failed_requests)
    }
}
