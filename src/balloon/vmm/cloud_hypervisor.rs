//! cloud-hypervisor, by its REST API (`vmm/src/api/openapi/cloud-hypervisor.yaml` in its source; read at version 53 and at
//! 00f6822 of September 2026). It counts its balloon, where we count what the guest has, and reports statistics of the
//! guest's only since `vm.balloon-stats`, which no release up to 53 has: its names and units are those of its pull request
//! 8603, ff2f056 of July 2026, by which the guest is asked anew each time and an answer that takes a second is an error.
//! Neither `vm.info` nor `vm.counters` has any of them. While a VM migrates `vm.info` is as it was before; only who asks
//! for a change is told.

use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::Value;

use super::backoff::Backoff;
use super::http::{self, Answer, Request};
use super::socket::Deadline;
use super::unreachable::quoted;
use super::{GuestMemory, GuestStats, TIME_OUT, Unreachable, VmmClient, known};

/// What gives a cloud-hypervisor's VM a balloon.
pub const BALLOON_ARGUMENT: &str = "--balloon size=0,deflate_on_oom=on,free_page_reporting=on";

/// A client of one cloud-hypervisor.
#[derive(Debug)]
pub struct CloudHypervisor {
    socket: PathBuf,
    time_out: Duration,
    backoff: Backoff,
    /// What the guest said last, and when that was.
    said: Option<(GuestStats, Instant)>,
}

/// What `vm.info` says, of which the rest is none of our business.
#[derive(Debug, Deserialize)]
struct Info {
    config: Config,
    state: String,
    memory_actual_size: u64,
}

#[derive(Debug, Deserialize)]
struct Config {
    memory: Memory,
    balloon: Option<Value>,
}

/// The VM's memory, or one of its zones.
#[derive(Debug, Deserialize)]
struct Memory {
    size: u64,
    #[serde(default)]
    hotplugged_size: Option<u64>,
    #[serde(default)]
    zones: Option<Vec<Memory>>,
}

/// What `vm.balloon-stats` says.
#[derive(Debug, Deserialize)]
struct Reported {
    /// Milliseconds since 1970, 0 for never; without it, it is of this moment.
    last_update: Option<u64>,
    stats: serde_json::Map<String, Value>,
}

impl Memory {
    /// All that the guest may have without its balloon.
    fn bytes(&self) -> u64 {
        let zones = self.zones.iter().flatten().map(Self::bytes);
        let own = self.size.saturating_add(self.hotplugged_size.unwrap_or(0));
        zones.fold(own, u64::saturating_add)
    }
}

impl CloudHypervisor {
    /// A client of the cloud-hypervisor whose API is at `socket`; connects when something is asked.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket, time_out: TIME_OUT, backoff: Backoff::default(), said: None }
    }

    /// The same with another time-out than [`TIME_OUT`].
    #[must_use]
    pub fn with_time_out(self, time_out: Duration) -> Self {
        Self { time_out, ..self }
    }

    fn call<T>(
        &mut self,
        now: Instant,
        call: impl FnOnce(&Self, Deadline) -> Result<T, Unreachable>,
    ) -> Result<T, Unreachable> {
        self.backoff.check(now)?;
        let result = call(self, Deadline::after(self.time_out));
        self.backoff.note(&result, now);
        result
    }

    fn get(&self, name: &'static str, deadline: Deadline) -> Result<Answer, Unreachable> {
        let path = format!("/api/v1/{name}");
        http::ask(&self.socket, Request { method: "GET", path: &path, body: "", name }, deadline)
    }

    /// The VM, if it runs and has a balloon: what it was booted with, and what it has.
    fn info(&self, deadline: Deadline) -> Result<(u64, u64), Unreachable> {
        let answer = self.get("vm.info", deadline)?;
        match answer.status {
            200 => {}
            404 => return Err(Unreachable::Paused { state: "not created".to_owned() }),
            _ => return Err(refusal("vm.info", &answer)),
        }
        let info: Info = serde_json::from_slice(&answer.body)
            .map_err(|error| Unreachable::nonsense(format!("{} for vm.info: {error}", words(&answer))))?;
        if info.state != "Running" {
            return Err(Unreachable::Paused { state: quoted(&info.state) });
        }
        if info.config.balloon.is_none() {
            return Err(Unreachable::NoBalloon { add: BALLOON_ARGUMENT.into() });
        }
        let (configured_bytes, actual_bytes) = (info.config.memory.bytes(), info.memory_actual_size);
        Unreachable::check_size(configured_bytes, actual_bytes)?;
        Ok((configured_bytes, actual_bytes))
    }

    /// What the guest says of itself now. A version that has no such request, a VM whose driver has no statistics, and one
    /// whose guest is too busy to answer answer with an error.
    fn stats(&self, deadline: Deadline) -> Result<Option<GuestStats>, Unreachable> {
        let answer = self.get("vm.balloon-stats", deadline)?;
        if answer.status != 200 {
            return Ok(None);
        }
        let reported: Reported = serde_json::from_slice(&answer.body).map_err(|error| {
            Unreachable::nonsense(format!("{} for vm.balloon-stats: {error}", words(&answer)))
        })?;
        Ok(reported.stats_at(SystemTime::now()))
    }

    fn resize(&self, balloon_bytes: u64, deadline: Deadline) -> Result<(), Unreachable> {
        let (name, body) = ("vm.resize", format!("{{\"desired_balloon\":{balloon_bytes}}}"));
        let request = Request { method: "PUT", path: "/api/v1/vm.resize", body: &body, name };
        let answer = http::ask(&self.socket, request, deadline)?;
        if (200..300).contains(&answer.status) { Ok(()) } else { Err(refusal(name, &answer)) }
    }
}

