//! The report: a status, and beside each VM what the survey of its pages found. One is made at a time, on the thread of
//! whoever asks; it takes no lock that guests wait for but to copy out the pages of the sample, and its cost is bounded.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use super::daemon::Daemon;
use super::served::has_header;
use super::status;
use crate::control::api::{
    AgeBucket, CompressorTrial, LimitFit, Need, Report, Reporting, SAMPLE_PAGES, SAMPLE_PAGES_DEFAULT,
    Sample, Savings, SetError, Survey, VmReport, VmState, VmStatus, WorkingSet,
};
use crate::ids::Slot;
use crate::page::PAGE_SIZE_U64;
use crate::store::codec::Compressor;
use crate::store::lru::Age;
use crate::store::vm::VmStore;
use crate::survey::{self, Ages, BOUNDS_SECONDS, Costs, Fit, Pages, Shared};

/// Pages of all VMs together that a report compresses again: some seconds of one processor's work.
const ALL_SAMPLE_PAGES_MAX: usize = 32_768;
/// How long that may take on a host that is busy with other things; those who ask wait for a minute.
const SAMPLING_MAX: Duration = Duration::from_secs(20);

/// Makes one.
pub(super) fn make(daemon: &Daemon, reporting: &Reporting) -> Result<Report, SetError> {
    let sample_pages = reporting.sample_pages.unwrap_or(SAMPLE_PAGES_DEFAULT);
    if !SAMPLE_PAGES.contains(&sample_pages) {
        let (start, end) = (SAMPLE_PAGES.start(), SAMPLE_PAGES.end());
        let message = format!("sample_pages = {sample_pages}: must be from {start} to {end}");
        return Err(SetError::Invalid { message });
    }
    let Some(_reporting) = daemon.reporting.try_lock() else {
        let message = "another report is being made: ask again in some seconds".to_owned();
        return Err(SetError::Conflict { message });
    };
    let shared = shared(daemon);
    let now = status::of(daemon);
    let mut vms = now.vms;
    if let Some(name) = &reporting.vm {
        vms.retain(|vm| vm.name == *name);
        if vms.is_empty() {
            return Err(SetError::Unknown { name: name.clone(), known: daemon.known() });
        }
    }
    let pools = &daemon.store.shared().pools;
    let (compressor, cold) = (pools.current().compressor, pools.cold().map(|pool| pool.compressor));
    let tried = survey::compressors(cold.into_iter().chain([compressor]));
    let sample_max = (ALL_SAMPLE_PAGES_MAX / vms.len().max(1)).max(1).min(sample_pages as usize);
    let surveyor = Surveyor { daemon, shared, tried, sample_max, end: Instant::now() + SAMPLING_MAX };
    let time_seconds = UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs());
    Ok(Report {
        version: now.version,
        time_seconds,
        counted_seconds: time_seconds.saturating_sub(daemon.start_time_seconds),
        compressor: compressor.to_string(),
        cold_compressor: cold.map(|cold| cold.to_string()),
        vms: vms.into_iter().map(|vm| surveyor.report(vm)).collect(),
    })
}

/// What all VMs share.
fn shared(daemon: &Daemon) -> Shared {
    let (arena, vms) = (daemon.store.arena(), daemon.store.in_use());
    let process_bytes: u64 = vms.iter().map(|vm| vm.process_bytes()).sum();
    let arena_metadata_bytes = arena.metadata_bytes();
    // What is counted as metadata is not counted twice.
    let counted_bytes = process_bytes + arena_metadata_bytes;
    Shared {
        arena_bytes: arena.used_bytes(),
        charged_bytes: arena.charged_bytes_total(),
        arena_metadata_bytes,
        daemon_bytes: private_bytes().unwrap_or(0).saturating_sub(counted_bytes),
        vms: vms.len() as u64,
    }
}

/// Memory of the process that no other has, swapped out or not.
fn private_bytes() -> Option<u64> {
    private_bytes_of(&fs::read_to_string("/proc/self/status").ok()?)
}

