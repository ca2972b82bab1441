//! The controller: a thread that looks at every squeezed VM once a tick, has the policy decide, and tells their VMMs. It
//! decides nothing itself. VMMs are asked side by side ([`asking`]), so that those that hang keep no other waiting for longer
//! than a call may take, however many they are. What it knows of a VM is gone with the daemon; the next one begins with what the guest has.

mod asking;
mod look;
mod own;
mod record;

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use self::own::OwnBalloon;
use self::record::Recorder;
use super::daemon::Daemon;
use super::served::Served;
use crate::balloon::trace::{Step, Tick};
use crate::balloon::vmm::cloud_hypervisor::CloudHypervisor;
use crate::balloon::vmm::qmp::Qmp;
use crate::balloon::vmm::{Backoff, Unreachable, VmmClient};
use crate::balloon::{Change, Given, Look, Mode, Pressure, Reason, Silence, State, Vmm, Word};
use crate::config::{SqueezeConfig, SqueezeVmm};
use crate::crash_point;
use crate::device::signals::blame;
use crate::reclaim::pressure::Level;
use crate::threads::{self, Role};

/// A guest that has less than it should by more than this was not given what we asked for, or somebody else took it.
const LESS_BYTES: u64 = 4 << 20;

/// What is shown of a VM's balloon: the last tick.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    /// What was decided, and on what grounds.
    pub(super) step: Step,
    /// The look that this rests on, if there was anything to see.
    pub(super) look: Option<Look>,
}

/// What is known of all balloons, for whoever asks.
#[derive(Debug)]
pub(super) struct Balloons {
    shown: Mutex<HashMap<String, Shown>>,
    /// Whether something was changed that the next tick should not wait for.
    changed: Mutex<bool>,
    bell: Condvar,
    /// Most bytes of all guests; `u64::MAX` for no bound.
    budget_bytes: AtomicU64,
    /// When the host was short of memory last, by the boot-time clock in milliseconds: moderately, severely.
    pressed_ms: [AtomicU64; 2],
}

impl Balloons {
    pub(super) fn new(budget_bytes: Option<u64>) -> Self {
        let budget_bytes = AtomicU64::new(budget_bytes.unwrap_or(u64::MAX));
        Self {
            shown: Mutex::default(),
            changed: Mutex::default(),
            bell: Condvar::new(),
            budget_bytes,
            pressed_ms: Default::default(),
        }
    }

    /// What was decided about a VM last, and on what grounds.
    pub(super) fn shown(&self, name: &str) -> Option<Shown> {
        self.shown.lock().get(name).cloned()
    }

    /// How a VM is squeezed was changed, or there is one more or less: the next tick is now, or half an interval after the
    /// last one.
    pub(super) fn look_now(&self) {
        *self.changed.lock() = true;
        self.bell.notify_one();
    }

    /// Waits until then, or until something is changed, which is looked at no sooner than at `soonest`: a tick is a step for
    /// every VM, however many of them somebody changes one after the other.
    fn sleep_until(&self, then: Instant, soonest: Instant) {
        let mut changed = self.changed.lock();
        while !*changed && !self.bell.wait_until(&mut changed, then).timed_out() {}
        while Instant::now() < soonest {
            self.bell.wait_until(&mut changed, soonest);
        }
        *changed = false;
    }

    /// The host is short of memory.
    pub(super) fn press(&self, level: Level) {
        self.pressed_ms[usize::from(level == Level::Severe)].store(look::now_ms(), Ordering::Relaxed);
    }

