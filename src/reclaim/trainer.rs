//! Which VM gets a dictionary, and when another one: one is trained as soon as there are pages enough to learn from, and again
//! when pages that were compressed with it lately are larger than those at first. A new one is taken only if pages that it
//! did not learn from become smaller with it.
//!
//! Training takes some tenths of a second of a processor, so it has a thread of its own, one at a time; the pages of a VM
//! that is to have a dictionary wait for it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::ids::{Slot, VmId};
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};
use crate::store::codec::{Compressor, Dictionary, DictionaryNumber, Encoder, Scratch, train};
use crate::store::histogram::Sizes;
use crate::store::pool::PoolId;
use crate::store::vm::{Checked, VmStore};
use crate::threads::{self, Role};

/// Most pages that are learned from, and tried on.
const SAMPLE_PAGES: usize = 1024;
/// Fewer are not worth a dictionary, which takes as much memory as twenty of them.
const SAMPLE_PAGES_MIN: usize = 256;
/// One of so many sampled pages is tried on and not learned from.
const TRIED_ON: usize = 4;
/// A dictionary has to save so much, of a hundred bytes, to be taken.
const WORTHWHILE_PERCENT: u64 = 3;
/// And so much of all pages that it is for: more than it takes itself.
const WORTHWHILE_BYTES: u64 = 128 << 10;
/// Of the time that a training took, so many times pass before the next: it is a part of what all this may take of a core.
const PAUSE_TIMES: u32 = 10;
/// Pages are that much larger than at first, of a hundred bytes, when another dictionary is tried.
const DRIFT_PERCENT: u64 = 10;
/// Pages of whose sizes a mean is made.
const MEAN_PAGES: u64 = 4096;
/// The longest that a VM waits from one training to the next.
const WAIT_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// See the top of the file.
#[derive(Debug, Default)]
pub(super) struct Trainer {
    known: BTreeMap<VmId, Known>,
    job: Option<Job>,
    not_before: Option<Instant>,
    wait_min: Duration,
}

/// What is known of a VM.
#[derive(Debug, Default)]
struct Known {
    /// Trainings so far.
    trained: u32,
    not_before: Option<Instant>,
    /// When the last one ended.
    since: Option<Instant>,
    /// The pool that the sizes below are of: another's say nothing.
    pool: Option<PoolId>,
    /// The mean payload of the first pages after the last training, in bytes.
    at_first: Option<u64>,
    /// Pages since, and bytes of their payloads.
    pages: u64,
    bytes: u64,
    drifted: bool,
    /// What the VM had ever stored when it was last looked at, if it was since the last training.
    stored: Option<Sizes>,
}

/// What is to be done before the pages of a VM are compressed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Preparation {
    /// Nothing.
    Ready,
    /// To wait: its dictionary is being trained, or will be once another is.
    Waiting,
    /// To find a [`Sample`] of them.
    Wanted,
}

/// Slots out of a walk over a VM's pages, evenly spread however many there are.
#[derive(Debug)]
pub(super) struct Sample {
    slots: Vec<Slot>,
    /// One of so many is taken.
    step: usize,
    seen: usize,
}

impl Default for Sample {
    fn default() -> Self {
        Self { slots: Vec::new(), step: 1, seen: 0 }
    }
}

impl Sample {
    /// The next page of the walk.
    pub(super) fn offer(&mut self, slot: Slot) {
        if self.seen.is_multiple_of(self.step) {
            self.slots.push(slot);
        }
        self.seen += 1;
        if self.slots.len() > SAMPLE_PAGES {
            let mut keep = false;
            self.slots.retain(|_| {
                keep = !keep;
                keep
            });
            self.step *= 2;
        }
    }
}

#[derive(Debug)]
struct Job {
    vm: VmId,
    began: Instant,
    thread: JoinHandle<Option<Trained>>,
}

/// A dictionary that is better than what there was.
#[derive(Debug)]
struct Trained {
    bytes: Vec<u8>,
    saves_percent: u64,
}

