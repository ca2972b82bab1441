//! What each compressor makes of a sample of a VM's own pages: bytes as the arena would charge them, and how long it
//! takes. Each has buffers and contexts of its own, and a few pages at a time go through all of them, so that one page
//! after another meets a codec that is warm, as on a worker that has much to do.

use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

use crate::ids::Slot;
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};
use crate::store::arena::Arena;
use crate::store::codec::{CodecId, Compressor, Dictionary, Encoder, Kept, Scratch};
use crate::store::vm::{Checked, VmStore};

/// Pages that go through one compressor after the other.
const BATCH_PAGES: usize = 32;

/// What is tried, the fastest first.
const COMPRESSORS: [Compressor; 5] =
    [Compressor::Lz4, Compressor::Zstd(-1), Compressor::Zstd(1), Compressor::Zstd(3), Compressor::Zstd(9)];

/// What a compressor made of a sample. One with a dictionary is tried with the VM's latest, of which the sample may hold
/// pages that it was trained on; what the dictionary takes itself is not counted here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    /// The compressor.
    pub compressor: Compressor,
    /// Bytes that the arena would charge for all of it.
    pub pool_bytes: u64,
    /// Pages that did not shrink.
    pub incompressible_pages: u64,
    /// What half of the pages took no longer than, in nanoseconds, until they were objects.
    pub compress_ns_p50: u64,
    /// The same until they were pages again; without verifying them.
    pub decompress_ns_p50: u64,
}

/// A page of a sample that can't be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadSampled {
    /// Where on its VM's disk.
    pub slot: Slot,
    /// What a load would say.
    pub reason: String,
}

/// What a sample came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Pages that were tried: those of the wanted slots that were still in the arena.
    pub pages: u64,
    /// Bytes that the arena charges for them now.
    pub pool_bytes: u64,
    /// Pages of these that are the same as another one before them.
    pub equal_pages: u64,
    /// What each compressor made of them.
    pub trials: Vec<Trial>,
    /// Pages that could not be tried.
    pub bad: Vec<BadSampled>,
}

/// The compressors that are tried: those that somebody would choose from, and those that are `used` if they are none of
/// them.
#[must_use]
pub fn compressors(used: impl IntoIterator<Item = Compressor>) -> Vec<Compressor> {
    let mut all = COMPRESSORS.to_vec();
    for used in used {
        if !all.contains(&used) {
            all.push(used);
        }
    }
    all
}

/// Tries `compressors` on the pages of `vm` in `slots`, as long as `go_on` says so. Those that need a dictionary are left
/// out where the VM has none: what they would make is not known before it is trained.
#[must_use]
pub fn sample(
    vm: &VmStore,
    arena: &Arena,
    slots: &[Slot],
    compressors: &[Compressor],
    go_on: impl Fn() -> bool,
) -> Sample {
    let mut found = Sample::default();
    let mut reader = Scratch::default();
    let (hasher, mut seen) = (RandomState::new(), HashSet::new());
    let dictionary = vm.dictionaries().current();
    let trying = compressors.iter().filter_map(|compressor| Trying::new(*compressor, dictionary));
    let mut trying: Vec<_> = trying.collect();
    for slots in slots.chunks(BATCH_PAGES) {
        if !go_on() {
            break;
        }
        let pages = read(vm, arena, slots, &mut reader, &mut found);
        found.equal_pages +=
            pages.iter().map(|page| u64::from(!seen.insert(hasher.hash_one(page)))).sum::<u64>();
        for trying in &mut trying {
            pages.iter().for_each(|page| trying.take(page, arena));
        }
    }
    found.trials = trying.into_iter().map(Trying::end).collect();
    found
}

