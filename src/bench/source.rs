//! The pages that the bench stores: read from files or made up, always the same for the same arguments, so
//! that every back end gets the same ones and a page can be compared without remembering what was written
//! where. The table is held twice: once in guest memory, where the back end reads stores from, and once
//! out of its reach, to compare with.

use std::path::PathBuf;

use vm_memory::GuestAddress;

use super::Error;
use crate::frontend::{self, Memory};
use crate::page::{PAGE_SIZE, Page, ZERO_PAGE};

/// Number of made-up pages: 16 MiB, more than the caches that would flatter a back end.
const SYNTHETIC_PAGES: u64 = 4096;

/// How far a slot's page moves in the table when the slot is overwritten; odd, so that it moves in every
/// table but one of a single page.
const GENERATION_STRIDE: u64 = 1_000_003;

/// The table of pages, with its beginning repeated at its end: a block of pages is contiguous wherever it
/// starts.
#[derive(Debug)]
pub(crate) struct Source {
    pages: Vec<Page>,
    distinct: u64,
    synthetic: bool,
}

impl Source {
    /// Reads the files' whole pages, or makes pages if there are no files.
    pub(crate) fn open(files: &[PathBuf], block_pages: usize) -> Result<Self, Error> {
        let mut pages = Vec::new();
        for path in files {
            let bytes = std::fs::read(path).map_err(|source| Error::Corpus { path: path.clone(), source })?;
            pages.extend_from_slice(bytes.as_chunks::<PAGE_SIZE>().0);
        }
        let synthetic = files.is_empty();
        if synthetic {
            pages.extend((0..SYNTHETIC_PAGES).map(synthetic_page));
        }
        if pages.is_empty() {
            return Err(Error::EmptyCorpus);
        }
        let distinct = pages.len();
        for n in 0..block_pages {
            pages.push(pages[n % distinct]);
        }
        Ok(Self { pages, distinct: distinct as u64, synthetic })
    }

    /// Number of pages before they repeat.
    pub(crate) fn distinct(&self) -> u64 {
        self.distinct
    }

    /// Whether the pages are made up.
    pub(crate) fn is_synthetic(&self) -> bool {
        self.synthetic
    }

    /// Bytes of the table.
    pub(crate) fn bytes(&self) -> usize {
        self.pages.len() * PAGE_SIZE
    }

    /// Copies the table into guest memory and returns where it is.
    pub(crate) fn place(&self, memory: &Memory) -> Result<GuestAddress, frontend::Error> {
        let at = memory.allocate(self.bytes())?;
        memory.write(at, self.pages.as_flattened())?;
        Ok(at)
    }

    /// Index in the table of the page that belongs at `position` pages from the first slot, after it was
    /// overwritten `generation` times.
    #[inline]
    pub(crate) fn index(&self, position: u64, generation: u64) -> usize {
        let index = (position + generation * GENERATION_STRIDE) % self.distinct;
        usize::try_from(index).unwrap_or(0)
    }

    /// `count` pages from an index on, as bytes.
    #[inline]
    pub(crate) fn bytes_at(&self, index: usize, count: usize) -> &[u8] {
        self.pages[index..index + count].as_flattened()
    }
}

/// Makes page `n`: of every hundred, 3 zero, 2 filled with another word, 6 incompressible, the rest words
/// of which more or fewer repeat, as heaps have them.
fn synthetic_page(n: u64) -> Page {
    let mut random = Random(n.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d);
    let mut page = ZERO_PAGE;
    let kind = n % 100;
    if kind < 3 {
        return page;
    }
    let fill = random.next();
    // A pool of 16 words to draw from; the share of drawn words sets how well the page compresses.
    let pool: [u64; 16] = std::array::from_fn(|_| 0x0000_7f00_0000_0000 | (random.next() >> 30 << 4));
    let fresh_percent = if kind < 11 { 100 } else { kind * 7 % 30 };
    let mut zero_words = 0;
    for word in page.as_chunks_mut::<8>().0 {
        if zero_words > 0 {
            zero_words -= 1;
            continue;
        }
        let value = match kind {
            3..5 => fill,
            _ if random.next() % 100 < fresh_percent => random.next(),
            _ => match random.next() % 32 {
                drawn @ 0..16 => pool[usize::try_from(drawn).unwrap_or(0)],
                16..24 => random.next() % 1000,
                _ => {
                    zero_words = random.next() % 16;
                    0
                }
            },
        };
        *word = value.to_le_bytes();
    }
    page
}

