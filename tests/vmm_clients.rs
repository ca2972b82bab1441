//! The clients of VMMs against VMMs that hang, disappear, lie, answer late or talk of something else: each is a state in the
//! end, none takes longer than its time-out, and what was said to an earlier request is never taken for an answer to a later
//! one. The time between two attempts is the test's to say; time-outs are real and nothing asserts how long they take.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ballast::balloon::Word;
use ballast::balloon::vmm::cloud_hypervisor::CloudHypervisor;
use ballast::balloon::vmm::qmp::Qmp;
use ballast::balloon::vmm::{GuestMemory, Unreachable, VmmClient};
use serde_json::{Value, json};
use support::fake_vmm::{FakeVmm, Step, answer_of};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;
/// How long is waited where nothing should be waited for.
const PATIENT: Duration = Duration::from_secs(60);
/// How long a client waits whose VMM hangs.
const SHORT: Duration = Duration::from_millis(700);
/// More than any wait between two attempts.
const WAITED: Duration = Duration::from_secs(31);

/// A VMM and its client, with a clock that only a test moves.
struct Pair<C> {
    client: C,
    make: fn(PathBuf, Duration) -> C,
    time_out: Duration,
    vmm: FakeVmm,
    now: Instant,
    dir: TempDir,
}

fn pair<C>(make: fn(PathBuf, Duration) -> C, listen: fn(&Path) -> FakeVmm, time_out: Duration) -> Pair<C> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmm.sock");
    Pair { vmm: listen(&path), client: make(path, time_out), make, time_out, now: Instant::now(), dir }
}

fn qemu(time_out: Duration) -> Pair<Qmp> {
    pair(|path, time_out| Qmp::new(path).with_time_out(time_out), FakeVmm::qmp, time_out)
}

fn cloud_hypervisor(time_out: Duration) -> Pair<CloudHypervisor> {
    let make = |path, time_out| CloudHypervisor::new(path).with_time_out(time_out);
    pair(make, FakeVmm::rest, time_out)
}

impl<C: VmmClient> Pair<C> {
    fn path(&self) -> PathBuf {
        self.dir.path().join("vmm.sock")
    }

    /// A client that knows nothing takes the other's place.
    fn make_anew(&mut self) {
        self.client = (self.make)(self.path(), self.time_out);
    }

    fn look(&mut self) -> Result<GuestMemory, Unreachable> {
        self.client.look(self.now)
    }

    /// The state at the next look that is an attempt.
    fn state(&mut self) -> Unreachable {
        self.now += WAITED;
        self.client.look(self.now).unwrap_err()
    }

    /// That all is well at the next look that is an attempt. On a busy machine any VMM looks as if it hung to a client that
    /// waits only [`SHORT`], so that one may try again.
    fn is_well(&mut self, actual_mib: u64) {
        let memory = loop {
            self.now += WAITED;
            match self.client.look(self.now) {
                Err(Unreachable::Late { .. }) if self.time_out == SHORT => {}
                seen => break seen.unwrap(),
            }
        };
        assert_eq!((memory.configured_bytes, memory.actual_bytes), (512 * MIB, actual_mib * MIB));
    }

    /// What it is for a new client whose first request of this name is treated so; it finds all well at its next attempt.
    fn after(&mut self, request: &str, steps: impl FnOnce(u64) -> Vec<Step> + Send + 'static) -> Unreachable {
        self.make_anew();
        self.vmm.script(request, steps);
        let state = self.state();
        self.is_well(512);
        state
    }

    fn asked(&self) -> Vec<String> {
        std::mem::take(&mut self.vmm.vm().asked)
    }
}

fn send(text: impl Into<String>) -> Step {
    Step::Send(text.into())
}

/// What QEMU returns for a command with this number.
fn returned(id: u64, value: Value) -> Step {
    send(format!("{}\r\n", json!({ "return": value, "id": id })))
}