impl Known {
    /// So many pages became payloads of so many bytes.
    fn observe(&mut self, pages: u64, payload_bytes: u64) {
        self.pages += pages;
        self.bytes += payload_bytes;
        if self.pages < MEAN_PAGES {
            return;
        }
        let mean = self.bytes / self.pages;
        (self.pages, self.bytes) = (0, 0);
        match self.at_first {
            None => self.at_first = Some(mean),
            Some(first) => self.drifted |= mean * 100 > first * (100 + DRIFT_PERCENT),
        }
    }

    /// The same of all that were stored since this was last asked, when so much was `stored` ever.
    fn observe_stored(&mut self, stored: Sizes) {
        if let Some(before) = self.stored.replace(stored) {
            self.observe(
                stored.pages().saturating_sub(before.pages()),
                stored.sum.saturating_sub(before.sum),
            );
        }
    }

    fn is_due(&self, has_one: bool, now: Instant) -> bool {
        (self.drifted || !has_one) && self.not_before.is_none_or(|at| now >= at)
    }

    /// Notes that there was a training, whatever came of it. The first is followed by the shortest wait, each by twice the
    /// one before.
    fn note_training(&mut self, now: Instant, wait_min: Duration) {
        let wait = wait_min.saturating_mul(1 << self.trained.min(20)).min(WAIT_MAX);
        let (trained, not_before) = (self.trained + 1, now.checked_add(wait));
        *self = Self { trained, not_before, since: Some(now), ..Self::default() };
    }

    /// From now on sizes are of this pool.
    fn follow(&mut self, pool: PoolId) {
        if self.pool != Some(pool) {
            let Self { trained, not_before, since, .. } = *self;
            *self = Self { trained, not_before, since, pool: Some(pool), ..Self::default() };
        }
    }
}

impl Trainer {
    /// How long a VM waits at least from its first training to the next.
    pub(super) fn set_wait(&mut self, wait_min: Duration) {
        self.wait_min = wait_min;
    }

    /// A page of the VM was compressed anew for the pool that dictionaries are learned for.
    pub(super) fn observe(&mut self, vm: VmId, payload_bytes: usize) {
        self.known.entry(vm).or_default().observe(1, payload_bytes as u64);
    }

    /// Whether the pages of a VM can be compressed for `pool` with what dictionary there is. `of_all` says that they are when
    /// they are stored, so that those tell how well it suits.
    pub(super) fn prepare(&mut self, vm: &VmStore, pool: PoolId, of_all: bool) -> Preparation {
        if let Some(job) = self.job.take_if(|job| job.vm == vm.id() && job.thread.is_finished()) {
            self.finish(vm, job);
        }
        let known = self.known.entry(vm.id()).or_default();
        known.follow(pool);
        if of_all {
            known.observe_stored(vm.accounting().events.compressed_bytes);
        }
        let dictionaries = vm.dictionaries();
        let due = !dictionaries.is_full() && known.is_due(dictionaries.current().is_some(), Instant::now());
        let pauses = self.not_before.is_some_and(|at| Instant::now() < at);
        match &self.job {
            Some(job) if due || job.vm == vm.id() => Preparation::Waiting,
            None if due && pauses => Preparation::Waiting,
            None if due => Preparation::Wanted,
            _ => Preparation::Ready,
        }
    }

    /// How long ago the last training for a VM ended: what is older is what the dictionary was learned from. For one that had
    /// none, all pages are younger than this.
    pub(super) fn last_training(&self, vm: VmId) -> Duration {
        let since = self.known.get(&vm).and_then(|known| known.since);
        since.map_or(Duration::MAX, |since| since.elapsed())
    }

