//! The thread that scrubs. What it was asked for last is its order, a check or a round, one at a time; a check comes
//! before the round, which goes on after it where it was.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::pace::{Pace, step_pages};
use super::progress::{BAD_SHOWN_MAX, Order, Progress, State, pages_of};
use super::walk::{Seen, Walk};
use crate::page::PAGE_SIZE_U64;
use crate::store::codec::Scratch;
use crate::store::{Store, VmState};
use crate::threads::{self, Role};

/// How long a scrubber with nothing to do sleeps, when nobody wakes it.
const REST: Duration = Duration::from_secs(3600);

/// Why a check did not begin: there is no such VM, or it is out of service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the VM {name:?} can't be checked")]
pub struct UnknownVm {
    /// What was asked for.
    pub name: String,
}

/// What is asked and answered between the thread and everybody else.
#[derive(Debug, Default)]
struct Desk {
    papers: Mutex<Papers>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Papers {
    /// The check that was asked for last.
    check: Option<Progress>,
    /// The time for a round; `None` for no rounds.
    period: Option<Duration>,
    /// Whether that is another than it was.
    period_is_new: bool,
    stop: bool,
}

/// Some pages that are being looked at.
struct Task {
    walk: Walk,
    pace: Pace,
}

impl Task {
    fn over(names: impl IntoIterator<Item = String>) -> Self {
        Self { walk: Walk::over(names), pace: Pace::new(Instant::now()) }
    }
}

/// The scrubber's state.
pub struct Scrubber {
    store: Arc<Store>,
    desk: Arc<Desk>,
    /// The check under way, by its number.
    check: Option<(u64, Task)>,
    round: Option<Task>,
    /// Pages of this round, and bad ones among them.
    round_pages: (u64, u64, u64),
    scratch: Scratch,
}

/// The running scrubber. Dropping it stops and joins the thread.
#[derive(Debug)]
pub struct Handle {
    store: Arc<Store>,
    desk: Arc<Desk>,
    thread: Option<JoinHandle<()>>,
}

impl Scrubber {
    /// A scrubber of `store` that looks at every page once in `period`, if there is one, and at what it is told to.
    #[must_use]
    pub fn new(store: Arc<Store>, period: Option<Duration>) -> Self {
        let desk = Arc::new(Desk::default());
        desk.papers.lock().period = period;
        let scratch = Scratch::default();
        Self { store, desk, check: None, round: None, round_pages: (0, 0, 0), scratch }
    }

    /// Runs it on a thread of its own.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn start(mut self) -> io::Result<Handle> {
        let (store, desk) = (Arc::clone(&self.store), Arc::clone(&self.desk));
        let thread = threads::spawn("scrubber", Role::Scrubber, move || self.run())?;
        Ok(Handle { store, desk, thread: Some(thread) })
    }

    fn run(&mut self) {
        let desk = Arc::clone(&self.desk);
        loop {
            let wait = self.turn();
            let mut papers = desk.papers.lock();
            let news = |papers: &Papers| {
                papers.stop
                    || papers.period_is_new
                    || running(papers).is_some_and(|number| self.check_number() != Some(number))
            };
            if !wait.is_zero() && !news(&papers) {
                let _ = desk.wake.wait_for(&mut papers, wait);
            }
            papers.period_is_new = false;
            if papers.stop {
                return;
            }
        }
    }

    fn check_number(&self) -> Option<u64> {
        self.check.as_ref().map(|(number, _)| *number)
    }

    /// Takes one step. How long there is nothing to do then.
    fn turn(&mut self) -> Duration {
        let order = {
            let papers = self.desk.papers.lock();
            running(&papers).and_then(|number| Some((number, papers.check.as_ref()?.order.clone())))
        };
        match order {
            Some((number, order)) => self.check(number, &order),
            None => self.round(),
        }
    }

    #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact")]
    fn check(&mut self, number: u64, order: &Order) -> Duration {
        let mut task = match self.check.take() {
            Some((same, task)) if same == number => task,
            _ => Task::over(names(&self.store, order.vm.as_deref())),
        };
        let rate = order.rate_bytes as f64 / PAGE_SIZE_U64 as f64;
        let (wait, seen) = self.step(&mut task, rate, Some(number));
        self.check = Some((number, task));
        if let Some(seen) = seen {
            self.note(number, seen);
        }
        wait
    }

