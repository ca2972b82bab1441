//! Reading the configuration again. The whole of it is checked first, what is remembered laid over it; a file that is
//! refused changes nothing. Then each key that is another is gone by if a running daemon can, and otherwise said to wait
//! for its next start. A VM that has left the file goes only if nobody misses it.

use toml::Value;

use super::daemon::{Daemon, Orders};
use super::served::{Served, guest_pages};
use crate::config::{Config, KeyValue, VM_KEYS, VmConfig};
use crate::control::api::{Change, ChangeOutcome, ReloadReport, Reloading, SetError};

/// Reads the file that the daemon was started with, and goes by it.
pub(super) fn reload(daemon: &Daemon, reloading: Reloading) -> Result<ReloadReport, SetError> {
    let invalid = |message| SetError::Invalid { message };
    let Some(path) = daemon.config.path.clone() else {
        return Err(invalid("the daemon was not started with a configuration file: start it with `ballast serve --config FILE`, or change VMs with `ballast vm set`".to_owned()));
    };
    let mut orders = daemon.orders.lock();
    let refused =
        |error: crate::config::ConfigError| invalid(format!("nothing was changed: {}", error.chain()));
    let mut next = orders.layers.clone();
    next.file = Config::load(&path).map_err(refused)?;
    // Removed until the next start or reload.
    next.runtime.removed.clear();
    let wanted = next.effective_within_pool().map_err(refused)?;
    let mut reloader = Reloader { daemon, check: reloading.check, changes: Vec::new() };
    reloader.settings(&mut orders, &wanted);
    reloader.vms(&wanted);
    let changes = reloader.changes;
    if !reloading.check {
        orders.layers = next;
        let place = |name: &str| wanted.vms.iter().position(|vm| vm.name == name).unwrap_or(usize::MAX);
        daemon.change_served(|all| all.sort_by_key(|vm| place(&vm.config.name)));
        tell(&changes);
    }
    Ok(ReloadReport { path: path.display().to_string(), check: reloading.check, changes })
}

fn tell(changes: &[Change]) {
    let shown = |value: &Option<_>| value.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string);
    for change in changes {
        let (old, new): (String, String) = (shown(&change.old), shown(&change.new));
        let why = change.why.as_deref().unwrap_or_default();
        // `vm.NAME` or `vm.NAME.KEY`, and no key has a dot in it while a name may.
        let vm = change.key.strip_prefix("vm.").map(|rest| match rest.rsplit_once('.') {
            Some((name, key)) if VM_KEYS.contains(&key) => name,
            _ => rest,
        });
        match change.outcome {
            ChangeOutcome::Now => {
                tracing::info!(vm, key = change.key, old, new, why, "the configuration changed")
            }
            outcome => tracing::warn!(
                vm,
                key = change.key,
                old,
                new,
                why,
                "the configuration changed, and what the daemon goes by did not: {}",
                outcome.as_str()
            ),
        }
    }
    tracing::info!(changes = changes.len(), "the configuration was read again");
}

/// What becomes of a key, and why where that isn't plain.
type Verdict = (ChangeOutcome, Option<String>);

fn now() -> Verdict {
    (ChangeOutcome::Now, None)
}

fn now_but(why: &str) -> Verdict {
    (ChangeOutcome::Now, Some(why.to_owned()))
}

fn restart(why: &str) -> Verdict {
    (ChangeOutcome::Restart, Some(why.to_owned()))
}

/// What a key that is not a VM's comes to while the daemon runs.
fn verdict(key: &str, same_file: bool) -> Verdict {
    match key {
        "scrub" | "pool.max" | "pool.compressor" | "pool.accept_threshold" | "balloon.budget" => now(),
        "pool.cold_compressor" | "pool.cold_after" | "pool.cold_cpu" => now(),
        "pool.deduplicate" => now_but("for pages that get cold from now on"),
        "pool.store_deadline_ms" => now_but("for VMMs that connect from now on"),
        "writeback.idle" | "writeback.daily_limit" if same_file => now(),
        "state_dir" | "lock_memory" => restart("the pages are where and as they are"),
        "runtime_dir" | "socket_group" => restart("VMMs are connected to the sockets that there are"),
        "control_group" => restart("groups are looked up before the sandbox"),
        "vms_file" => restart("what is remembered stands in the one that there is"),
        "workers" | "poll_us" => restart("the workers are running"),
        "metrics" => restart("its socket is made before the sandbox"),
        "sandbox" => restart("what was given up is not to be had back"),
        "balloon.interval" => restart("the policy's times follow it"),
        "pool.pressure" => restart("watching for it takes a right that was given up"),
        _ => restart("pages may be in the file that is open"),
    }
}

