//! What a daemon can't be faster than with one worker: compressor, checksum and one copy of each page, alone, on one core
//! and on the pages that a back end would get. It uses the store's own codec and header, so that a change to them changes
//! both sides of a comparison; no arena, no tables, no rings, no other thread. A dictionary is learned from every second page
//! at most, and only the pages between those are measured.

use std::fmt;
use std::hint::black_box;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::source::{Shuffle, Source};
use super::{BenchArgs, DEFAULT_PAGES, Error};
use crate::ids::{Bytes, Owner, Slot, VmId};
use crate::page::{Page, ZERO_PAGE};
use crate::store::codec::{
    Compressor, Dictionary, DictionaryNumber, Encoder, Kept, Scratch, TrainError, train,
};
use crate::store::entry::Entry;
use crate::store::{object, same_filled};

/// What the codec takes alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CodecReport {
    /// The compressor, as a pool's configuration names it.
    pub compressor: String,
    /// Whether the pages were made up.
    pub synthetic: bool,
    /// Pages before they repeat.
    pub corpus_pages: u64,
    /// Others that a dictionary was learned from.
    pub learned_pages: u64,
    /// What the dictionary takes for reading with it and for writing.
    pub dictionary_bytes: u64,
    /// Bytes of all objects, headers included.
    pub object_bytes: u64,
    /// Each page copied once, looked at whether it is same-filled, else compressed, sealed and put behind the one before.
    pub store: CodecFigures,
    /// In shuffled order: each object copied out, verified, decompressed, and its page copied once.
    pub load: CodecFigures,
}

/// How fast one way was.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CodecFigures {
    /// Pages moved.
    pub pages: u64,
    /// For all of them.
    pub seconds: f64,
    /// Throughput.
    pub pages_per_second: f64,
    /// What one page took.
    pub ns_per_page: f64,
    /// What half of the pages took at most, each by the clock, in a pass before.
    pub ns_p50: u64,
    /// What all but a thousandth took at most: what the machine, and for stores a buffer that grows, add to some.
    pub ns_p999: u64,
}

impl CodecFigures {
    fn new(pages: u64, elapsed: Duration, each: &Each) -> Self {
        let seconds = elapsed.as_secs_f64();
        Self {
            pages,
            seconds,
            pages_per_second: pages as f64 / seconds,
            ns_per_page: seconds * 1e9 / pages as f64,
            ns_p50: each.times.value_at_quantile(0.5),
            ns_p999: each.times.value_at_quantile(0.999),
        }
    }
}

/// Most pages that a dictionary is learned from, as in the daemon.
const LEARNED_PAGES_MAX: u64 = 1024;
/// A page that takes longer is counted as this, in nanoseconds.
const PAGE_NS_MAX: u64 = 1_000_000_000;

/// The time of each page.
struct Each {
    last: Instant,
    times: Histogram<u64>,
}

impl Each {
    fn begin() -> Self {
        let times = Histogram::new_with_bounds(1, PAGE_NS_MAX, 2).expect("two digits are allowed");
        Self { last: Instant::now(), times }
    }

    /// One page is done.
    fn page(&mut self) {
        let now = Instant::now();
        let ns = u64::try_from((now - self.last).as_nanos()).unwrap_or(u64::MAX);
        self.times.saturating_record(ns);
        self.last = now;
    }
}

