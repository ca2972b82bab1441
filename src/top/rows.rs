//! From one status after the other to what is shown of each VM: rates between two of them, and what the last one says.
//! Pure: knows no terminal and no clock.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use serde::Serialize;

use crate::control::api::{Bucket, Histogram, LatencyBySource, Status, VmStatus};
use crate::page::PAGE_SIZE_U64;

/// Intervals that a sparkline shows at most.
pub(super) const TRAIL_MAX: usize = 60;

/// A VM as it is shown. What is not known yet, or has no value, is null.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Its name.
    pub vm: String,
    /// The state that its device is in.
    pub state: &'static str,
    /// Pages written in a second.
    pub stores_per_second: Option<f64>,
    /// Pages read in a second.
    pub loads_per_second: Option<f64>,
    /// Pages of these that came from the writeback file.
    pub file_loads_per_second: Option<f64>,
    /// How far its pages shrink that are compressed.
    pub ratio: Option<f64>,
    /// Its pages in memory, as large as the guest knows them.
    pub stored_bytes: u64,
    /// What they and those in the file would take in memory, less what they and all that is kept beside them take.
    pub saved_bytes: u64,
    /// The share of its limit that it uses.
    pub limit_used: Option<f64>,
    /// What 99 % of its loads took at most, to a factor of two, in nanoseconds.
    pub load_p99_ns: Option<u64>,
    /// The share of time that its guest waited for loads, all its processors together: may be above 1.
    pub pressure: Option<f64>,
    /// Stores that wait for room now.
    pub waiting_stores: u64,
    /// What its guest has of memory, if its balloon is known.
    pub memory_bytes: Option<u64>,
    /// What it should have, if it is squeezed; what it would have, if it is only observed.
    pub target_bytes: Option<u64>,
    /// Why.
    pub reason: Option<String>,
    /// Pages written and read in a second, in each of the last intervals, the newest last.
    #[serde(skip)]
    pub trail: Vec<u64>,
}

/// What was seen so far.
#[derive(Debug, Default)]
pub(super) struct History {
    last: Option<(Duration, Status)>,
    rows: Vec<Row>,
    trails: BTreeMap<String, VecDeque<u64>>,
}

impl History {
    /// Adds the status as it was `at`, a time since whenever.
    pub(super) fn add(&mut self, at: Duration, status: Status) {
        let before = self.last.take().filter(|(_, before)| is_same_daemon(before, &status));
        let seconds = before.as_ref().map(|(then, _)| at.saturating_sub(*then).as_secs_f64());
        self.rows.clear();
        for vm in &status.vms {
            let earlier =
                before.as_ref().and_then(|(_, before)| before.vms.iter().find(|old| old.name == vm.name));
            let mut row = row(vm, earlier.zip(seconds.filter(|seconds| *seconds > 0.0)));
            let trail = self.trails.entry(vm.name.clone()).or_default();
            if let Some((stores, loads)) = row.stores_per_second.zip(row.loads_per_second) {
                trail.push_back(rounded(stores + loads));
                trail.drain(..trail.len().saturating_sub(TRAIL_MAX));
            }
            row.trail = trail.iter().copied().collect();
            self.rows.push(row);
        }
        self.trails.retain(|name, _| status.vms.iter().any(|vm| vm.name == *name));
        self.last = Some((at, status));
    }

    /// The VMs in the order of the status.
    pub(super) fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The last status.
    pub(super) fn status(&self) -> Option<&Status> {
        self.last.as_ref().map(|(_, status)| status)
    }
}

/// Another daemon counts from nothing.
fn is_same_daemon(before: &Status, now: &Status) -> bool {
    before.start_time_seconds == now.start_time_seconds
}

fn row(vm: &VmStatus, earlier: Option<(&VmStatus, f64)>) -> Row {
    // A VM that was cleared counts from nothing as well.
    let rate = |of: fn(&VmStatus) -> u64| {
        let (before, seconds) = earlier?;
        of(vm).checked_sub(of(before)).map(|count| count as f64 / seconds)
    };
    let stored_bytes = vm.stored_pages.saturating_mul(PAGE_SIZE_U64);
    let compressed_bytes = vm.stored_pages.saturating_sub(vm.same_filled_pages).saturating_mul(PAGE_SIZE_U64);
    let share = |part: u64, whole: u64| (whole > 0).then(|| part as f64 / whole as f64);
    Row {
        vm: vm.name.clone(),
        state: vm.state.as_str(),
        stores_per_second: rate(|vm| vm.stores),
        loads_per_second: rate(|vm| vm.loads),
        file_loads_per_second: rate(|vm| vm.counters.loaded_from_file),
        ratio: share(compressed_bytes, vm.payload_bytes),
        stored_bytes,
        saved_bytes: vm.saved_bytes(),
        limit_used: share(vm.pool_bytes, vm.limit_bytes),
        load_p99_ns: earlier.and_then(|(before, _)| p99(&loads_between(before, vm))),
        pressure: rate(loads_ns).map(|ns| ns / 1e9),
        waiting_stores: vm.waiting_stores,
        memory_bytes: vm.balloon.as_ref().and_then(|balloon| balloon.actual_bytes),
        target_bytes: vm
            .balloon
            .as_ref()
            .filter(|balloon| balloon.reachable)
            .map(|balloon| balloon.target_bytes),
        reason: vm.balloon.as_ref().map(|balloon| match balloon.mode.as_str() {
            "observe" => format!("would be {}", balloon.reason),
            _ => balloon.reason.clone(),
        }),
        trail: Vec::new(),
    }
}

