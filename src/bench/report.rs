//! What a run found, as JSON (the names here are the schema) and as text.

use std::fmt;

use serde::Serialize;

use super::drive::Figures;
use super::lanes::Pauses;
use super::source::Source;
use super::{BenchArgs, Span};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

/// A run's findings.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// The back end's socket; of several VMs, the first one's.
    pub socket: String,
    /// The name that the device at this socket gives itself, if it does.
    pub device_id: Option<String>,
    /// VMs that the load is spread over, one socket each.
    pub vms: u64,
    /// Queues of each.
    pub queues: u16,
    /// Pages on each device; of several, on the smallest.
    pub device_pages: u64,
    /// Pages that were used, of all devices together.
    pub pages: u64,
    /// The slot of the first, on each device.
    pub first_slot: u64,
    /// Bytes of each request.
    pub block_bytes: u64,
    /// Requests in flight, in all queues together.
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
    /// When back ends went and were connected to again.
    pub pauses: Pauses,
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
    /// Overwriting some blocks while others are loaded, about as many, in shuffled order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixed: Option<Figures>,
    /// Loading with one request in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_depth_1: Option<Figures>,
    /// Discarding all in shuffled order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<Figures>,
    /// Loading what was discarded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load_discarded: Option<Figures>,
}

impl Report {
    pub(super) fn new(
        args: &BenchArgs,
        source: &Source,
        span: &Span,
        device_pages: u64,
        device_id: Option<String>,
    ) -> Self {
        Self {
            socket: args.sockets.first().map_or_else(String::new, |socket| socket.display().to_string()),
            device_id,
            vms: span.vms,
            queues: args.queues,
            device_pages,
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
            pauses: Pauses::default(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = if self.polling { "polling" } else { "sleeping" };
        let origin = if self.synthetic { "synthetic" } else { "corpus" };
        writeln!(
            f,
            "{}{} {:?}: {} pages ({} {origin} pages cycled), {} requests, {} in flight in {}, {waiting}",
            self.socket,
            if self.vms > 1 { format!(" and {} more", self.vms - 1) } else { String::new() },
            self.device_id.as_deref().unwrap_or(""),
            self.pages,
            self.corpus_pages,
            Bytes(self.block_bytes),
            self.queue_depth,
            match self.vms * u64::from(self.queues) {
                1 => "one queue".to_owned(),
                queues => format!("{queues} queues"),
            }
        )?;
        writeln!(
            f,
            "{:<18}{:>10}{:>9}{:>10}{:>10}{:>10}{:>10}{:>11}{:>8}",
            "", "pages/s", "MiB/s", "p50 µs", "p90 µs", "p99 µs", "p99.9 µs", "max µs", "idle %"
        )?;
        let phases = &self.phases;
        for (name, figures) in [
            ("store", &phases.store),
            ("load", &phases.load),
            ("overwrite", &phases.overwrite),
            ("load overwritten", &phases.load_overwritten),
            ("mixed", &phases.mixed),
            ("load, depth 1", &phases.load_depth_1),
            ("discard", &phases.discard),
            ("load discarded", &phases.load_discarded),
        ] {
            let Some(x) = figures else { continue };
            writeln!(
                f,
                "{name:<18}{:>10.0}{:>9.0}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>11.1}{:>8.0}",
                x.pages_per_second,
                x.mib_per_second,
                x.latency_us_p50,
                x.latency_us_p90,
                x.latency_us_p99,
                x.latency_us_p999,
                x.latency_us_max,
                x.front_end_idle_percent
            )?;
        }
        match self.compression_ratio {
            Some(ratio) => writeln!(f, "compression ratio {ratio:.2}")?,
            None => writeln!(f, "compression ratio unknown: no Ballast daemon says what these pages take")?,
        }
        if self.pauses.count > 0 {
            let Pauses { count, longest_ms } = self.pauses;
            writeln!(f, "connected again {count} times; longest pause {longest_ms:.0} ms")?;
        }
        writeln!(f, "discarded {} pages, zeroed {}", self.discarded_pages, self.zeroed_pages)?;
        writeln!(f, "mismatched pages {}, failed requests {}", self.mismatched_pages, self.failed_requests)
    }
}