    pub(super) fn set_budget(&self, budget_bytes: Option<u64>) {
        self.budget_bytes.store(budget_bytes.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn budget_bytes(&self) -> Option<u64> {
        Some(self.budget_bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes < u64::MAX)
    }

    /// How short of memory the host was within the last `within_ms`.
    fn pressure(&self, now_ms: u64, within_ms: u64) -> Pressure {
        let lately = |pressed_ms: &AtomicU64| {
            let pressed_ms = pressed_ms.load(Ordering::Relaxed);
            pressed_ms > 0 && now_ms.saturating_sub(pressed_ms) <= within_ms
        };
        match &self.pressed_ms {
            [_, severe] if lately(severe) => Pressure::Severe,
            [moderate, _] if lately(moderate) => Pressure::Moderate,
            _ => Pressure::None,
        }
    }
}

/// Starts the controller.
pub(super) fn start(daemon: Arc<Daemon>, interval: Duration) -> io::Result<()> {
    threads::spawn("balloons", Role::Listener, move || {
        let recorder = Recorder::new(&daemon.config.state_dir);
        let mut controller = Controller { interval, recorder, guests: Vec::new(), daemon };
        let mut next = Instant::now();
        loop {
            controller.tick();
            // A tick that took too long is not made up for.
            next = (next + interval).max(Instant::now());
            controller.daemon.balloons.sleep_until(next, Instant::now() + interval / 2);
        }
    })?;
    Ok(())
}

struct Controller {
    daemon: Arc<Daemon>,
    interval: Duration,
    recorder: Recorder,
    guests: Vec<Guest>,
}

/// A squeezed VM.
struct Guest {
    served: Served,
    squeeze: SqueezeConfig,
    /// There is none for a VM that is quarantined: whose VMM crashes the daemon is not asked again.
    client: Option<Box<dyn VmmClient>>,
    state: State,
    given: Given,
    /// What its VMM was told last, in bytes, as far as that is known.
    told_bytes: Option<u64>,
    /// Whether its VMM may have a target from us that its guest is still on its way to.
    is_driven: bool,
    /// Why its VMM didn't take what it was told, as long as it isn't told again.
    refused: Backoff,
    turn: asking::Turn,
    /// What the log said last.
    logged: Option<Kind>,
}

/// A reason without its numbers; of a VMM that is silent, with the word for why.
type Kind = (std::mem::Discriminant<Reason>, Option<Word>);

impl Controller {
    fn tick(&mut self) {
        self.follow_configuration();
        let daemon = Arc::clone(&self.daemon);
        if self.guests.is_empty() {
            daemon.balloons.shown.lock().clear();
            return;
        }
        self.guests.iter_mut().filter_map(|guest| guest.client.as_mut()).for_each(|client| client.prepare());
        asking::put_off(&mut self.guests);
        let seen = asking::side_by_side(&mut self.guests, |guest| guest.on_its_account(&daemon, Guest::look));
        let interval_ms = u64::try_from(self.interval.as_millis()).unwrap_or(u64::MAX);
        let snapshots = self.guests.iter().zip(seen).map(|(guest, vmm)| {
            look::vm(&daemon, &guest.served.config, &guest.squeeze, &guest.served.device, vmm)
        });
        let snapshots = snapshots.collect();
        let mut states: Vec<State> = self.guests.iter().map(|guest| guest.state).collect();
        let tick = Tick::decide(look::host(&daemon, interval_ms), snapshots, &mut states);
        self.recorder.note(&tick);
        for ((guest, state), step) in self.guests.iter_mut().zip(states).zip(&tick.vms) {
            guest.state = state;
            guest.tell_shrinker(&daemon, step);
        }
        let mut told: Vec<(&mut Guest, Step)> = self.guests.iter_mut().zip(tick.vms).collect();
        asking::side_by_side(&mut told, |(guest, step)| {
            guest.on_its_account(&daemon, |guest| guest.tell(step));
        });
        let shown = told.into_iter().map(|(guest, step)| {
            guest.tell_log(&step);
            (step.snapshot.vm.clone(), Shown { step, look: guest.state.look })
        });
        let shown = shown.collect();
        *daemon.balloons.shown.lock() = shown;
    }

    /// VMs come and go, and how they are squeezed changes. Whose balloon we have nothing to do with any more is left as it is.
    fn follow_configuration(&mut self) {
        let mut before = std::mem::take(&mut self.guests);
        for served in self.daemon.served() {
            let Some(squeeze) = served.config.squeeze.clone() else { continue };
            let pages = self.daemon.store.ready(&served.config.name);
            let is_quarantined = pages.is_some_and(|pages| pages.table().crashes().is_quarantined());
            let same = before.iter().position(|guest| {
                guest.served.config.name == served.config.name
                    && guest.squeeze.vmm == squeeze.vmm
                    && guest.client.is_none() == is_quarantined
            });
            match same.map(|index| before.swap_remove(index)) {
                Some(guest) => {
                    // Another target is tried at once.
                    let is_same = guest.squeeze == squeeze;
                    let refused = if is_same { guest.refused } else { Backoff::default() };
                    self.guests.push(Guest { served, squeeze, refused, ..guest });
                }
                None if is_quarantined => {
                    // It still has the host's memory, which nobody else is to be given.
                    let target_bytes = self.recorder.last_had_bytes(&served.config.name);
                    let state = State { target_bytes, ..State::default() };
                    self.guests.push(Guest::new(None, served, squeeze, state));
                }
                None => {
                    let client = client(&self.daemon, &served.config.name, &squeeze.vmm);
                    self.guests.push(Guest::new(Some(client), served, squeeze, State::default()));
                }
            }
        }
        asking::side_by_side(&mut before, |guest| guest.on_its_account(&self.daemon, Guest::stop));
    }
}

impl Guest {
    fn new(client: Option<Box<dyn VmmClient>>, served: Served, squeeze: SqueezeConfig, state: State) -> Self {
        Self {
            served,
            squeeze,
            client,
            state,
            given: Given::default(),
            told_bytes: None,
            is_driven: false,
            refused: Backoff::default(),
            turn: asking::Turn::default(),
            logged: None,
        }
    }

    /// Does what concerns its VMM. Should that crash the daemon, it is written down for the VM.
    fn on_its_account<T>(&mut self, daemon: &Daemon, act: impl FnOnce(&mut Self) -> T) -> T {
        if self.client.is_none() {
            return act(self);
        }
        let pages = daemon.store.ready(&self.served.config.name);
        let _working = pages.as_ref().map(|pages| blame::working(pages.table()));
        crash_point::hearing(&self.served.config.name);
        act(self)
    }

    fn look(&mut self) -> Vmm {
        if matches!(self.squeeze.mode, Mode::Off | Mode::Observe) {
            self.stop();
        }
        if self.squeeze.mode == Mode::Off {
            return Vmm::Silent(Silence { word: Word::Off, text: "off".to_owned() });
        }
        let Some(client) = &mut self.client else {
            let text =
                "the VM is quarantined: its VMM isn't asked, and its guest keeps what it has".to_owned();
            return Vmm::Silent(Silence { word: Word::Quarantined, text });
        };
        let seen = self.turn.take(|| client.look(Instant::now()));
        if seen.is_err() {
            // It may be another VMM that comes back.
            self.told_bytes = None;
        }
        if let Err(Unreachable::Gone { .. }) = seen {
            self.refused = Backoff::default();
        }
        // One that answers and does nothing is as good as silent, until it is told again.
        match seen.and_then(|memory| self.refused.check(Instant::now()).map(|()| memory)) {
            Ok(memory) => Vmm::Answers(memory),
            Err(why @ Unreachable::Gone { .. }) => Vmm::Gone(why.to_string()),
            Err(why) => Vmm::Silent(Silence::from(&why)),
        }
    }

    /// Tells its VMM what was decided.
    fn tell(&mut self, step: &mut Step) {
        let target_bytes = step.decision.target_bytes;
        let Vmm::Answers(memory) = &step.snapshot.vmm else { return };
        let was_told = self.told_bytes == Some(target_bytes);
        // Larger balloons take their guests time, smaller ones hardly any: somebody else may have enlarged it.
        let has_less = memory.actual_bytes.saturating_add(LESS_BYTES) < target_bytes;
        if !step.decision.apply || (was_told && !has_less) {
            return;
        }
        if was_told {
            let actual_bytes = memory.actual_bytes;
            tracing::debug!(
                vm = self.served.config.name,
                actual_bytes,
                target_bytes,
                "the guest has less than it should: its VMM is told again"
            );
        }
        if let Err(why) = self.set_target(target_bytes) {
            // It is silent from now on, for whoever looks at this step too.
            let silence = Silence::from(&why);
            step.decision.reason = Reason::Silent(silence.clone());
            step.snapshot.vmm = Vmm::Silent(silence);
        }
    }

    /// Nobody drives its balloon any more: one that is on its way down stops where it is. Tried until its VMM has heard it.
    fn stop(&mut self) {
        let now = Instant::now();
        let Some(client) = self.client.as_mut().filter(|_| self.is_driven && self.refused.check(now).is_ok())
        else {
            return;
        };
        let told_bytes = self.told_bytes.take();
        let stopped = client.look(now).and_then(|memory| {
            let is_on_its_way = told_bytes.is_none_or(|told_bytes| told_bytes < memory.actual_bytes);
            if is_on_its_way { client.set_target(memory.actual_bytes, now) } else { Ok(()) }
        });
        match stopped {
            Err(why) if !matches!(why, Unreachable::Gone { .. } | Unreachable::NoBalloon { .. }) => {
                if self.refused.is_well() {
                    let vm = &self.served.config.name;
                    tracing::info!(vm, %why, "the VMM was not told that its guest is to keep what it has");
                }
                self.refused.put_off(why, now);
            }
            _ => (self.is_driven, self.refused) = (false, Backoff::default()),
        }
    }

    fn set_target(&mut self, target_bytes: u64) -> Result<(), Unreachable> {
        let Some(client) = &mut self.client else { return Ok(()) };
        self.is_driven = true;
        let told = client.set_target(target_bytes, Instant::now());
        self.told_bytes = told.is_ok().then_some(target_bytes);
        match &told {
            Ok(()) => self.refused = Backoff::default(),
            Err(why) => self.refused.put_off(why.clone(), Instant::now()),
        }
        told
    }

    /// What a guest with much more memory will soon want comes back from the file, ahead of its faults.
    fn tell_shrinker(&mut self, daemon: &Daemon, step: &Step) {
        let change = self.given.note(step);
        let Some(vm) = daemon.store.ready(&self.served.config.name).map(|pages| pages.id()) else { return };
        match change {
            Change::Little => {}
            Change::Given(pages) => daemon.shrinker.read_back(vm, pages),
            Change::Taken => daemon.shrinker.stop_reading_back(vm),
        }
    }

    /// What is new is told; each step of many is for whoever asks for more.
    fn tell_log(&mut self, step: &Step) {
        let decision = &step.decision;
        let target_bytes = decision.apply.then_some(decision.target_bytes);
        let whose = if step.snapshot.mode == Mode::Observe { "balloon, only observed" } else { "balloon" };
        let is_silent = matches!(decision.reason, Reason::Silent(_));
        let kind = (std::mem::discriminant(&decision.reason), is_silent.then(|| decision.reason.word()));
        let name = &self.served.config.name;
        if self.logged.replace(kind) == Some(kind) {
            tracing::debug!(vm = name, target_bytes, "{whose}: {}", decision.reason);
        } else {
            tracing::info!(vm = name, target_bytes, "{whose}: {}", decision.reason);
        }
    }
}

fn client(daemon: &Arc<Daemon>, vm: &str, vmm: &SqueezeVmm) -> Box<dyn VmmClient> {
    match vmm {
        SqueezeVmm::Qemu(socket) => Box::new(Qmp::new(socket.clone())),
        SqueezeVmm::CloudHypervisor(socket) => Box::new(CloudHypervisor::new(socket.clone())),
        SqueezeVmm::VhostUser => Box::new(OwnBalloon::new(Arc::clone(daemon), vm)),
    }
}