/// Measures the codec alone and prints the report.
pub(super) fn run(args: &BenchArgs) -> Result<(), Error> {
    let report = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(Error::Print)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

fn measure(args: &BenchArgs) -> Result<CodecReport, Error> {
    let source = Source::open(&args.corpus, 0)?;
    let codec = Codec::new(args.compressor, &source)?;
    let pages = args.pages.unwrap_or(DEFAULT_PAGES);
    let (mut scratch, mut stored) = (Scratch::default(), Stored::default());
    // By the page first, for the clock takes time as well; and so the memory for all objects is there when it counts.
    let mut each_store = Each::begin();
    codec.store(pages, &mut scratch, &mut stored, || each_store.page());
    let mut each_load = Each::begin();
    codec.load(&stored, &mut scratch, false, || each_load.page());
    let start = Instant::now();
    codec.store(pages, &mut scratch, &mut stored, || ());
    let store_time = start.elapsed();
    let start = Instant::now();
    codec.load(&stored, &mut scratch, false, || ());
    let load_time = start.elapsed();
    // What didn't come counts as wrong here too.
    let mismatched_pages = codec.load(&stored, &mut scratch, true, || ());
    if mismatched_pages > 0 {
        return Err(Error::Damage { mismatched_pages, failed_requests: 0 });
    }
    let learned = codec.learned.as_ref();
    Ok(CodecReport {
        compressor: args.compressor.to_string(),
        synthetic: source.is_synthetic(),
        corpus_pages: codec.distinct(),
        learned_pages: learned.map_or(0, |learned| learned.pages),
        dictionary_bytes: learned.map_or(0, Learned::memory_bytes),
        object_bytes: stored.objects.len() as u64,
        store: CodecFigures::new(pages, store_time, &each_store),
        load: CodecFigures::new(pages, load_time, &each_load),
    })
}

/// A dictionary, and how many pages it was learned from.
struct Learned {
    dictionary: Dictionary,
    encoder: Encoder,
    pages: u64,
}

impl Learned {
    fn new(level: i32, source: &Source) -> Result<Self, TrainError> {
        let sample: Vec<&[u8]> = Self::sample(source).collect();
        let bytes = train(&sample.concat())?;
        let number = DictionaryNumber::new(1).ok_or(TrainError::NothingInCommon)?;
        let dictionary = Dictionary::new("bench", number, bytes).ok_or(TrainError::NothingInCommon)?;
        let encoder = dictionary.encoder(level).ok_or(TrainError::NothingInCommon)?;
        Ok(Self { dictionary, encoder, pages: sample.len() as u64 })
    }

    /// What is learned from: every second page, or fewer, evenly spread.
    fn sample(source: &Source) -> impl Iterator<Item = &[u8]> {
        let step = source.distinct().div_ceil(2 * LEARNED_PAGES_MAX).max(1);
        let positions = (0..source.distinct() / 2).step_by(usize::try_from(step).unwrap_or(1));
        positions.map(|nth| source.bytes_at(source.index(2 * nth, 0), 1))
    }

    fn memory_bytes(&self) -> u64 {
        (self.dictionary.memory_bytes() + self.encoder.memory_bytes()) as u64
    }
}

/// What was stored: a page's entry, or where its object ends.
#[derive(Default)]
struct Stored {
    kept: Vec<Place>,
    objects: Vec<u8>,
}

enum Place {
    Entry(Entry),
    Object { at: usize, length: usize },
}

fn owner(position: u64) -> Owner {
    Owner { vm: VmId(1), slot: Slot(u32::try_from(position).unwrap_or(u32::MAX)) }
}

/// What is measured, and on which pages.
struct Codec<'a> {
    compressor: Compressor,
    learned: Option<Learned>,
    source: &'a Source,
}

impl<'a> Codec<'a> {
    fn new(compressor: Compressor, source: &'a Source) -> Result<Self, Error> {
        let learned = compressor.dictionary_level().map(|level| Learned::new(level, source)).transpose();
        Ok(Self { compressor, learned: learned.map_err(Error::Train)?, source })
    }

    /// Pages that are measured before they repeat.
    fn distinct(&self) -> u64 {
        self.source.distinct() / if self.learned.is_some() { 2 } else { 1 }
    }

    /// The page at a position: with a dictionary, none that it was learned from.
    fn page_at(&self, position: u64) -> &[u8] {
        let position = match self.learned {
            Some(_) => 2 * (position % self.distinct()) + 1,
            None => position,
        };
        self.source.bytes_at(self.source.index(position, 0), 1)
    }

    /// Stores all pages, in the memory of those that were stored before; `each` is called after each of them.
    fn store(&self, pages: u64, scratch: &mut Scratch, stored: &mut Stored, mut each: impl FnMut()) {
        stored.kept.clear();
        stored.objects.clear();
        let encoder = self.learned.as_ref().map(|learned| &learned.encoder);
        let mut page: Box<Page> = Box::new(ZERO_PAGE);
        for position in 0..pages {
            page.copy_from_slice(black_box(self.page_at(position)));
            stored.kept.push(match scratch.keep(self.compressor, encoder, &page) {
                Kept::Entry(entry) => Place::Entry(entry),
                Kept::Object(coding, object) => {
                    object::seal(object, owner(position), coding);
                    let at = stored.objects.len();
                    stored.objects.extend_from_slice(object);
                    Place::Object { at, length: object.len() }
                }
            });
            each();
        }
    }

    /// Loads all pages; `compare` says whether to compare them, which a daemon doesn't, and `each` is called after each of
    /// them. Returns how many came back wrong.
    fn load(&self, stored: &Stored, scratch: &mut Scratch, compare: bool, mut each: impl FnMut()) -> u64 {
        let mut page: Box<Page> = Box::new(ZERO_PAGE);
        let mut guest: Box<Page> = Box::new(ZERO_PAGE);
        let mut wrong = 0;
        for position in Shuffle::new(stored.kept.len() as u64, 2) {
            let place = &stored.kept[usize::try_from(position).unwrap_or(0)];
            let came = self.load_page(place, &stored.objects, owner(position), scratch, &mut page);
            guest.copy_from_slice(black_box(page.as_slice()));
            black_box(&mut guest);
            each();
            let right = || *self.page_at(position) == *guest.as_slice();
            wrong += u64::from(!came || compare && !right());
        }
        wrong
    }

