//! Whose pages nobody wants any more: a VM that says so in `clear_after` is cleared so long after a VMM was connected last.
//! When that was stands in its page table, so it outlives the daemon; it is noted when a VMM comes, and once a minute while
//! one is there. It is also who says that pages of the arena were given up: who did that was in no state to talk.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::daemon::Daemon;
use super::served::guest_pages;
use crate::control::api::Clearing;
use crate::store::table::seconds_since_boot;
use crate::threads::{self, Role};

const PERIOD: Duration = Duration::from_secs(60);
/// The shortest time between two lines about pages that were given up: more of them may follow at once.
const NEWS_PERIOD: Duration = Duration::from_secs(1);
/// How long the daemon has to run before it clears anything: VMMs that were connected to the one before it come back
/// within a second or two, however long there was none.
const GRACE_SECONDS: u32 = 600;

/// Looks at all VMs from now on, on a thread of its own.
pub(super) fn start(daemon: Arc<Daemon>) -> io::Result<()> {
    threads::spawn("keeper", Role::Listener, move || {
        let started = seconds_since_boot();
        let mut told = 0;
        loop {
            look(&daemon, seconds_since_boot(), started);
            let due = Instant::now() + PERIOD;
            while let Some(left) = due.checked_duration_since(Instant::now()) {
                daemon.mending.wait(left);
                told = tell_mended(daemon.mending.pages(), told);
            }
        }
    })?;
    Ok(())
}

/// Says how many pages of the arena are given up by now, unless that was told.
fn tell_mended(pages: u32, told: u32) -> u32 {
    if pages > told {
        tracing::error!(
            pages,
            "pages of the arena can't be read any more, because the host's memory or a disk is failing: what was stored there \
             is lost and says so when it is read; `ballast check` names it; move the VMs to another host"
        );
        std::thread::sleep(NEWS_PERIOD);
    }
    pages
}

/// Looks once, at a second of the boot-time clock, in a daemon that was started at another.
fn look(daemon: &Daemon, now: u32, started: u32) {
    for vm in daemon.served() {
        let name = &vm.config.name;
        let Some(pages) = daemon.store.ready(name) else { continue };
        let last = pages.table().last_connected();
        if vm.device.connected() || last == 0 {
            pages.table().note_connected(now);
            continue;
        }
        let Some(after) = vm.config.clear_after else { continue };
        let due = u64::from(now.saturating_sub(last)) >= after.as_secs();
        let found = guest_pages(&pages);
        if !due || now.saturating_sub(started) < GRACE_SECONDS || found == 0 {
            continue;
        }
        match daemon.clear(name, Clearing::default()) {
            Ok(()) => tracing::warn!(
                vm = name,
                pages = found,
                "the VM was cleared: no VMM was connected for as long as its clear_after says"
            ),
            // Somebody has come, most likely.
            Err(err) => tracing::info!(vm = name, "the VM was not cleared: {err}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::config::{Config, Layers};
    use crate::control::api::Host;
    use crate::control::socket::Sockets;
    use crate::ids::Slot;
    use crate::page::Page;
    use crate::store::codec::Scratch;
    use crate::store::lru::Age;

    const DAY: u32 = 24 * 3600;

    fn open(dir: &std::path::Path) -> Daemon {
        let text = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n[pool]\nmax = \"64MiB\"\npressure = false\n\
             [[vm]]\nname = \"a\"\nsize = \"1MiB\"\nclear_after = \"1d\"\n[[vm]]\nname = \"b\"\nsize = \"1MiB\"\n",
            dir.join("state"),
            dir.join("run")
        );
        let layers = Layers::load(Config::parse(&text, 1 << 30).unwrap()).unwrap();
        Daemon::open(layers, Sockets::of_group(0)).unwrap()
    }

    fn stored(daemon: &Daemon) -> [u64; 2] {
        ["a", "b"].map(|name| guest_pages(&daemon.store.ready(name).unwrap()))
    }

    #[test]
    fn a_vm_is_cleared_so_long_after_its_last_connection_and_no_sooner() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let daemon = open(dir.path());
        for name in ["a", "b"] {
            let page: Page = [7; 4096];
            let pages = daemon.store.ready(name).unwrap();
            pages.store(Slot(9), &page, Age::now(), &mut Scratch::default()).unwrap();
        }
        look(&daemon, 1000, 0);
        // What was noted outlives the daemon.
        drop(daemon);
        let daemon = open(dir.path());
        look(&daemon, 999 + DAY, 0);
        assert_eq!(stored(&daemon), [1, 1]);
        look(&daemon, 1000 + DAY, 401 + DAY);
        assert_eq!(stored(&daemon), [1, 1], "a daemon that has just started waits for VMMs to come back");
        let (_vmm, stream) = UnixStream::pair().unwrap();
        let device = daemon.find("a").unwrap().device;
        device.begin_session(1, &stream).unwrap();
        look(&daemon, 1000 + DAY, 0);
        device.end_session(1);
        look(&daemon, 999 + 2 * DAY, 0);
        assert_eq!(stored(&daemon), [1, 1], "it was connected meanwhile");
        assert!(daemon.vm("a").unwrap().disconnected_seconds.is_some());
        look(&daemon, 1000 + 2 * DAY, 0);
        assert_eq!(stored(&daemon), [0, 1], "and b says nothing of the kind");
    }
}