    /// Begins to train a dictionary for pages that are compressed at `level`, on those in `slots`. If they are too few, a VM
    /// without one waits for more: so few pages are worth little, and what was compressed before stays without.
    pub(super) fn begin(&mut self, vm: &VmStore, level: i32, sample: Sample, scratch: &mut Scratch) {
        let (mut pages, mut page) = (Vec::new(), ZERO_PAGE);
        let seen = sample.seen as u64;
        for slot in sample.slots {
            if matches!(vm.check(slot, &mut page, scratch), Ok(Checked::Arena(_))) {
                pages.extend_from_slice(&page);
            }
        }
        let known = self.known.entry(vm.id()).or_default();
        if pages.len() < SAMPLE_PAGES_MIN * PAGE_SIZE {
            if vm.dictionaries().current().is_some() {
                known.not_before = Instant::now().checked_add(self.wait_min);
            }
            return;
        }
        match start(vm.table().name(), pages, seen, vm.dictionaries().encoder(level), level) {
            Ok(thread) => self.job = Some(Job { vm: vm.id(), began: Instant::now(), thread }),
            Err(err) => {
                tracing::warn!(%err, vm = vm.table().name(), "a dictionary can't be trained");
                known.note_training(Instant::now(), self.wait_min);
            }
        }
    }

    /// Whether a dictionary is being trained.
    pub(super) fn is_busy(&self) -> bool {
        self.job.is_some()
    }

    /// Forgets VMs that are gone.
    pub(super) fn retain(&mut self, is_there: impl Fn(VmId) -> bool) {
        self.known.retain(|vm, _| is_there(*vm));
        self.job.take_if(|job| !is_there(job.vm));
    }

    fn finish(&mut self, vm: &VmStore, job: Job) {
        self.known.entry(vm.id()).or_default().note_training(Instant::now(), self.wait_min);
        self.not_before = Instant::now().checked_add(job.began.elapsed() * PAUSE_TIMES);
        let name = vm.table().name();
        let Ok(Some(trained)) = job.thread.join() else {
            tracing::info!(vm = name, "no dictionary makes the VM's pages smaller than they are");
            return;
        };
        let bytes = trained.bytes.len();
        match vm.dictionaries().add(trained.bytes) {
            Ok(number) => {
                let saves_percent = trained.saves_percent;
                tracing::info!(vm = name, %number, bytes, saves_percent, "the VM has a new dictionary");
            }
            Err(err) => tracing::warn!(vm = name, %err, "the VM has no new dictionary"),
        }
    }
}

fn start(
    vm: &str,
    sample: Vec<u8>,
    seen: u64,
    before: Option<Arc<Encoder>>,
    level: i32,
) -> io::Result<JoinHandle<Option<Trained>>> {
    let vm = vm.to_owned();
    threads::spawn("trainer", Role::Shrinker, move || learn(&vm, &sample, seen, before.as_deref(), level))
}

/// A dictionary for the VM of this name, out of the `sample` of its pages, of which there are so many as were `seen`, if it is worth its while; pages were
/// compressed with `before` until now.
fn learn(vm: &str, sample: &[u8], seen: u64, before: Option<&Encoder>, level: i32) -> Option<Trained> {
    let (pages, _) = sample.as_chunks::<PAGE_SIZE>();
    let (mut learned, mut tried) = (Vec::new(), Vec::new());
    for (number, page) in pages.iter().enumerate() {
        if number % TRIED_ON == 0 { tried.push(page) } else { learned.extend_from_slice(page) }
    }
    let bytes = train(&learned).ok()?;
    let made = Dictionary::new(vm, DictionaryNumber::new(1)?, bytes)?;
    let size = |encoder: Option<&Encoder>| payload_bytes(&tried, encoder, level);
    let (old, new) = (size(before), size(made.encoder(level).as_ref()));
    let saves_percent = old.saturating_sub(new) * 100 / old.max(1);
    let saves_bytes = old.saturating_sub(new) * seen / (tried.len() as u64).max(1);
    (saves_percent >= WORTHWHILE_PERCENT && saves_bytes >= WORTHWHILE_BYTES)
        .then(|| Trained { bytes: made.bytes().to_vec(), saves_percent })
}

