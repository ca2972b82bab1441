//! One running queue of a balloon: takes heads in order, carries out what they ask for a bounded number of pages at a
//! time, and answers in order. So what was not answered is what lies behind the used index, and a ring that starts goes
//! on from there, whatever the VMM says: nothing that was in flight is lost when a daemon dies, and to carry it out
//! twice changes nothing. A ring that makes no sense is latched as broken and left alone.

use std::sync::atomic::Ordering;

use vhost_user_backend::VringT;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestAddress;

use super::config_space::Role;
use super::pages;
use super::turn::{CALL_COST, Turn};
use crate::device::chain::{DescriptorTable, walk};
use crate::device::complaints::Complaint;
use crate::device::doorbell;
use crate::device::guest_memory::is_lost;
use crate::device::ring::Vring;
use crate::device::segments::Segments;
use crate::device::view::View;
use crate::page::PAGE_SIZE_U64;

/// Numbers of pages that are looked at together, so that neighbours are one run.
const BATCH_PAGES: usize = 256;
/// Pages that one head may name. Linux names 256, Windows 1024.
const HEAD_PAGES_MAX: u64 = 65536;
/// Bytes of a reported range that are returned at once.
const STEP_BYTES: usize = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Waiting,
    Running,
    Broken,
}

/// A head that was not answered yet.
struct Job {
    head: u16,
    left: Segments,
    /// Pages that it may still name.
    pages_left: u64,
}

enum Step {
    Done,
    Unfinished(Job),
    /// The head is answered when there is a wish.
    Hold(u16),
}

/// The ring's indices or addresses make no sense.
struct Broken;

impl<E: std::error::Error> From<E> for Broken {
    fn from(_: E) -> Self {
        Self
    }
}

/// A running queue.
pub struct Ring {
    vring: Vring,
    role: Role,
    phase: Phase,
    job: Option<Job>,
    /// The buffer by which the guest is asked for statistics.
    held: Option<u16>,
    /// The next statistics were left there some time ago.
    are_old: bool,
}

impl Ring {
    /// A ring that starts with its first turn.
    #[must_use]
    pub fn new(vring: Vring, role: Role) -> Self {
        Self { vring, role, phase: Phase::Waiting, job: None, held: None, are_old: false }
    }

    /// The queue.
    #[must_use]
    pub fn vring(&self) -> &Vring {
        &self.vring
    }

    /// Works for one turn. Says whether there may be more to do.
    pub fn turn(&mut self, turn: &mut Turn<'_>) -> bool {
        if self.phase == Phase::Waiting {
            self.phase = if self.start(turn).is_ok() { Phase::Running } else { self.broken(turn) };
        }
        if self.phase == Phase::Broken {
            return false;
        }
        self.work(turn).unwrap_or_else(|Broken| {
            self.phase = self.broken(turn);
            false
        })
    }

    /// Asks the guest for a kick. Says whether there is something to do already.
    #[must_use]
    pub fn listen(&self) -> bool {
        // While a buffer is held nothing more is taken.
        let takes = self.phase == Phase::Running && self.held.is_none();
        takes && matches!(self.vring.enable_notification(), Ok(true))
    }

    /// Stops: what was taken and not answered will be taken again.
    pub fn stop(self) {
        let next_used = self.vring.get_ref().get_queue().next_used();
        if self.phase == Phase::Running {
            self.vring.set_queue_next_avail(next_used);
        }
    }

    fn start(&mut self, turn: &mut Turn<'_>) -> Result<(), Broken> {
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        queue.set_ready(true);
        if !queue.is_valid(turn.memory) {
            return Err(Broken);
        }
        let used_index = queue.used_idx(turn.memory, Ordering::Acquire)?.0;
        queue.set_next_used(used_index);
        queue.set_next_avail(used_index);
        // A driver begins with rings of zeros. One that has used up just 65536 buffers looks like that too, and is taken
        // for a new one: its balloon is counted from nothing then.
        if self.role == Role::Inflate {
            turn.is_new_driver = used_index == 0;
            turn.begins = turn.is_new_driver;
        }
        if turn.begins {
            turn.given.clear();
        }
        self.are_old = used_index != 0 || !turn.is_new_driver;
        // A predecessor may have died between an answer and its signal.
        doorbell::call(&vring)?;
        Ok(())
    }

    fn broken(&mut self, turn: &mut Turn<'_>) -> Phase {
        (self.job, self.held) = (None, None);
        turn.numbers.malformed = turn.numbers.malformed.saturating_add(1);
        if turn.vm.complaints().is_news(Complaint::BrokenRing) {
            let (vm, role) = (turn.vm.name(), self.role);
            if is_lost(turn.memory) {
                tracing::warn!(
                    vm,
                    "the VMM has cut the guest's memory short: its balloon is not served any more"
                );
            } else {
                tracing::warn!(vm, ?role, "a queue of the balloon makes no sense and is left alone");
            }
        }
        Phase::Broken
    }