#[test]
fn qemu_is_seen_squeezed_and_relaxed() {
    let mut pair = qemu(PATIENT);
    pair.vmm.vm().stats = json!({ "stat-available-memory": 300 * MIB, "stat-swap-in": u64::MAX,
                                  "stat-total-memory": 480 * MIB, "stat-major-faults": 7 });
    pair.vmm.vm().updated_seconds -= 100;
    let memory = pair.look().unwrap();
    assert_eq!((memory.configured_bytes, memory.actual_bytes), (512 * MIB, 512 * MIB));
    let guest = memory.guest.unwrap();
    assert!(guest.age >= Duration::from_secs(100), "{guest:?}");
    assert_eq!((guest.available_bytes, guest.total_bytes), (Some(300 * MIB), Some(480 * MIB)));
    assert_eq!((guest.major_faults, guest.oom_kills), (Some(7), None));
    assert_eq!(pair.vmm.vm().polling_seconds, 2, "QEMU asks the guest only when told how often");
    pair.client.set_target(300 * MIB, pair.now).unwrap();
    assert_eq!(pair.look().unwrap().actual_bytes, 300 * MIB);
    pair.client.set_target(u64::MAX, pair.now).unwrap();
    assert_eq!(pair.look().unwrap().actual_bytes, 512 * MIB);
    assert_eq!(pair.asked().iter().filter(|name| *name == "greeting").count(), 1, "one connection did it");
    pair.vmm.vm().polling_seconds = 10;
    pair.make_anew();
    pair.is_well(512);
    assert_eq!(pair.vmm.vm().polling_seconds, 10, "somebody has chosen that");
}

#[test]
fn cloud_hypervisor_is_seen_squeezed_and_relaxed() {
    let mut pair = cloud_hypervisor(PATIENT);
    assert_eq!(pair.look().unwrap().guest, None, "up to version 53 it has no statistics");
    pair.client.set_target(300 * MIB, pair.now).unwrap();
    pair.vmm.vm().stats = json!({ "available_memory": 90 * MIB, "oom_kills": 1, "major_faults": null });
    let memory = pair.look().unwrap();
    assert_eq!(memory.actual_bytes, 300 * MIB);
    let guest = memory.guest.unwrap();
    assert_eq!((guest.available_bytes, guest.oom_kills), (Some(90 * MIB), Some(1)));
    assert_eq!(guest.major_faults, None);
    pair.client.set_target(u64::MAX, pair.now).unwrap();
    assert_eq!(pair.look().unwrap().actual_bytes, 512 * MIB);
}

#[test]
fn what_a_guest_of_cloud_hypervisor_said_gets_old_while_it_does_not_answer() {
    let mut pair = cloud_hypervisor(PATIENT);
    let says = |pair: &mut Pair<CloudHypervisor>, stats: Value| {
        pair.vmm.vm().stats = stats;
        pair.now += Duration::from_secs(3);
        let guest = pair.look().unwrap().guest.unwrap();
        (guest.age.as_secs(), guest.update, guest.swap_out_bytes)
    };
    let speaks = json!({ "available_memory": MIB, "swap_out": 5 });
    assert_eq!(says(&mut pair, speaks.clone()), (0, Some(1), Some(5)));
    // As where its time is out: 500, and no statistics.
    assert_eq!(says(&mut pair, json!({})), (3, Some(1), Some(5)));
    assert_eq!(says(&mut pair, json!({})), (6, Some(1), Some(5)));
    assert_eq!(says(&mut pair, speaks.clone()), (0, Some(2), Some(5)));
    pair.vmm.vm().state = "Paused";
    assert_eq!(pair.look().unwrap_err().word(), Word::Paused);
    pair.vmm.vm().state = "Running";
    pair.vmm.vm().stats = json!({});
    assert_eq!(pair.look().unwrap().guest, None, "it may be another guest");
}

#[test]
fn what_a_vm_is_doing_is_a_state_and_is_asked_again_at_the_next_look() {
    let mut pair = qemu(PATIENT);
    for (state, word) in [
        ("paused", Word::Paused),
        ("prelaunch", Word::Paused),
        ("inmigrate", Word::Migrating),
        ("postmigrate", Word::Migrating),
    ] {
        pair.vmm.vm().state = state;
        assert_eq!(pair.look().unwrap_err().word(), word, "{state}");
    }
    pair.vmm.vm().state = "running";
    for migration in ["setup", "active", "device", "a-state-of-tomorrow"] {
        pair.vmm.vm().migration = migration;
        assert_eq!(pair.look(), Err(Unreachable::Migrating), "{migration}");
    }
    for migration in ["completed", "failed", "cancelled", "none", ""] {
        pair.vmm.vm().migration = migration;
        assert!(pair.look().is_ok(), "{migration}");
    }
    pair.vmm.vm().balloon = false;
    let state = pair.look().unwrap_err();
    assert!(state.to_string().contains("-device virtio-balloon-pci"), "{state}");
    assert_eq!(pair.client.set_target(MIB, pair.now), Err(state));
    assert_eq!(pair.asked().iter().filter(|name| *name == "greeting").count(), 1, "one connection did it");

    let mut pair = cloud_hypervisor(PATIENT);
    for state in ["Created", "Paused", "Shutdown", "BreakPoint"] {
        pair.vmm.vm().state = state;
        assert_eq!(pair.look(), Err(Unreachable::Paused { state: state.to_owned() }));
        assert!(pair.client.set_target(MIB, pair.now).is_err());
    }
    pair.vmm.vm().state = "Running";
    pair.vmm.vm().balloon = false;
    assert!(pair.look().unwrap_err().to_string().contains("--balloon size=0"));
    pair.vmm.vm().balloon = true;
    let migrating = "[\"Error from API\",\"VM is currently migrating and can't be modified\"]";
    pair.vmm.script("PUT /api/v1/vm.resize", |_| vec![send(answer_of("500 ", migrating)), Step::HangUp]);
    assert_eq!(pair.client.set_target(MIB, pair.now), Err(Unreachable::Migrating));
    pair.vmm.script("GET /api/v1/vm.info", |_| vec![send(answer_of("404 Not Found", "[]")), Step::HangUp]);
    assert_eq!(pair.look().unwrap_err().word(), Word::Paused, "there is no VM yet");
    assert!(pair.look().is_ok());
}

