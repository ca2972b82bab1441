//! What systemd is told: that the daemon is ready, once every socket listens; what it holds, in a line that `systemctl
//! status` shows; how far it is with a long start; that it reads its configuration again, and what was wrong with that; and, where the unit has a watchdog, that it still works. It works
//! as long as every worker passes a turn and the status can be put together: a worker that hangs, or a lock that is never
//! given back, ends in a restart, which costs guests a tenth of a second.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;

use super::daemon::Daemon;
use crate::control::api::{Host, Reloading, SetError, Status};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;
use crate::threads::{self, Role};

/// Between two looks at whether the status line has changed.
const STATUS_EVERY: Duration = Duration::from_secs(5);
/// What `systemctl status` has room for in a line.
const REFUSAL_CHARS_MAX: usize = 240;

/// Says that the daemon is ready, and goes on telling how it is, on a thread of its own. Without a systemd that listens
/// nothing happens.
pub(super) fn start(daemon: Arc<Daemon>) -> io::Result<()> {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return Ok(());
    }
    let mut line = status_line(&daemon);
    tell(&[NotifyState::Ready, NotifyState::Status(&line)]);
    let watchdog = sd_notify::watchdog_enabled();
    // Half of the time that it is given, as systemd advises.
    let every = watchdog.map_or(STATUS_EVERY, |within| (within / 2).min(STATUS_EVERY));
    threads::spawn("notify", Role::Listener, move || {
        let mut told = Instant::now();
        loop {
            std::thread::sleep(every);
            // Whichever of these two never returns leaves the watchdog without a word.
            daemon.device.pass_turns();
            let now = status_line(&daemon);
            if watchdog.is_some() {
                tell(&[NotifyState::Watchdog]);
            }
            if now != line && told.elapsed() >= STATUS_EVERY {
                tell(&[NotifyState::Status(&now)]);
                (line, told) = (now, Instant::now());
            }
        }
    })?;
    Ok(())
}

/// Says before a long start what takes so long.
pub(super) fn starting() {
    tell(&[NotifyState::Status("looking at the page tables")]);
}

/// Says how far that is.
pub(super) fn walked(percent: u64) {
    tell(&[NotifyState::Status(&format!("looking at the page tables: {percent} %"))]);
}

/// Reads the configuration again, and says so while it does. The daemon is ready afterwards whatever became of it; what was
/// wrong stands in its status line until another one is gone by.
pub(super) fn reloading(daemon: &Daemon) -> Result<(), SetError> {
    if let Ok(now) = NotifyState::monotonic_usec_now() {
        tell(&[NotifyState::Reloading, now]);
    }
    let done = daemon.reload(Reloading::default());
    tell(&[NotifyState::Ready, NotifyState::Status(&status_line(daemon))]);
    done.map(drop)
}

fn tell(what: &[NotifyState<'_>]) {
    if let Err(err) = sd_notify::notify(what) {
        tracing::debug!(%err, "systemd was not told");
    }
}

fn status_line(daemon: &Daemon) -> String {
    let mut line = holds(&daemon.status());
    if let Some(refused) = &*daemon.refused.lock() {
        line += &format!("; reload: {}", in_short(refused));
    }
    line
}

/// The first line of a message and its last one, as much as there is room for.
fn in_short(message: &str) -> String {
    let mut lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let first = lines.next().unwrap_or_default().to_owned();
    let short = lines.next_back().map_or(first.clone(), |last| format!("{first}: {last}"));
    match short.char_indices().nth(REFUSAL_CHARS_MAX) {
        Some((end, _)) => format!("{}…", &short[..end]),
        None => short,
    }
}

fn holds(status: &Status) -> String {
    let (vms, connected) = (status.vms.len(), status.vms.iter().filter(|vm| vm.connected).count());
    let pool = &status.pool;
    let stored = Bytes(pool.stored_pages.saturating_mul(PAGE_SIZE_U64));
    let trouble = status.vms.iter().filter(|vm| vm.message.is_some()).count();
    let mut line =
        format!("{connected} of {vms} VMs connected, {stored} stored in {}", Bytes(pool.used_bytes));
    if trouble > 0 {
        line += &format!(", {trouble} in trouble: see `ballast status`");
    }
    line
}