fn private_bytes_of(status: &str) -> Option<u64> {
    let kib = |name: &str| {
        let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        value.trim().strip_suffix("kB")?.trim_end().parse::<u64>().ok()
    };
    Some((kib("RssAnon")? + kib("VmSwap")?) << 10)
}

/// Who goes from VM to VM.
struct Surveyor<'a> {
    daemon: &'a Daemon,
    shared: Shared,
    /// The compressors that are tried.
    tried: Vec<Compressor>,
    /// Pages of each VM's sample.
    sample_max: usize,
    /// When there is no more time for samples.
    end: Instant,
}

impl Surveyor<'_> {
    fn report(&self, vm: VmStatus) -> VmReport {
        let in_use = matches!(vm.state, VmState::Ready | VmState::Unconfigured);
        let pages = in_use.then(|| self.daemon.store.usable(&vm.name)).flatten();
        let survey = pages.map(|pages| self.survey(&vm, &pages));
        VmReport { name: vm.name, state: vm.state, message: vm.message, survey }
    }

    fn survey(&self, vm: &VmStatus, pages: &Arc<VmStore>) -> Survey {
        let seed = RandomState::new().hash_one(&vm.name);
        let arena = self.daemon.store.arena();
        let walked = survey::walk(pages, arena, Age::now(), self.sample_max, seed);
        let total = walked.ages.total();
        // As the status has it, with which it is compared.
        let pool_bytes = pages.accounting().held.pool_bytes;
        let costs = Costs {
            memory_pages: total.memory_pages,
            file_pages: total.file_pages,
            charged_bytes: pool_bytes,
            table_bytes: pages.metadata_bytes(),
        };
        Survey {
            stored_pages: total.memory_pages,
            same_filled_pages: total.same_filled_pages,
            guest_pages: total.pages().saturating_sub(has_header(pages).into()),
            duplicates: vm.duplicates,
            zombie_pages: vm.zombie_pages,
            file_pages: total.file_pages,
            pool_bytes,
            oldest_seconds: walked.ages.oldest.map(|oldest| oldest.as_secs()),
            ages: ages(&walked.ages),
            working_set: working_set(&walked.ages),
            stores: vm.stores,
            loads: vm.loads,
            loads_from_file: vm.counters.loaded_from_file,
            sample: self.sample(vm, pages, &walked.sample, pool_bytes),
            savings: savings(&costs, &self.shared),
            need: self.need(vm, &walked.ages),
        }
    }

    fn sample(&self, vm: &VmStatus, pages: &VmStore, slots: &[Slot], all_bytes: u64) -> Sample {
        let in_time = || Instant::now() < self.end;
        let found = survey::sample(pages, self.daemon.store.arena(), slots, &self.tried, in_time);
        for bad in &found.bad {
            if pages.note_bad(bad.slot) {
                tracing::error!(vm = vm.name, "the page in slot {} is bad: {}", bad.slot, bad.reason);
            }
        }
        let estimated = |bytes: u64| {
            let all = u128::from(all_bytes) * u128::from(bytes);
            u64::try_from(all.checked_div(found.pool_bytes.into()).unwrap_or(0)).unwrap_or(u64::MAX)
        };
        let trials = found.trials.iter().filter(|_| found.pages > 0);
        Sample {
            pages: found.pages,
            pool_bytes: found.pool_bytes,
            equal_pages: found.equal_pages,
            bad_pages: found.bad.len() as u64,
            compressors: trials
                .map(|trial| CompressorTrial {
                    compressor: trial.compressor.to_string(),
                    pool_bytes: trial.pool_bytes,
                    incompressible_pages: trial.incompressible_pages,
                    estimated_pool_bytes: estimated(trial.pool_bytes),
                    compress_ns_p50: trial.compress_ns_p50,
                    decompress_ns_p50: trial.decompress_ns_p50,
                })
                .collect(),
        }
    }

    fn need(&self, vm: &VmStatus, ages: &Ages) -> Need {
        let writeback = vm.writeback && self.daemon.store.shared().file.is_some();
        let need = survey::Need::of(ages, writeback);
        Need {
            within_seconds: need.within_seconds,
            used_bytes: need.used_bytes,
            limit_bytes: need.limit_bytes,
            rest_pages: need.rest_pages,
            rest_file_bytes: need.rest_file_bytes,
            current_limit_bytes: Some(vm.limit_bytes).filter(|bytes| *bytes < u64::MAX),
            fit: match need.fit(vm.limit_bytes) {
                Fit::Below => LimitFit::Below,
                Fit::Fits => LimitFit::Fits,
                Fit::FarAbove => LimitFit::FarAbove,
            },
            writeback,
        }
    }
}