#[test]
fn a_vmm_that_is_gone_is_tried_again_later_and_later() {
    let mut pair = qemu(PATIENT);
    let half = pair.after("query-balloon", |id| vec![send(format!("{{\"id\":{id},\"retu")), Step::HangUp]);
    assert_eq!(half.word(), Word::VmmGone, "{half}");
    pair.vmm.script("query-status", |_| vec![Step::HangUp]);
    let gone = pair.look().unwrap_err();
    assert_eq!(gone.word(), Word::VmmGone);
    pair.asked();
    // Until a second has passed it is not even tried, and neither is anything else.
    assert_eq!(pair.client.look(pair.now + Duration::from_millis(999)), Err(gone.clone()));
    assert_eq!(pair.client.set_target(MIB, pair.now), Err(gone));
    assert!(pair.asked().is_empty());
    pair.now += Duration::from_secs(1);
    assert!(pair.look().is_ok());

    let path = pair.path();
    pair.vmm.script("query-status", |_| vec![Step::HangUp]);
    assert!(pair.look().is_err());
    drop(pair.vmm);
    pair.now += Duration::from_secs(1);
    let gone = pair.client.look(pair.now).unwrap_err();
    assert!(gone.to_string().contains("vmm.sock: No such file"), "{gone}");
    let vmm = FakeVmm::qmp(&path);
    // The second failure in a row has doubled the wait.
    assert_eq!(pair.client.look(pair.now + Duration::from_millis(1999)), Err(gone));
    pair.now += Duration::from_secs(2);
    assert!(pair.client.look(pair.now).is_ok());
    drop(vmm);
}

#[test]
fn a_vmm_that_hangs_is_waited_for_once() {
    let mut pair = qemu(SHORT);
    for request in ["qmp_capabilities", "query-status", "query-balloon", "qom-get guest-stats"] {
        let state = pair.after(request, |_| vec![Step::Hang]);
        assert_eq!(state.word(), Word::VmmLate, "{request}: {state}");
    }
    let state = pair.after("greeting", |_| vec![Step::Hang]).to_string();
    assert!(state.contains("Ballast needs one of its own"), "{state}");
    let half = pair.after("query-balloon", |id| vec![send(format!("{{\"id\":{id},\"retu")), Step::Hang]);
    assert_eq!(half.word(), Word::VmmLate, "{half}");

    let mut pair = cloud_hypervisor(SHORT);
    let state = pair.after("GET /api/v1/vm.info", |_| vec![Step::Hang]);
    assert_eq!(state.to_string(), "the VMM is busy or hangs: it let us wait for vm.info");
    let half = answer_of("200 OK", "{\"config\":{\"memory\"")[..120].to_owned();
    assert_eq!(pair.after("GET /api/v1/vm.info", |_| vec![send(half), Step::Hang]).word(), Word::VmmLate);
    assert_eq!(pair.after("GET /api/v1/vm.balloon-stats", |_| vec![Step::Hang]).word(), Word::VmmLate);
}