fn payload_bytes(pages: &[&Page], encoder: Option<&Encoder>, level: i32) -> u64 {
    let mut scratch = Scratch::default();
    let compressor = Compressor::ZstdWithDictionary(level);
    pages.iter().map(|page| scratch.compress(compressor, encoder, page).1.len() as u64).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const WAIT: Duration = Duration::from_secs(600);

    #[test]
    fn a_vm_without_a_dictionary_is_due_and_each_training_doubles_the_wait() {
        let (mut known, mut now) = (Known::default(), Instant::now());
        for wait in [600, 1200, 2400] {
            assert!(known.is_due(false, now) && !known.is_due(true, now));
            known.note_training(now, WAIT);
            now += Duration::from_secs(wait - 1);
            assert!(!known.is_due(false, now));
            now += Duration::from_secs(1);
        }
    }

    #[test]
    fn pages_that_have_become_larger_are_worth_another_dictionary() {
        let (mut known, now) = (Known::default(), Instant::now());
        let mut pages = |bytes: u64| {
            (0..MEAN_PAGES).for_each(|_| known.observe(1, bytes));
            known.is_due(true, now)
        };
        assert!(!pages(500) && !pages(300) && !pages(549));
        assert!(pages(556));
        assert!(pages(400), "the next one would be of what there was in between as well");
        known.note_training(now, WAIT);
        assert!(!known.is_due(true, now + WAIT_MAX));
    }

    #[test]
    fn stored_pages_count_from_the_first_look_after_a_training() {
        let (mut known, mut stored, now) = (Known::default(), Sizes::default(), Instant::now());
        let mut store = |known: &mut Known, bytes: usize| {
            (0..MEAN_PAGES).for_each(|_| stored.count(bytes));
            known.observe_stored(stored);
            known.is_due(true, now + WAIT)
        };
        assert!(!store(&mut known, 300), "before anybody looked");
        assert!(!store(&mut known, 500) && !store(&mut known, 549) && store(&mut known, 556));
        known.note_training(now, WAIT);
        assert!(!store(&mut known, 100) && !store(&mut known, 556) && !store(&mut known, 560));
        assert!(store(&mut known, 700));
    }

    #[test]
    fn sizes_of_another_pool_are_forgotten_and_trainings_are_not() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.note_training(now, WAIT);
        known.follow(PoolId::from_bits(1));
        known.observe(MEAN_PAGES, 300 * MEAN_PAGES);
        known.follow(PoolId::from_bits(1));
        known.observe(MEAN_PAGES, 400 * MEAN_PAGES);
        assert!(known.is_due(true, now + WAIT));
        known.follow(PoolId::from_bits(2));
        known.observe(MEAN_PAGES, 700 * MEAN_PAGES);
        assert!(!known.is_due(true, now + WAIT), "a codec that is less dense is no drift");
        assert!(known.is_due(false, now + WAIT) && !known.is_due(false, now) && known.trained == 1);
    }

    #[test]
    fn a_sample_is_spread_over_all_that_was_offered() {
        for offered in [1, 100, 1024, 1025, 5000, 100_000] {
            let mut sample = Sample::default();
            (0..offered).for_each(|slot| sample.offer(Slot(slot)));
            let slots = sample.slots;
            let most = SAMPLE_PAGES.min(offered as usize);
            assert!((most.div_ceil(2)..=most).contains(&slots.len()), "{} of {offered}", slots.len());
            let gap = slots[slots.len() - 1].0 - slots[0].0;
            assert!(slots[0] == Slot(0) && gap >= offered - offered / 100 - 1, "{offered}");
        }
    }

    #[test]
    fn what_has_nothing_in_common_gets_no_dictionary() {
        let mut noise = 1_u64;
        let random: Vec<u8> = std::iter::repeat_with(|| {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            noise.to_be_bytes()[0]
        })
        .take(300 * PAGE_SIZE)
        .collect();
        assert!(learn("web1", &random, 1 << 30, None, 3).is_none());
    }
}