/// The pages of some slots that are in the arena.
fn read(vm: &VmStore, arena: &Arena, slots: &[Slot], scratch: &mut Scratch, found: &mut Sample) -> Vec<Page> {
    let mut pages = Vec::with_capacity(slots.len());
    for slot in slots {
        let mut page = ZERO_PAGE;
        match vm.check(*slot, &mut page, scratch) {
            Ok(Checked::Arena(object_bytes)) => {
                found.pages += 1;
                found.pool_bytes += arena.charged_bytes(object_bytes) as u64;
                pages.push(page);
            }
            // It has gone or moved since it was chosen.
            Ok(Checked::Empty | Checked::SameFilled | Checked::InFile(_)) => {}
            Err(err) if err.is_damage() => {
                found.bad.push(BadSampled { slot: *slot, reason: err.to_string() })
            }
            Err(_) => {}
        }
    }
    pages
}

/// A compressor at work on a sample.
struct Trying<'vm> {
    compressor: Compressor,
    /// What it learned from the VM's pages, and what writes with that, made for this report: a VM keeps those alone that
    /// its stores need.
    learned: Option<(&'vm Dictionary, Encoder)>,
    scratch: Scratch,
    pool_bytes: u64,
    incompressible_pages: u64,
    compress_ns: Vec<u64>,
    decompress_ns: Vec<u64>,
}

impl<'vm> Trying<'vm> {
    /// `None` when it needs a dictionary and there is none.
    fn new(compressor: Compressor, dictionary: Option<&'vm Dictionary>) -> Option<Self> {
        let learned = match compressor.dictionary_level() {
            None => None,
            Some(level) => Some((dictionary?, dictionary?.encoder(level)?)),
        };
        Some(Self {
            compressor,
            learned,
            scratch: Scratch::default(),
            pool_bytes: 0,
            incompressible_pages: 0,
            compress_ns: Vec::new(),
            decompress_ns: Vec::new(),
        })
    }

    fn take(&mut self, page: &Page, arena: &Arena) {
        let (dictionary, encoder) =
            self.learned.as_ref().map(|(dictionary, encoder)| (*dictionary, encoder)).unzip();
        let start = Instant::now();
        let (coding, object_bytes) = match self.scratch.keep(self.compressor, encoder, page) {
            Kept::Object(codec, object) => (codec, object.len()),
            // It would cost nothing; no page of the arena is one.
            Kept::Entry(_) => return,
        };
        let made = Instant::now();
        let mut back = [0; PAGE_SIZE];
        // What the same codec wrote a moment ago it reads; nobody takes the page.
        let dictionary = dictionary.filter(|_| coding.dictionary.is_some());
        let _ = self.scratch.decompress(coding.codec, dictionary, object_bytes, &mut back);
        self.decompress_ns.push(nanoseconds(made));
        self.compress_ns.push(u64::try_from((made - start).as_nanos()).unwrap_or(u64::MAX));
        self.pool_bytes += arena.charged_bytes(object_bytes) as u64;
        self.incompressible_pages += u64::from(coding.codec == CodecId::Raw);
    }

    fn end(self) -> Trial {
        Trial {
            compressor: self.compressor,
            pool_bytes: self.pool_bytes,
            incompressible_pages: self.incompressible_pages,
            compress_ns_p50: median(self.compress_ns),
            decompress_ns_p50: median(self.decompress_ns),
        }
    }
}

fn nanoseconds(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

/// The middle one: a thread that had to let others go first makes a mean of some hundred pages worthless. 0 of none.
fn median(mut numbers: Vec<u64>) -> u64 {
    numbers.sort_unstable();
    numbers.get(numbers.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_pool_is_made_with_is_among_what_is_tried_and_once() {
        let (slow, cold) = (Compressor::Zstd(19), Compressor::ZstdWithDictionary(9));
        assert_eq!(compressors([Compressor::Lz4]), COMPRESSORS);
        assert_eq!(compressors([Compressor::Zstd(3), Compressor::Lz4]), COMPRESSORS);
        assert_eq!(compressors([slow, cold])[5..], [slow, cold]);
        assert_eq!(compressors([cold, cold])[5..], [cold]);
    }

    #[test]
    fn the_middle_of_nothing_is_nothing() {
        assert_eq!([vec![], vec![5], vec![9, 1], vec![9, 1, 5]].map(median), [0, 5, 9, 5]);
    }
}