impl VmmClient for CloudHypervisor {
    fn look(&mut self, now: Instant) -> Result<GuestMemory, Unreachable> {
        let seen = self.call(now, |client, deadline| {
            let (configured_bytes, actual_bytes) = client.info(deadline)?;
            let guest = client.stats(deadline)?;
            Ok(GuestMemory { configured_bytes, actual_bytes, guest })
        });
        // It may be another guest that answers next.
        let before = self.said.take();
        let memory = seen?;
        self.said = said(memory.guest, before, now);
        let guest = self.said.map(|(guest, at)| GuestStats { age: guest.age + (now - at), ..guest });
        Ok(GuestMemory { guest, ..memory })
    }

    fn set_target(&mut self, bytes: u64, now: Instant) -> Result<(), Unreachable> {
        self.call(now, |client, deadline| {
            // Asked again rather than remembered: memory may have been plugged in since.
            let (configured_bytes, _) = client.info(deadline)?;
            client.resize(configured_bytes.saturating_sub(bytes), deadline)
        })
    }
}

/// What a guest has said last: now, or before. It is not mute because it didn't answer once: what it said gets old. What is of
/// the moment has the number of the times that it spoke.
fn said(
    now_says: Option<GuestStats>,
    before: Option<(GuestStats, Instant)>,
    now: Instant,
) -> Option<(GuestStats, Instant)> {
    let Some(guest) = now_says else { return before };
    let next = || before.and_then(|(guest, _)| guest.update).unwrap_or(0).saturating_add(1);
    Some((GuestStats { update: guest.update.or_else(|| Some(next())), ..guest }, now))
}

impl Reported {
    fn stats_at(&self, now: SystemTime) -> Option<GuestStats> {
        if self.last_update == Some(0) {
            return None;
        }
        let value = |name: &str| self.stats.get(name).and_then(known);
        let updated = self.last_update.map(|ms| UNIX_EPOCH + Duration::from_millis(ms));
        let age = updated.map(|updated| now.duration_since(updated).unwrap_or_default());
        Some(GuestStats {
            age: age.unwrap_or_default(),
            update: self.last_update,
            available_bytes: value("available_memory"),
            free_bytes: value("free_memory"),
            total_bytes: value("total_memory"),
            major_faults: value("major_faults"),
            swap_in_bytes: value("swap_in"),
            swap_out_bytes: value("swap_out"),
            oom_kills: value("oom_kills"),
        })
    }
}

/// The body, as far as it is shown.
fn words(answer: &Answer) -> String {
    quoted(&String::from_utf8_lossy(&answer.body))
}

/// What an answer comes to that is no success. Its body is a list of errors, each the cause of the one before.
fn refusal(request: &'static str, answer: &Answer) -> Unreachable {
    let causes: Vec<String> = serde_json::from_slice(&answer.body).unwrap_or_default();
    // Its words since version 53, and no other sign.
    if causes.iter().any(|cause| cause.contains("currently migrating")) {
        return Unreachable::Migrating;
    }
    let said = if causes.is_empty() { words(answer) } else { quoted(&causes.join(": ")) };
    Unreachable::Refused { request, why: format!("{} {said}", answer.status).trim_end().to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zones_and_plugged_memory_count() {
        let memory =
            r#"{ "size": 0, "zones": [{ "id": "a", "size": 5 }, { "size": 3, "hotplugged_size": 2 }] }"#;
        let memory: Memory = serde_json::from_str(memory).unwrap();
        assert_eq!(memory.bytes(), 10);
    }

    #[test]
    fn a_refusal_has_the_vmms_words() {
        let refused = |status, body: &str| {
            refusal("vm.resize", &Answer { status, body: body.as_bytes().to_owned() }).to_string()
        };
        assert_eq!(
            refused(500, r#"["Error from API","The VM could not be resized","No\nmemory"]"#),
            "the VMM refused vm.resize: 500 Error from API: The VM could not be resized: No\\nmemory"
        );
        assert_eq!(refused(400, ""), "the VMM refused vm.resize: 400");
        let migrating = r#"["Error from API","VM is currently migrating and can't be modified"]"#;
        assert_eq!(refused(500, migrating), "the guest is migrating");
    }

    #[test]
    fn what_a_guest_leaves_out_is_not_known() {
        let body = r#"{ "balloon_actual": 0, "last_update": 5000, "stats": { "major_faults": 7, "swap_out": 9, "free_memory": null } }"#;
        let reported: Reported = serde_json::from_str(body).unwrap();
        let stats = reported.stats_at(UNIX_EPOCH + Duration::from_millis(5500));
        let expected = GuestStats {
            age: Duration::from_millis(500),
            update: Some(5000),
            major_faults: Some(7),
            swap_out_bytes: Some(9),
            ..GuestStats::default()
        };
        assert_eq!(stats, Some(expected));
        let of_now = Reported { last_update: None, ..reported };
        let stats = of_now.stats_at(UNIX_EPOCH).unwrap();
        assert_eq!((stats.age, stats.update, stats.swap_out_bytes), (Duration::ZERO, None, Some(9)));
        let never = Reported { last_update: Some(0), ..of_now };
        assert_eq!(never.stats_at(UNIX_EPOCH), None);
    }
}