struct Reloader<'a> {
    daemon: &'a Daemon,
    check: bool,
    changes: Vec<Change>,
}

impl Reloader<'_> {
    fn note(&mut self, key: String, old: Option<Value>, new: Option<Value>, (outcome, why): Verdict) {
        let (old, new) = (old.map(Into::into), new.map(Into::into));
        self.changes.push(Change { key, old, new, outcome, why });
    }

    /// All that is no VM's.
    fn settings(&mut self, orders: &mut Orders, wanted: &Config) {
        let path = |config: &Config| config.writeback.as_ref().map(|file| file.path.clone());
        let same_file = path(&orders.running) == path(wanted) && self.daemon.store.shared().file.is_some();
        for (key, old, new) in differences(orders.running.keys(), wanted.keys()) {
            let mut verdict = verdict(key, same_file);
            if verdict.0 == ChangeOutcome::Now
                && !self.check
                && let Err(err) = self.go_by(key, &mut orders.running, wanted)
            {
                verdict = (ChangeOutcome::Failed, Some(err.to_string()));
            }
            self.note(key.to_owned(), old, new, verdict);
        }
    }

    /// Goes by a key from now on.
    fn go_by(&self, key: &str, running: &mut Config, wanted: &Config) -> Result<(), SetError> {
        let daemon = self.daemon;
        let shared = daemon.store.shared();
        let (pool, to) = (&mut running.pool, &wanted.pool);
        match key {
            "scrub" => {
                daemon.scrubber.set_period(wanted.scrub);
                running.scrub = wanted.scrub;
            }
            "pool.max" => {
                shared.arena.set_max_bytes(to.max_bytes);
                pool.max_bytes = to.max_bytes;
                shared.bell.ring();
                daemon.device.wake_waiting();
            }
            "pool.compressor" => {
                daemon.set_compressor(to.compressor)?;
                pool.compressor = to.compressor;
            }
            "pool.cold_compressor" => {
                daemon.set_cold_compressor(to.cold_compressor)?;
                pool.cold_compressor = to.cold_compressor;
            }
            "pool.cold_after" | "pool.cold_cpu" => {
                daemon.shrinker.set_cold(to.cold);
                pool.cold = to.cold;
            }
            "pool.deduplicate" => {
                shared.set_deduplicates(to.deduplicate);
                pool.deduplicate = to.deduplicate;
            }
            "pool.accept_threshold" => {
                shared.set_accept_percent(to.accept_threshold_percent);
                pool.accept_threshold_percent = to.accept_threshold_percent;
            }
            "pool.store_deadline_ms" => {
                daemon.device.set_store_deadline(to.store_deadline);
                pool.store_deadline = to.store_deadline;
            }
            "balloon.budget" => {
                daemon.balloons.set_budget(wanted.balloon_budget_bytes);
                running.balloon_budget_bytes = wanted.balloon_budget_bytes;
            }
            "writeback.idle" | "writeback.daily_limit" => self.go_by_of_file(running, wanted),
            _ => {}
        }
        Ok(())
    }

    fn go_by_of_file(&self, running: &mut Config, wanted: &Config) {
        let (Some(file), Some(to)) = (&mut running.writeback, &wanted.writeback) else { return };
        self.daemon.shrinker.set_idle(to.idle);
        if let Some(open) = &self.daemon.store.shared().file {
            open.set_daily_bytes_max(to.daily_limit_bytes);
        }
        (file.idle, file.daily_limit_bytes) = (to.idle, to.daily_limit_bytes);
    }

    /// Those that are gone first: others may need what they had reserved.
    fn vms(&mut self, wanted: &Config) {
        let served = self.daemon.served();
        let is_wanted = |vm: &&Served| wanted.vms.iter().any(|other| other.name == vm.config.name);
        for vm in served.iter().filter(|vm| !is_wanted(vm)) {
            let verdict = self.take_out(vm);
            let size = value(&vm.config.keys(), "size");
            self.note(format!("vm.{}", vm.config.name), size, None, verdict);
        }
        for vm in &wanted.vms {
            match served.iter().find(|other| other.config.name == vm.name) {
                Some(before) => self.vm(&before.config, vm),
                None => {
                    let added = if self.check { Ok(()) } else { self.daemon.begin_serving(vm) };
                    let verdict =
                        added.map_or_else(|err| (ChangeOutcome::Failed, Some(err.to_string())), |()| now());
                    self.note(format!("vm.{}", vm.name), None, value(&vm.keys(), "size"), verdict);
                }
            }
        }
    }

    /// Serves a VM no more that nobody misses.
    fn take_out(&self, vm: &Served) -> Verdict {
        let name = &vm.config.name;
        let connections = vm.device.connections();
        // A door that is shut for a moment would refuse a VMM: who only checks, only looks.
        let connected = if self.check { vm.device.connected() } else { connections.shut(None).is_err() };
        if connected {
            return self.keep(vm, "a VMM is connected to it".to_owned());
        }
        let pages = self.daemon.store.ready(name).map_or(0, |pages| guest_pages(&pages));
        if self.check && pages == 0 {
            return now();
        }
        if pages > 0 {
            let verdict = self.keep(vm, format!("it holds {pages} pages"));
            if !self.check {
                connections.open();
            }
            return verdict;
        }
        self.daemon.end_serving(vm);
        // A damaged one is left to whoever may want to mend it.
        if self.daemon.store.ready(name).is_some()
            && let Err(err) = self.daemon.store.remove(name)
        {
            return (ChangeOutcome::Failed, Some(err.to_string()));
        }
        now()
    }

    /// Keeps one that somebody may miss. The reserves of the file were found to fit the pool without its own, which goes, as
    /// it would at the next start.
    fn keep(&self, vm: &Served, why: String) -> Verdict {
        let name = &vm.config.name;
        let pages = self.daemon.store.ready(name).filter(|pages| pages.limits().reserve_bytes > 0);
        let reserve = if pages.is_some() { "; its reserve is given up" } else { "" };
        if let Some(pages) = pages.filter(|_| !self.check) {
            self.daemon.apply(&VmConfig { reserve_bytes: 0, ..vm.config.clone() }, &pages);
        }
        let why = format!(
            "{why}: `ballast vm remove {name} --force` drops it; the next start keeps its pages, and doesn't serve it{reserve}"
        );
        (ChangeOutcome::Kept, Some(why))
    }

    /// One VM whose keys may be others.
    fn vm(&mut self, before: &VmConfig, after: &VmConfig) {
        let pages = self.daemon.store.ready(&after.name);
        let found = differences(before.keys().into(), after.keys().into());
        for (key, old, new) in &found {
            let verdict = match *key {
                "size" => {
                    restart("a disk of another size holds none of the pages of this one: clear the VM then")
                }
                "queues" | "migration" => restart("VMMs have seen what the device is like"),
                _ if pages.is_none() => restart("the VM is out of service"),
                "label" | "uuid" => now_but("its guest sees it once the VM is cleared"),
                _ => now(),
            };
            self.note(format!("vm.{}.{key}", after.name), old.clone(), new.clone(), verdict);
        }
        if let Some(pages) = pages
            && !self.check
            && !found.is_empty()
        {
            self.daemon.apply(after, &pages);
        }
    }
}

fn value(keys: &[KeyValue], key: &str) -> Option<Value> {
    keys.iter().find(|(other, _)| *other == key).and_then(|(_, value)| value.clone())
}

/// The keys whose values differ. Both lists have the same keys in the same order.
fn differences(old: Vec<KeyValue>, new: Vec<KeyValue>) -> Vec<(&'static str, Option<Value>, Option<Value>)> {
    let pairs = old.into_iter().zip(new);
    pairs.filter(|(old, new)| old.1 != new.1).map(|((key, old), (_, new))| (key, old, new)).collect()
}