/// The bounds, and none behind the last.
fn bounds() -> impl Iterator<Item = Option<u64>> {
    BOUNDS_SECONDS.into_iter().map(Some).chain([None])
}

fn ages(ages: &Ages) -> Vec<AgeBucket> {
    let bucket = |(below_seconds, pages): (Option<u64>, Pages)| AgeBucket {
        below_seconds,
        stored_pages: pages.memory_pages,
        same_filled_pages: pages.same_filled_pages,
        file_pages: pages.file_pages,
        pool_bytes: pages.pool_bytes,
    };
    bounds().zip(ages.buckets).map(bucket).collect()
}

fn working_set(ages: &Ages) -> Vec<WorkingSet> {
    let point = |within_seconds: Option<u64>| {
        let pages = ages.within(within_seconds.unwrap_or(u64::MAX));
        let used_bytes = pages.pages().saturating_mul(PAGE_SIZE_U64);
        WorkingSet { within_seconds, used_bytes, pool_bytes: pages.all_pool_bytes() }
    };
    bounds().map(point).collect()
}

fn savings(costs: &Costs, shared: &Shared) -> Savings {
    let savings = survey::Savings::of(costs, shared);
    Savings {
        stored_bytes: savings.stored_bytes,
        file_bytes: savings.file_bytes,
        arena_bytes: savings.arena_bytes,
        metadata_bytes: savings.metadata_bytes,
        daemon_bytes: savings.daemon_bytes,
        saved_bytes: savings.saved_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Layers};
    use crate::control::socket::Sockets;

    #[test]
    fn one_is_made_at_a_time_and_a_wrong_wish_is_refused() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n[pool]\npressure = false\n[[vm]]\nname = \"a\"\nsize = \"1MiB\"\n",
            dir.path().join("state"),
            dir.path().join("run")
        );
        let layers = Layers::load(Config::parse(&text, 1 << 30).unwrap()).unwrap();
        let daemon = Daemon::open(layers, Sockets::of_group(0)).unwrap();
        let ask = |vm: Option<&str>, sample_pages| {
            let reporting = Reporting { vm: vm.map(str::to_owned), sample_pages };
            make(&daemon, &reporting).map_err(|err| err.to_string())
        };
        assert_eq!(ask(Some("a"), Some(8192)).unwrap().vms.len(), 1);
        assert_eq!(ask(None, Some(8193)).unwrap_err(), "sample_pages = 8193: must be from 0 to 8192");
        assert_eq!(ask(Some("b"), None).unwrap_err(), "there is no VM \"b\"; the VMs are: a");
        let other = daemon.reporting.lock();
        assert!(ask(None, None).unwrap_err().contains("ask again"));
        drop(other);
        assert!(ask(None, None).is_ok());
    }

    #[test]
    fn the_memory_of_the_process_is_read() {
        let text = "Name:\tballast\nVmRSS:\t   900 kB\nRssAnon:\t    7168 kB\nVmSwap:\t      1024 kB\n";
        assert_eq!(private_bytes_of(text), Some(8 << 20));
        assert_eq!(private_bytes_of("RssAnon: 7 kB\n"), None);
        assert_eq!(private_bytes_of("RssAnon: 7 MB\nVmSwap: 1 kB\n"), None);
        assert!(private_bytes().is_some_and(|bytes| bytes > 1 << 16));
    }
}