    /// Whether the page came back.
    fn load_page(
        &self,
        place: &Place,
        objects: &[u8],
        owner: Owner,
        scratch: &mut Scratch,
        page: &mut Page,
    ) -> bool {
        match place {
            Place::Entry(Entry::SameFilled(word)) => {
                same_filled::fill(page, *word);
                true
            }
            Place::Entry(_) => false,
            Place::Object { at, length } => {
                scratch.object(*length).copy_from_slice(&objects[*at..at + length]);
                let Ok((coding, _)) = object::open(scratch.object(*length), owner) else { return false };
                let learned = self.learned.as_ref().filter(|_| coding.dictionary.is_some());
                let dictionary = learned.map(|learned| &learned.dictionary);
                scratch.decompress(coding.codec, dictionary, *length, page).is_ok()
            }
        }
    }
}

impl fmt::Display for CodecReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let origin = if self.synthetic { "synthetic" } else { "corpus" };
        writeln!(
            f,
            "{} alone: {} pages ({} {origin} pages cycled), objects of {}, {} a page",
            self.compressor,
            self.store.pages,
            self.corpus_pages,
            Bytes(self.object_bytes),
            Bytes(self.object_bytes / self.store.pages.max(1))
        )?;
        if self.learned_pages > 0 {
            let takes = Bytes(self.dictionary_bytes);
            writeln!(f, "a dictionary of {} other pages takes {takes} beside that", self.learned_pages)?;
        }
        for (name, x) in [("store", &self.store), ("load", &self.load)] {
            writeln!(
                f,
                "{name:<8}{:>10.0} pages/s{:>10.0} ns a page (p50 {}, p99.9 {})",
                x.pages_per_second, x.ns_per_page, x.ns_p50, x.ns_p999
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::parse;
    use super::*;

    #[test]
    fn pages_come_back_from_what_was_measured_and_damage_is_seen() {
        for compressor in [Compressor::Lz4, Compressor::Zstd(1), Compressor::ZstdWithDictionary(1)] {
            let source = Source::open(&[], 0).unwrap();
            let codec = Codec::new(compressor, &source).unwrap();
            let mut scratch = Scratch::default();
            let mut pages = 0;
            let mut stored = Stored::default();
            codec.store(500, &mut scratch, &mut stored, || pages += 1);
            assert_eq!(pages, 500);
            // 3 of a hundred are zeros (with a dictionary, for which every second page is left out, 2), 2 more repeat a word
            // that may or may not fit an entry.
            let entries = stored.kept.iter().filter(|place| matches!(place, Place::Entry(_))).count();
            assert!((8..=25).contains(&entries), "{entries}");
            assert_eq!(codec.load(&stored, &mut scratch, true, || ()), 0);
            stored.objects[100] ^= 1;
            assert_eq!(codec.load(&stored, &mut scratch, false, || pages += 1), 1);
            assert_eq!(pages, 1000);
        }
    }

    #[test]
    fn no_page_is_measured_that_a_dictionary_was_learned_from() {
        let source = Source::open(&[], 0).unwrap();
        let codec = Codec::new(Compressor::ZstdWithDictionary(9), &source).unwrap();
        let learned = codec.learned.as_ref().unwrap();
        assert_eq!(learned.pages, 1024);
        let measured: Vec<_> = (0..source.distinct()).map(|position| codec.page_at(position)).collect();
        let is_measured = |page: &[u8]| measured.iter().any(|measured| measured.as_ptr() == page.as_ptr());
        assert_eq!((0..4096).filter(|nth| is_measured(source.bytes_at(*nth, 1))).count(), 2048);
        assert!(Learned::sample(&source).all(|page| !is_measured(page)));
    }

    #[test]
    fn the_report_has_what_was_asked_for() {
        let report = measure(&parse("bench --codec-alone --pages 300 --compressor zstd:1").unwrap()).unwrap();
        assert_eq!((report.store.pages, report.load.pages), (300, 300));
        assert_eq!((&*report.compressor, report.synthetic, report.corpus_pages), ("zstd:1", true, 4096));
        assert!(report.object_bytes > 300 * 100 && report.object_bytes < 300 * 4096);
        for figures in [report.store, report.load] {
            assert!((figures.ns_per_page * figures.pages_per_second / 1e9 - 1.0).abs() < 1e-6);
            // No processor has done a page in less.
            assert!(50 < figures.ns_p50 && figures.ns_p50 <= figures.ns_p999);
        }
    }
}