    fn work(&mut self, turn: &mut Turn<'_>) -> Result<bool, Broken> {
        if is_lost(turn.memory) {
            return Err(Broken);
        }
        let vring = self.vring.clone();
        let mut vring = vring.get_mut();
        let (mut answers, mut more) = (0u32, true);
        while turn.cost_left > 0 {
            let done = if let Some(held) = self.held {
                if !std::mem::take(&mut turn.wish) {
                    more = false;
                    break;
                }
                self.held = None;
                held
            } else {
                let Some(job) = self.next(vring.get_queue_mut(), turn)? else {
                    more = false;
                    break;
                };
                let head = job.head;
                let step = self.proceed(job, turn);
                if is_lost(turn.memory) {
                    return Err(Broken);
                }
                match step {
                    Step::Done => head,
                    Step::Unfinished(job) => {
                        self.job = Some(job);
                        continue;
                    }
                    Step::Hold(head) => {
                        self.held = Some(head);
                        continue;
                    }
                }
            };
            vring.get_queue_mut().add_used(turn.memory, done, 0)?;
            answers = answers.saturating_add(1);
        }
        if answers > 0 && vring.needs_notification()? {
            doorbell::call(&vring)?;
        }
        Ok(more)
    }

    /// The head that was begun, or the next one.
    fn next(&mut self, queue: &mut Queue, turn: &mut Turn<'_>) -> Result<Option<Job>, Broken> {
        if let Some(job) = self.job.take() {
            return Ok(Some(job));
        }
        let offered = queue.avail_idx(turn.memory, Ordering::Acquire)?.0;
        let next = queue.iter(turn.memory)?.next().map(|chain| chain.head_index());
        let Some(head) = next else {
            // An index that says there is more than can be read would keep us looking for ever.
            return if offered == queue.next_avail() { Ok(None) } else { Err(Broken) };
        };
        if head >= queue.size() {
            return Err(Broken);
        }
        turn.cost_left = turn.cost_left.saturating_sub(CALL_COST);
        let table = DescriptorTable { address: GuestAddress(queue.desc_table()), size: queue.size() };
        let chain = walk(&View::new(turn.memory), table, head);
        let left = chain.and_then(|chain| match self.role {
            Role::Report => Some(chain.writable),
            Role::None => None,
            Role::Inflate | Role::Deflate | Role::Stats => (!chain.unreachable).then_some(chain.readable),
        });
        let left = left.unwrap_or_else(|| {
            turn.numbers.malformed = turn.numbers.malformed.saturating_add(1);
            if turn.vm.complaints().is_news(Complaint::Malformed) {
                let (vm, role) = (turn.vm.name(), self.role);
                tracing::warn!(
                    vm,
                    ?role,
                    "a chain for the balloon makes no sense, or lies outside the guest's memory"
                );
            }
            Segments::default()
        });
        let pages_left = match self.role {
            // More than all of it, and it was said twice.
            Role::Report => pages::memory_bytes(turn.memory) / PAGE_SIZE_U64,
            _ => HEAD_PAGES_MAX,
        };
        Ok(Some(Job { head, left, pages_left }))
    }

    fn proceed(&mut self, mut job: Job, turn: &mut Turn<'_>) -> Step {
        match self.role {
            _ if job.left.is_empty() => return Step::Done,
            Role::Inflate | Role::Deflate => {
                let most = usize::try_from(job.pages_left).unwrap_or(BATCH_PAGES).min(BATCH_PAGES);
                pages::take_numbers(turn.memory, &mut job.left, most, &mut turn.batch);
                let taken = turn.batch.len() as u64;
                // What was read from memory that isn't there any more is nobody's word.
                if taken == 0 || is_lost(turn.memory) {
                    return Step::Done;
                }
                job.pages_left = job.pages_left.saturating_sub(taken);
                if self.role == Role::Inflate { turn.inflate() } else { turn.deflate() }
            }
            Role::Report => {
                let Some((address, length)) = job.left.take_front(STEP_BYTES) else { return Step::Done };
                let bytes = length as u64;
                job.pages_left = job.pages_left.saturating_sub(bytes.div_ceil(PAGE_SIZE_U64));
                turn.report(address, bytes);
            }
            Role::Stats => {
                turn.read_stats(&mut job.left, std::mem::take(&mut self.are_old));
                return Step::Hold(job.head);
            }
            Role::None => return Step::Done,
        }
        if job.pages_left == 0 && !job.left.is_empty() {
            let unit = if self.role == Role::Report { PAGE_SIZE_U64 } else { 4 };
            turn.refuse(job.left.length().checked_div(unit).unwrap_or(0));
            return Step::Done;
        }
        Step::Unfinished(job)
    }
}