    #[allow(clippy::cast_precision_loss, reason = "a rate need not be exact")]
    fn round(&mut self) -> Duration {
        self.check = None;
        let Some(period) = self.desk.papers.lock().period else { return REST };
        let mut task = self.round.take().unwrap_or_else(|| Task::over(names(&self.store, None)));
        let pages: u64 = self.store.in_use().iter().map(|vm| pages_of(&vm.accounting().held)).sum();
        let (wait, seen) = self.step(&mut task, pages as f64 / period.as_secs_f64(), None);
        if let Some(seen) = seen {
            let (pages, bad, missing) = &mut self.round_pages;
            *pages += u64::from(seen.pages());
            *bad += u64::from(seen.bad_pages);
            *missing += u64::from(seen.missing_pages);
            if seen.ended {
                if *missing > 0 {
                    tracing::info!(
                        pages,
                        bad,
                        missing,
                        "every stored page was looked at that is in no missing file"
                    );
                } else if *pages > 0 {
                    tracing::info!(pages, bad, "every stored page was looked at");
                }
                self.round_pages = (0, 0, 0);
                task.walk = Walk::over(names(&self.store, None));
            }
        }
        self.round = Some(task);
        wait
    }

    /// Takes a step, if one is due.
    fn step(&mut self, task: &mut Task, rate: f64, number: Option<u64>) -> (Duration, Option<Seen>) {
        let wait = task.pace.wait(Instant::now());
        if !wait.is_zero() {
            return (wait, None);
        }
        let stopped = || {
            let papers = self.desk.papers.lock();
            papers.stop || running(&papers) != number
        };
        let seen = task.walk.step(&self.store, step_pages(rate), &mut self.scratch, stopped);
        if let Some(seen) = &seen {
            task.pace.spent(seen.pages(), rate, Instant::now());
        }
        (task.pace.wait(Instant::now()), seen)
    }

    fn note(&self, number: u64, seen: Seen) {
        let mut papers = self.desk.papers.lock();
        let Some(progress) = papers.check.as_mut().filter(|progress| progress.number == number) else {
            return;
        };
        progress.same_filled_pages += u64::from(seen.same_filled_pages);
        progress.arena_pages += u64::from(seen.arena_pages);
        progress.file_pages += u64::from(seen.file_pages);
        progress.bad_pages += u64::from(seen.bad_pages);
        progress.missing_pages += u64::from(seen.missing_pages);
        progress.bad.extend(seen.bad);
        progress.bad.truncate(BAD_SHOWN_MAX);
        if seen.ended {
            progress.state = State::Done;
        }
    }
}

/// The number of the check that is to be done.
fn running(papers: &Papers) -> Option<u64> {
    papers.check.as_ref().filter(|check| check.state == State::Running).map(|check| check.number)
}

/// The VMs in use, or the one that is wanted.
fn names(store: &Store, wanted: Option<&str>) -> Vec<String> {
    let names = store.in_use().into_iter().map(|vm| vm.table().name().to_owned());
    names.filter(|name| wanted.is_none_or(|wanted| wanted == name)).collect()
}

impl Handle {
    /// Begins a check, in place of one that may be under way.
    ///
    /// # Errors
    /// When it is to be of one VM, and that one is not there or out of service.
    pub fn check(&self, order: Order) -> Result<Progress, UnknownVm> {
        let vms = self.store.in_use();
        let wanted = |name: &str| order.vm.as_deref().is_none_or(|wanted| wanted == name);
        if let Some(name) = &order.vm
            && !vms.iter().any(|vm| vm.table().name() == name)
        {
            return Err(UnknownVm { name: name.clone() });
        }
        let vms = vms.iter().filter(|vm| wanted(vm.table().name()));
        let pages = vms.map(|vm| pages_of(&vm.accounting().held)).sum();
        let mut not_checked = Vec::new();
        self.store.for_each(|name, vm| {
            if matches!(vm, VmState::Damaged(_)) && wanted(name) {
                not_checked.push(name.to_owned());
            }
        });
        let mut papers = self.desk.papers.lock();
        let number = papers.check.as_ref().map_or(1, |before| before.number + 1);
        let progress = Progress::new(number, order, pages, not_checked);
        papers.check = Some(progress.clone());
        self.desk.wake.notify_one();
        Ok(progress)
    }

    /// Changes the time for a round; `None` for no rounds.
    pub fn set_period(&self, period: Option<Duration>) {
        let mut papers = self.desk.papers.lock();
        (papers.period, papers.period_is_new) = (period, true);
        self.desk.wake.notify_one();
    }

    /// How far the check is that was asked for last.
    #[must_use]
    pub fn progress(&self) -> Option<Progress> {
        self.desk.papers.lock().check.clone()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.desk.papers.lock().stop = true;
        self.desk.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