#[test]
fn a_late_answer_is_nobodys() {
    let mut pair = qemu(SHORT);
    let late = |id| vec![Step::Wait(2 * SHORT), returned(id, json!({ "actual": 7 * MIB })), Step::HangUp];
    assert_eq!(pair.after("query-balloon", late).word(), Word::VmmLate);
    // Though the VMM carries out what it was asked for, nobody believes that it did before it is seen.
    pair.vmm.script("balloon", |_| vec![Step::Wait(2 * SHORT), Step::Answer, Step::HangUp]);
    assert_eq!(pair.client.set_target(300 * MIB, pair.now).unwrap_err().word(), Word::VmmLate);
    while pair.vmm.vm().actual_bytes != 300 * MIB {
        std::thread::sleep(Duration::from_millis(10));
    }
    pair.is_well(300);

    let mut pair = cloud_hypervisor(SHORT);
    let other = json!({ "config": { "memory": { "size": 7 }, "balloon": {} }, "state": "Running",
                        "memory_actual_size": 7 });
    let late = answer_of("200 OK", &other.to_string());
    let state = pair.after("GET /api/v1/vm.info", move |_| vec![Step::Wait(2 * SHORT), send(late)]);
    assert_eq!(state.word(), Word::VmmLate);
}

#[test]
fn answers_to_other_commands_and_events_are_passed_over() {
    let mut pair = qemu(PATIENT);
    pair.vmm.script("query-balloon", |id| {
        let event = json!({ "event": "BALLOON_CHANGE", "data": { "actual": 7 * MIB },
                            "timestamp": { "seconds": 1, "microseconds": 2 } });
        let pretty = "{\n    \"event\": \"STOP\",\n    \"data\": {\n    }\n}\r\n";
        let error = json!({ "error": { "class": "GenericError", "desc": "not yours" }, "id": id + 1 });
        let text = json!({ "return": { "actual": 5 * MIB }, "id": id.to_string() });
        vec![
            send(format!("{event}\r\n{pretty}{error}\r\n")),
            returned(id - 1, json!({ "actual": 6 * MIB })),
            send(format!("{text}\r\n")),
            Step::Answer,
        ]
    });
    pair.is_well(512);
    // What arrives before it was asked for is none either.
    pair.vmm.script("query-status", |id| vec![Step::Answer, returned(id + 20, json!({})), send("  \r\n")]);
    pair.is_well(512);
}

#[test]
fn a_vmm_that_refuses_is_quoted() {
    let mut pair = qemu(PATIENT);
    pair.vmm.script("balloon", |id| {
        let words = "KVM kernel too old\nfor \u{1b}[2J";
        vec![send(format!("{}\n", json!({ "error": { "class": "KVMMissingCap", "desc": words }, "id": id })))]
    });
    let state = pair.client.set_target(MIB, pair.now).unwrap_err();
    assert_eq!(state.to_string(), "the VMM refused balloon: KVM kernel too old\\nfor \\u{1b}[2J");
    pair.vmm.script("query-balloon", |_| vec![send("{\"error\": {\"desc\": \"Expecting a comma\"}}\r\n")]);
    assert_eq!(pair.look().unwrap_err().to_string(), "the VMM refused query-balloon: Expecting a comma");
    assert!(pair.look().is_ok(), "neither is a reason to hang up");
    // Statistics are not worth a refusal.
    let interval = "guest-stats-polling-interval";
    for request in [
        "qom-list /machine/peripheral".to_owned(),
        "qom-get guest-stats".to_owned(),
        format!("qom-get {interval}"),
        format!("qom-set {interval}"),
    ] {
        pair.make_anew();
        pair.vmm.vm().polling_seconds = 0;
        let refusal =
            |id| vec![send(format!("{{\"error\": {{\"class\": \"GenericError\"}}, \"id\": {id}}}\r\n"))];
        pair.vmm.script(&request, refusal);
        pair.is_well(512);
        assert!(pair.asked().contains(&request), "{request}");
    }

    let mut pair = cloud_hypervisor(PATIENT);
    let refusal = answer_of("500 ", "[\"Error from API\",\"The VM could not be resized\"]");
    pair.vmm.script("PUT /api/v1/vm.resize", |_| vec![send(refusal)]);
    let state = pair.client.set_target(MIB, pair.now).unwrap_err();
    assert_eq!(
        state.to_string(),
        "the VMM refused vm.resize: 500 Error from API: The VM could not be resized"
    );
    assert!(pair.look().is_ok());
}

/// What can't be, in answer to `query-balloon` and to `query-memory-size-summary`.
fn lies() -> Vec<(&'static str, Value)> {
    let mut lies: Vec<_> =
        [json!(-1), json!(0), json!("512"), json!(1.5), json!(null), json!(u64::MAX), json!(513 * MIB)]
            .into_iter()
            .map(|actual| ("query-balloon", json!({ "actual": actual })))
            .collect();
    lies.extend([json!([]), json!(7), json!({})].map(|value| ("query-balloon", value)));
    let summary = "query-memory-size-summary";
    lies.extend(
        [json!({}), json!({ "base-memory": -1 }), json!({ "base-memory": MIB })].map(|it| (summary, it)),
    );
    lies.push((summary, json!({ "base-memory": 512 * MIB, "plugged-memory": "none" })));
    lies.push(("qom-get guest-stats", json!({ "last-update": "yesterday", "stats": {} })));
    lies
}

