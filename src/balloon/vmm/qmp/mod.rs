//! QEMU, by its QEMU Machine Protocol, as 7.2 and later speak it. A monitor serves one client at a time, so it needs one
//! that nobody else uses: `-qmp unix:…,server=on,wait=off`, under libvirt a second one beside libvirt's own. Nothing is
//! remembered of the guest between two looks, and events are not relied on: whoever connects anew has missed some.

mod guest_stats;
mod monitor;
mod objects;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use self::guest_stats::Balloon;
use self::monitor::Monitor;
use super::backoff::Backoff;
use super::socket::Deadline;
use super::unreachable::quoted;
use super::{GuestMemory, TIME_OUT, Unreachable, VmmClient};

/// What gives a QEMU's VM a balloon.
pub const BALLOON_ARGUMENT: &str = "-device virtio-balloon-pci,deflate-on-oom=on,free-page-reporting=on";

/// Run states in which the guest is on its way (`RunState` in QEMU's `qapi/run-state.json`).
const MIGRATING_STATES: [&str; 4] = ["inmigrate", "finish-migrate", "postmigrate", "colo"];
/// States of a migration that isn't under way (`MigrationStatus` in `qapi/migration.json`); none at all is one, too.
const IDLE_MIGRATIONS: [&str; 4] = ["none", "completed", "failed", "cancelled"];

/// A client of one QEMU.
#[derive(Debug)]
pub struct Qmp {
    socket: PathBuf,
    time_out: Duration,
    backoff: Backoff,
    connection: Option<Connection>,
}

#[derive(Debug)]
struct Connection {
    monitor: Monitor,
    /// Where the statistics are, once that was found.
    balloon: Option<Balloon>,
}

impl Qmp {
    /// A client of the QEMU whose monitor is at `socket`; connects when something is asked.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, time_out: TIME_OUT, backoff: Backoff::default(), connection: None }
    }

    /// The same with another time-out than [`TIME_OUT`].
    #[must_use]
    pub fn with_time_out(self, time_out: Duration) -> Self {
        Self { time_out, ..self }
    }

    /// Makes a call on a connection that is there or made for it, unless it isn't time for that yet.
    fn call<T>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&mut Connection, Deadline) -> Result<T, Unreachable>,
    ) -> Result<T, Unreachable> {
        self.backoff.check(now)?;
        let deadline = Deadline::after(self.time_out);
        // Kept only if nothing is wrong with it.
        let connection = match self.connection.take() {
            Some(connection) => Ok(connection),
            None => {
                Monitor::connect(&self.socket, deadline).map(|monitor| Connection { monitor, balloon: None })
            }
        };
        let result = connection.and_then(|mut connection| {
            let result = call(&mut connection, deadline);
            if !result.as_ref().is_err_and(Unreachable::ends_connection) {
                self.connection = Some(connection);
            }
            result
        });
        self.backoff.note(&result, now);
        result
    }
}

impl VmmClient for Qmp {
    fn look(&mut self, now: Instant) -> Result<GuestMemory, Unreachable> {
        self.call(now, Connection::look)
    }

    fn set_target(&mut self, bytes: u64, now: Instant) -> Result<(), Unreachable> {
        self.call(now, |connection, deadline| {
            // QEMU takes zero for no value at all, and cuts what is too large.
            let value = i64::try_from(bytes.max(1)).unwrap_or(i64::MAX);
            connection.ask("balloon", &json!({ "value": value }), deadline).map(drop)
        })
    }
}

impl Connection {
    fn look(&mut self, deadline: Deadline) -> Result<GuestMemory, Unreachable> {
        self.check_runs(deadline)?;
        let actual = self.ask("query-balloon", &json!({}), deadline)?;
        let actual_bytes = number(&actual, "actual")?;
        // Asked second: memory that was plugged in between is then not too little.
        let summary = self.ask("query-memory-size-summary", &json!({}), deadline)?;
        let plugged_bytes =
            if summary.get("plugged-memory").is_some() { number(&summary, "plugged-memory")? } else { 0 };
        let configured_bytes = number(&summary, "base-memory")?.saturating_add(plugged_bytes);
        Unreachable::check_size(configured_bytes, actual_bytes)?;
        let guest = Balloon::stats(&mut self.balloon, &mut self.monitor, deadline)?;
        Ok(GuestMemory { configured_bytes, actual_bytes, guest })
    }

    /// That the guest runs, and is to stay where it is.
    fn check_runs(&mut self, deadline: Deadline) -> Result<(), Unreachable> {
        let status = self.ask("query-status", &json!({}), deadline)?;
        let state = status.get("status").and_then(Value::as_str).unwrap_or_default();
        if MIGRATING_STATES.contains(&state) {
            return Err(Unreachable::Migrating);
        }
        if status.get("running").and_then(Value::as_bool) != Some(true) {
            return Err(Unreachable::Paused { state: quoted(state) });
        }
        let migration = self.ask("query-migrate", &json!({}), deadline)?;
        match migration.get("status").and_then(Value::as_str) {
            Some(status) if !IDLE_MIGRATIONS.contains(&status) => Err(Unreachable::Migrating),
            _ => Ok(()),
        }
    }

    /// Has a command carried out that there is no way around.
    fn ask(
        &mut self,
        command: &'static str,
        arguments: &Value,
        deadline: Deadline,
    ) -> Result<Value, Unreachable> {
        let answer = self.monitor.execute(command, arguments, deadline)?;
        answer.map_err(|refusal| match refusal.class.as_str() {
            // What QEMU calls a VM without a balloon.
            "DeviceNotActive" => Unreachable::NoBalloon { add: BALLOON_ARGUMENT.into() },
            _ => refusal.of(command),
        })
    }
}

/// A number of bytes among an answer's members.
fn number(answer: &Value, key: &str) -> Result<u64, Unreachable> {
    let number = answer.get(key).and_then(Value::as_u64);
    number.ok_or_else(|| {
        let words = quoted(&answer.to_string());
        Unreachable::nonsense(format!("{words} has no {key} that is a number of bytes"))
    })
}
