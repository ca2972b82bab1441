//! What a guest says of its memory, by way of the properties of its balloon device. QEMU asks the guest only when told how
//! often, and keeps the last answer; a guest without the driver never gives one. None of it is needed to squeeze, so a
//! QEMU that refuses it, or has its balloon where we don't look, is one without statistics.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::super::socket::Deadline;
use super::super::unreachable::quoted;
use super::super::{GuestStats, Unreachable, known};
use super::monitor::Monitor;

/// Where QEMU keeps what was plugged in, with a name and without.
const PARENTS: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];
const INTERVAL: &str = "guest-stats-polling-interval";
/// Twice a controller's look would have to be old to mislead it, and a guest is hardly disturbed.
const INTERVAL_SECONDS: u64 = 2;

/// The balloon device, by its path in QEMU's tree of objects; `None` where there is none.
#[derive(Debug)]
pub(super) struct Balloon(Option<String>);

impl Balloon {
    /// The last statistics. `balloon` is filled in at the first call of a connection, and emptied if the device has gone.
    pub(super) fn stats(
        balloon: &mut Option<Self>,
        monitor: &mut Monitor,
        deadline: Deadline,
    ) -> Result<Option<GuestStats>, Unreachable> {
        let found = match balloon.take() {
            Some(found) => found,
            None => Self::find(monitor, deadline)?,
        };
        let Some(path) = &found.0 else {
            *balloon = Some(found);
            return Ok(None);
        };
        let property = json!({ "path": path, "property": "guest-stats" });
        match monitor.execute("qom-get", &property, deadline)? {
            Ok(answer) => {
                *balloon = Some(found);
                stats_of(&answer, SystemTime::now())
            }
            Err(_) => Ok(None),
        }
    }

    fn find(monitor: &mut Monitor, deadline: Deadline) -> Result<Self, Unreachable> {
        for parent in PARENTS {
            let Ok(list) = monitor.execute("qom-list", &json!({ "path": parent }), deadline)? else {
                continue;
            };
            if let Some(name) = balloon_in(&list) {
                let path = format!("{parent}/{name}");
                ask_guest(monitor, &path, deadline)?;
                return Ok(Self(Some(path)));
            }
        }
        Ok(Self(None))
    }
}

/// The name of the balloon in a list of `{"name": …, "type": "child<…>"}`. Its type says how it is attached, too:
/// `virtio-balloon-pci`, `virtio-balloon-ccw`, `virtio-balloon-pci-non-transitional`.
fn balloon_in(list: &Value) -> Option<&str> {
    let is_balloon =
        |entry: &&Value| entry["type"].as_str().is_some_and(|kind| kind.starts_with("child<virtio-balloon"));
    list.as_array()?.iter().find(is_balloon)?.get("name")?.as_str()
}

/// Has QEMU ask the guest now and then, unless somebody has chosen how often already, as libvirt does by its `<stats>`.
fn ask_guest(monitor: &mut Monitor, path: &str, deadline: Deadline) -> Result<(), Unreachable> {
    let property = json!({ "path": path, "property": INTERVAL });
    let interval = monitor.execute("qom-get", &property, deadline)?;
    if interval.is_ok_and(|seconds| seconds.as_u64() == Some(0)) {
        let property = json!({ "path": path, "property": INTERVAL, "value": INTERVAL_SECONDS });
        // Refused, there are no statistics; that is seen when they are asked for.
        let _ = monitor.execute("qom-set", &property, deadline)?;
    }
    Ok(())
}

/// What a guest said, if it ever did.
fn stats_of(answer: &Value, now: SystemTime) -> Result<Option<GuestStats>, Unreachable> {
    let nonsense = || Unreachable::nonsense(format!("{} for statistics", quoted(&answer.to_string())));
    let update = answer.get("last-update").and_then(Value::as_u64).ok_or_else(nonsense)?;
    let stats = answer.get("stats").and_then(Value::as_object).ok_or_else(nonsense)?;
    if update == 0 {
        return Ok(None);
    }
    let value = |name: &str| stats.get(name).and_then(known);
    let updated = UNIX_EPOCH.checked_add(Duration::from_secs(update)).ok_or_else(nonsense)?;
    Ok(Some(GuestStats {
        // A clock that was set back makes it look newer than it is, once.
        age: now.duration_since(updated).unwrap_or_default(),
        update: Some(update),
        available_bytes: value("stat-available-memory"),
        free_bytes: value("stat-free-memory"),
        total_bytes: value("stat-total-memory"),
        major_faults: value("stat-major-faults"),
        swap_in_bytes: value("stat-swap-in"),
        swap_out_bytes: value("stat-swap-out"),
        oom_kills: value("stat-oom-kills"),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn what_a_guest_leaves_out_is_not_known() {
        let answer = json!({ "last-update": 1000, "stats": {
            "stat-available-memory": 5, "stat-free-memory": -1, "stat-total-memory": u64::MAX, "stat-swap-in": 0,
            "stat-swap-out": -1,
            "stat-oom-kill": "7", "stat-major-faults": i64::MAX,
        }});
        let stats = stats_of(&answer, at(1003)).unwrap().unwrap();
        let expected = GuestStats {
            age: Duration::from_secs(3),
            update: Some(1000),
            available_bytes: Some(5),
            swap_in_bytes: Some(0),
            major_faults: Some(i64::MAX.unsigned_abs()),
            ..GuestStats::default()
        };
        assert_eq!(stats, expected);
        assert_eq!(stats_of(&answer, at(900)).unwrap().unwrap().age, Duration::ZERO);
    }

    #[test]
    fn a_guest_that_never_said_anything_has_no_statistics() {
        let answer = json!({ "last-update": 0, "stats": { "stat-free-memory": -1 } });
        assert_eq!(stats_of(&answer, at(1003)), Ok(None));
        for answer in
            [json!({ "stats": {} }), json!({ "last-update": -1, "stats": {} }), json!([1]), json!(7)]
        {
            assert!(stats_of(&answer, at(1003)).is_err(), "{answer}");
        }
        let far = json!({ "last-update": u64::MAX, "stats": {} });
        assert!(stats_of(&far, at(1003)).is_err());
    }

    #[test]
    fn the_balloon_is_found_by_its_type() {
        let list = json!([
            { "name": "type", "type": "string" },
            { "name": "virtio-balloon", "type": "child<virtio-net-pci>" },
            { "name": "b0", "type": "child<virtio-balloon-pci-non-transitional>" },
        ]);
        assert_eq!(balloon_in(&list), Some("b0"));
        for list in [json!([]), json!({}), json!([7]), json!([{ "type": "child<virtio-balloon-pci>" }])] {
            assert_eq!(balloon_in(&list), None, "{list}");
        }
    }
}