#[test]
fn what_can_not_be_is_not_believed() {
    let mut pair = qemu(PATIENT);
    for (request, lie) in lies() {
        let words = lie.to_string();
        let state = pair.after(request, move |id| vec![returned(id, lie)]);
        assert_eq!(state.word(), Word::VmmNonsense, "{request}: {words}: {state}");
    }

    let mut pair = cloud_hypervisor(PATIENT);
    let info = |memory: Value, actual: Value| json!({ "config": { "memory": memory, "balloon": {} }, "state": "Running", "memory_actual_size": actual });
    for lie in [
        info(json!({ "size": MIB }), json!(2 * MIB)),
        info(json!({ "size": MIB }), json!(0)),
        info(json!({ "size": -1 }), json!(1)),
        info(json!({ "size": "1" }), json!(1)),
        json!({ "state": "Running" }),
        json!([]),
    ] {
        let answer = answer_of("200 OK", &lie.to_string());
        let state = pair.after("GET /api/v1/vm.info", move |_| vec![send(answer)]);
        assert_eq!(state.word(), Word::VmmNonsense, "{lie}: {state}");
    }
}

/// A guest that lies to its device makes its VMM say so at one look, and may be well at the next.
#[test]
fn a_size_that_can_not_be_is_looked_at_again_at_once() {
    let mut pair = qemu(PATIENT);
    assert!(pair.look().is_ok());
    pair.asked();
    for actual in [0, 513 * MIB] {
        pair.vmm.script("query-balloon", move |id| vec![returned(id, json!({ "actual": actual }))]);
        let state = pair.look().unwrap_err();
        assert!(state.to_string().contains("a guest of 536870912 bytes that has"), "{state}");
        assert!(pair.look().is_ok(), "it is not waited out");
    }
    assert!(!pair.asked().contains(&"greeting".to_owned()), "the connection is as good as ever");

    let mut pair = cloud_hypervisor(PATIENT);
    pair.vmm.vm().actual_bytes = 513 * MIB;
    assert_eq!(pair.look().unwrap_err().word(), Word::VmmNonsense);
    pair.vmm.vm().actual_bytes = 512 * MIB;
    assert!(pair.look().is_ok());
}

/// Sends this text and then nothing. What is behind the bound of an answer isn't read, and there is nobody to send it to.
fn says(text: &str) -> impl FnOnce(u64) -> Vec<Step> + Send + 'static {
    let text = text.to_owned();
    move |_| vec![send(text), Step::Hang]
}

#[test]
fn what_is_no_answer_at_all_has_an_end() {
    let endless = "x".repeat(10 << 20);
    let mut pair = qemu(PATIENT);
    for (request, text) in [
        ("greeting", "QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ".to_owned()),
        ("greeting", "{\"hello\": 1}\r\n".to_owned()),
        ("query-balloon", "(qemu) ".to_owned()),
        ("query-balloon", "{\"return\": }\r\n".to_owned()),
        ("query-balloon", "{\"neither\": 1}\r\n".to_owned()),
        ("query-balloon", endless.clone()),
        ("query-balloon", format!("{{\"return\": \"{endless}")),
        ("query-balloon", "{\"a\":".repeat(100_000)),
    ] {
        let state = pair.after(request, says(&text));
        assert_eq!(state.word(), Word::VmmNonsense, "{}: {state}", &text[..text.len().min(60)]);
        assert!(state.to_string().len() < 1500, "{state}");
    }

    let mut pair = cloud_hypervisor(PATIENT);
    for text in [
        endless.clone(),
        format!("HTTP/1.1 200 OK\r\nX: {endless}"),
        format!("HTTP/1.1 200 OK\r\nContent-Length: 20000000\r\n\r\n{endless}"),
        format!("HTTP/1.1 200 OK\r\n\r\n{endless}"),
        "{\"QMP\": {}}\r\n".to_owned(),
        answer_of("200 OK", "no JSON"),
    ] {
        let state = pair.after("GET /api/v1/vm.info", says(&text));
        assert_eq!(state.word(), Word::VmmNonsense, "{}: {state}", &text[..text.len().min(60)]);
    }
}