/// How long all loads took together, in nanoseconds.
fn loads_ns(vm: &VmStatus) -> u64 {
    let LatencyBySource { same_filled, pool, file } = &vm.load_latency_ns;
    same_filled.sum.saturating_add(pool.sum).saturating_add(file.sum)
}

/// How many loads between two moments ended in which bucket, by the bucket's end.
fn loads_between(before: &VmStatus, now: &VmStatus) -> BTreeMap<u64, u64> {
    let all = |LatencyBySource { same_filled, pool, file }: &LatencyBySource| {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        for Histogram { buckets, .. } in [same_filled, pool, file] {
            buckets.iter().for_each(|Bucket { le, count }| *counts.entry(*le).or_default() += count);
        }
        counts
    };
    let (before, mut counts) = (all(&before.load_latency_ns), all(&now.load_latency_ns));
    for (le, count) in &mut counts {
        *count = count.saturating_sub(before.get(le).copied().unwrap_or(0));
    }
    counts
}

/// The end of the bucket that 99 % are up to.
fn p99(counts: &BTreeMap<u64, u64>) -> Option<u64> {
    let total: u64 = counts.values().sum();
    let wanted = total - total / 100;
    let mut seen = 0;
    let reached = counts.iter().find(|(_, count)| {
        seen += **count;
        seen >= wanted
    });
    reached.filter(|_| total > 0).map(|(le, _)| *le)
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is neither negative nor that large"
)]
fn rounded(rate: f64) -> u64 {
    rate.round() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Counters;

    fn loads(buckets: &[(u64, u64)]) -> LatencyBySource {
        let buckets: Vec<_> = buckets.iter().map(|(le, count)| Bucket { le: *le, count: *count }).collect();
        let sum = buckets.iter().map(|bucket: &Bucket| bucket.le * bucket.count).sum();
        LatencyBySource { pool: Histogram { sum, buckets }, ..LatencyBySource::default() }
    }

    fn status(start_time_seconds: u64, stores: u64, loads: LatencyBySource) -> Status {
        let counters = Counters { loaded_from_file: stores / 10, ..Counters::default() };
        let count = loads.pool.count();
        let vm = VmStatus {
            name: "web1".to_owned(),
            stores,
            loads: count,
            counters,
            load_latency_ns: loads,
            stored_pages: 11,
            same_filled_pages: 1,
            payload_bytes: 10_240,
            pool_bytes: 20_480,
            file_pages: 3,
            metadata_bytes: 1000,
            limit_bytes: 40_960,
            ..VmStatus::default()
        };
        Status { start_time_seconds, vms: vec![vm], ..Status::default() }
    }

    #[test]
    fn rates_are_between_two_looks_at_the_same_daemon() {
        let mut history = History::default();
        history.add(Duration::from_secs(10), status(1, 100, loads(&[(512, 1000)])));
        let first = history.rows()[0].clone();
        assert_eq!((first.stores_per_second, first.load_p99_ns), (None, None));
        assert_eq!((first.ratio, first.limit_used), (Some(4.0), Some(0.5)));
        assert_eq!((first.stored_bytes, first.saved_bytes), (45_056, 14 * 4096 - 21_480));
        // Of 200 loads since, two may take longer than what is shown; the thousand before are history.
        let later = loads(&[(512, 1000), (1024, 198), (4096, 2)]);
        history.add(Duration::from_secs(12), status(1, 300, later));
        let row = history.rows()[0].clone();
        assert_eq!((row.stores_per_second, row.loads_per_second), (Some(100.0), Some(100.0)));
        assert_eq!((row.file_loads_per_second, row.load_p99_ns), (Some(10.0), Some(1024)));
        let took_seconds = (198.0 * 1024.0 + 2.0 * 4096.0) / 1e9;
        assert_eq!((row.pressure, row.memory_bytes), (Some(took_seconds / 2.0), None));
        assert_eq!(row.trail, [200]);
        // Started again, it counts from nothing; what was seen before stays to be seen.
        history.add(Duration::from_secs(13), status(2, 7, LatencyBySource::default()));
        let row = history.rows()[0].clone();
        assert_eq!((row.stores_per_second, row.load_p99_ns, row.trail), (None, None, vec![200]));
        history.add(Duration::from_secs(14), status(2, 3, LatencyBySource::default()));
        assert_eq!(history.rows()[0].stores_per_second, None, "a number that shrank is no rate");
    }

    #[test]
    fn a_trail_is_as_long_as_a_sparkline_and_ends_with_its_vm() {
        let mut history = History::default();
        for second in 0..100 {
            history.add(Duration::from_secs(second), status(1, second * second, LatencyBySource::default()));
        }
        let trail = history.rows()[0].trail.clone();
        assert_eq!((trail.len(), trail.last()), (TRAIL_MAX, Some(&(99 * 99 - 98 * 98))));
        history.add(Duration::from_secs(101), Status { start_time_seconds: 1, ..Status::default() });
        assert!(history.rows().is_empty() && history.trails.is_empty());
        assert_eq!(p99(&BTreeMap::new()), None);
    }
}