/// Xorshift64*: small, fast, the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// The numbers below `count`, each once, in an order that looks random and is always the same.
#[derive(Clone, Debug)]
pub(crate) struct Shuffle {
    count: u64,
    bits: u32,
    next: u64,
    seed: u64,
}

impl Shuffle {
    pub(crate) fn new(count: u64, seed: u64) -> Self {
        Self { count, bits: count.next_power_of_two().trailing_zeros().max(2), next: 0, seed }
    }

    /// A bijection on numbers of `bits` bits: odd multiplications, additions and shifts that fold the high
    /// half onto the low one are each invertible.
    fn mix(&self, number: u64) -> u64 {
        let mask = (1 << self.bits) - 1;
        let fold = self.bits.div_ceil(2);
        let mut x = number.wrapping_add(self.seed) & mask;
        for factor in [0x9e37_79b9_7f4a_7c15_u64, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb] {
            x = x.wrapping_mul(factor) & mask;
            x ^= x >> fold;
        }
        x
    }
}

impl Iterator for Shuffle {
    type Item = u64;

    #[inline]
    fn next(&mut self) -> Option<u64> {
        while self.next >> self.bits == 0 {
            let number = self.mix(self.next);
            self.next += 1;
            if number < self.count {
                return Some(number);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn a_shuffle_has_every_number_once_and_not_in_order() {
        for count in [1, 2, 3, 7, 1000, 4096] {
            let all: Vec<u64> = Shuffle::new(count, 5).collect();
            assert_eq!(all.iter().collect::<HashSet<_>>().len() as u64, count);
            assert!(all.iter().all(|n| *n < count) && all.len() as u64 == count);
            assert!(count < 7 || !all.is_sorted());
        }
    }

    #[test]
    fn synthetic_pages_are_stable_and_vary_in_compressibility() {
        let source = Source::open(&[], 1).unwrap();
        let mut sizes: Vec<usize> =
            (0..100).map(|n| lz4_flex::block::compress(source.bytes_at(n, 1)).len()).collect();
        assert_eq!(source.bytes_at(7, 1), synthetic_page(7));
        assert_eq!(source.pages[..3], [ZERO_PAGE; 3]);
        assert!(source.pages[3].as_chunks::<8>().0.iter().all(|word| *word == source.pages[3][..8]));
        sizes.sort_unstable();
        let sum: usize = sizes.iter().sum();
        assert!(sizes[99] > 4096 && sizes[4] < 64 && (100 * 900..100 * 1600).contains(&sum), "{sizes:?}");
    }

    #[test]
    fn blocks_run_past_the_end_of_the_table() {
        let source = Source::open(&[], 32).unwrap();
        let last = source.index(SYNTHETIC_PAGES * 5 - 1, 0);
        assert_eq!(source.bytes_at(last, 32)[PAGE_SIZE..], *source.bytes_at(0, 31));
    }

    #[test]
    fn overwriting_changes_the_page() {
        let source = Source::open(&[], 1).unwrap();
        assert_ne!(source.index(9, 0), source.index(9, 1));
        assert_eq!(source.index(9, 0), source.index(9 + SYNTHETIC_PAGES, 0));
    }

    #[test]
    fn a_corpus_without_a_page_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [1; 4095]).unwrap();
        assert!(matches!(Source::open(&[file.path().into()], 1), Err(Error::EmptyCorpus)));
        assert!(matches!(Source::open(&["/none".into()], 1), Err(Error::Corpus { .. })));
    }
}
