//! Dictionaries: what the pages of one VM have in common, so that zstd need not find it anew in each 4 KiB. A dictionary
//! is trained on a sample of the VM's own pages and used for nobody else's: what it holds was in those pages.
//!
//! Its number stands in every object that was made with it, and in zstd's own frame a checksum of what it consists of, as
//! well as one of the page: a page is never read with another dictionary than it was written with, nor with one whose
//! memory is damaged, which neither length nor shape would show.

use std::fmt;
use std::num::NonZeroU16;
use std::sync::atomic::{AtomicBool, Ordering};

use zstd::zstd_safe::{CDict, DDict, train_from_buffer};

use crate::page::PAGE_SIZE;

/// The longest dictionary. Four times as much buys nothing for pages of 4 KiB (and each costs every VM its memory).
pub const DICTIONARY_BYTES_MAX: usize = 16 << 10;
/// The least that zstd's training makes anything useful of.
const TRAINING_PAGES_MIN: usize = 64;
/// Where zstd's format has a number of the dictionary that stands in every frame; before it is a magic one.
const ID_AT: std::ops::Range<usize> = 4..8;

/// Tells the dictionaries of one VM apart. Never given out twice while the VM has pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DictionaryNumber(NonZeroU16);

impl DictionaryNumber {
    /// The number, unless it is 0, which stands for none.
    #[must_use]
    pub fn new(number: u16) -> Option<Self> {
        NonZeroU16::new(number).map(Self)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0.get()
    }

    /// Its place in a list of all of a VM's.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0.get() - 1)
    }
}

impl fmt::Display for DictionaryNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A dictionary, ready for reading what was written with it.
pub struct Dictionary {
    /// Whose it is, for the log.
    vm: Box<str>,
    number: DictionaryNumber,
    bytes: Vec<u8>,
    /// What [`id_of`] made of them.
    id: u32,
    decoder: DDict<'static>,
    /// Whether the log was told that the decoder is damaged.
    told: AtomicBool,
}

impl fmt::Debug for Dictionary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the bytes: they are out of a guest's memory.
        f.debug_struct("Dictionary").field("number", &self.number).field("bytes", &self.bytes.len()).finish()
    }
}

impl Dictionary {
    /// The dictionary of these bytes, which [`train`] made of pages of the VM of this name. `None` when they are none, or
    /// memory is short.
    #[must_use]
    pub fn new(vm: &str, number: DictionaryNumber, mut bytes: Vec<u8>) -> Option<Self> {
        let id = id_of(&bytes)?;
        bytes.get_mut(ID_AT)?.copy_from_slice(&id.to_le_bytes());
        let decoder = DDict::try_create(&bytes)?;
        // Bytes that are no dictionary would be taken for plain text to refer to, and it for one without a number.
        (decoder.get_dict_id()?.get() == id).then_some(Self {
            vm: vm.into(),
            number,
            bytes,
            id,
            decoder,
            told: AtomicBool::new(false),
        })
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> DictionaryNumber {
        self.number
    }

    /// What it consists of, for who keeps it.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.bytes.capacity() + self.decoder.sizeof()
    }

    /// Has something decoded, and tried again with a decoder made anew when it isn't what was written: the memory of this
    /// one may be damaged. Whether it worked.
    pub(super) fn decode(&self, mut decode: impl FnMut(&DDict<'static>) -> bool) -> bool {
        if decode(&self.decoder) {
            return true;
        }
        let sound = DDict::try_create(&self.bytes).filter(|_| id_of(&self.bytes) == Some(self.id));
        let mended = sound.is_some_and(|decoder| decode(&decoder));
        if mended && !self.told.swap(true, Ordering::Relaxed) {
            tracing::error!(
                vm = &*self.vm,
                dictionary = %self.number,
                "the memory of a dictionary is damaged; pages are read with what it was made of, slowly, until the next start"
            );
        }
        mended
    }

    /// What writes with it at this level. Takes some hundred microseconds and a few hundred KiB. `None` when memory is short, or
    /// what the dictionary consists of is damaged.
    #[must_use]
    pub fn encoder(&self, level: i32) -> Option<Encoder> {
        if id_of(&self.bytes) != Some(self.id) {
            return None;
        }
        Some(Encoder { number: self.number, level, encoder: CDict::try_create(&self.bytes, level)? })
    }
}

/// What tells these bytes from others; never zero, which would stand for none.
fn id_of(bytes: &[u8]) -> Option<u32> {
    Some(crc32c::crc32c(bytes.get(ID_AT.end..)?).max(1))
}

/// A dictionary, ready for writing at one level.
pub struct Encoder {
    number: DictionaryNumber,
    level: i32,
    encoder: CDict<'static>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder")
            .field("number", &self.number)
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    /// The dictionary's number.
    #[must_use]
    pub fn number(&self) -> DictionaryNumber {
        self.number
    }

    /// The level that it writes at.
    #[must_use]
    pub fn level(&self) -> i32 {
        self.level
    }

    /// Bytes of memory that it takes.
    #[must_use]
    pub fn memory_bytes(&self) -> usize {
        self.encoder.sizeof()
    }

    pub(super) fn encoder(&self) -> &CDict<'static> {
        &self.encoder
    }
}

/// Why no dictionary came out of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrainError {
    /// There were too few pages.
    #[error("{pages} pages are too few to train a dictionary on: {TRAINING_PAGES_MIN} are needed")]
    TooFew {
        /// How many there were.
        pages: usize,
    },
    /// They have nothing in common.
    #[error("the sampled pages have too little in common for a dictionary")]
    NothingInCommon,
}

/// Trains a dictionary on `pages`, one behind the other. Takes some hundred microseconds a page.
///
/// # Errors
/// When there are too few pages, or they have nothing in common.
///
/// # Panics
/// When the last page is not whole.
pub fn train(pages: &[u8]) -> Result<Vec<u8>, TrainError> {
    let count = pages.len() / PAGE_SIZE;
    if count < TRAINING_PAGES_MIN {
        return Err(TrainError::TooFew { pages: count });
    }
    let mut dictionary = Vec::with_capacity(DICTIONARY_BYTES_MAX);
    let sizes = vec![PAGE_SIZE; count];
    train_from_buffer(&mut dictionary, pages, &sizes).map_err(|_| TrainError::NothingInCommon)?;
    Ok(dictionary)
}

#[cfg(test)]
pub(in crate::store) mod tests {
    use super::super::{Compressor, Scratch};
    use super::*;
    use crate::page::Page;

    /// Pages that look like each other: records with the same names and other numbers.
    pub(in crate::store) fn alike(count: u32) -> Vec<u8> {
        let names = ["offset", "length", "owner", "generation", "checksum", "next", "previous", "kind"];
        let of = ["process", "connection", "inode", "transaction", "descriptor", "interpreter"];
        let mut pages = Vec::new();
        for page in 0..count {
            let mut text = String::new();
            for record in 0..400_u32 {
                let number = (page * 131 + record).wrapping_mul(0x9e37_79b9);
                let name = names[(number >> 7) as usize % names.len()];
                let of = of[(number >> 3) as usize % of.len()];
                text.push_str(&format!(
                    "the {name} of the {of} that another one shares is {}; ",
                    number >> 22
                ));
            }
            pages.extend(text.bytes().take(PAGE_SIZE));
        }
        assert_eq!(pages.len(), count as usize * PAGE_SIZE);
        pages
    }

    #[test]
    fn a_dictionary_comes_of_pages_that_have_something_in_common_and_of_enough_of_them() {
        assert_eq!(train(&alike(10)), Err(TrainError::TooFew { pages: 10 }));
        let bytes = train(&alike(200)).unwrap();
        assert!((1000..=DICTIONARY_BYTES_MAX).contains(&bytes.len()));
        let number = DictionaryNumber::new(7).unwrap();
        let dictionary = Dictionary::new("web1", number, bytes).unwrap();
        assert_eq!((dictionary.number(), dictionary.encoder(3).unwrap().number()), (number, number));
    }

    #[test]
    fn what_is_no_dictionary_is_refused() {
        let number = DictionaryNumber::new(1).unwrap();
        for bytes in [vec![], vec![1, 2, 3], vec![0; 5000], alike(2)] {
            assert!(Dictionary::new("web1", number, bytes).is_none());
        }
        let mut cut = train(&alike(200)).unwrap();
        cut.truncate(30);
        assert!(Dictionary::new("web1", number, cut).is_none());
    }

    /// A page that was written with the dictionary of `bytes`, read with one whose decoder is another's by one bit.
    fn read_with_a_flipped_bit(bytes: &[u8], at: usize, page: &Page, kept: bool) -> Option<Page> {
        let number = DictionaryNumber::new(1).unwrap();
        let sound = Dictionary::new("web1", number, bytes.to_vec()).unwrap();
        let mut scratch = Scratch::default();
        let compressor = Compressor::ZstdWithDictionary(9);
        let (coding, object) = scratch.compress(compressor, sound.encoder(9).as_ref(), page);
        assert_eq!(coding.dictionary, Some(number));
        let length = object.len();
        let mut damaged = sound.bytes.clone();
        damaged[at] ^= 1;
        let decoder = DDict::try_create(&damaged).unwrap();
        let bytes = if kept { sound.bytes.clone() } else { damaged };
        let damaged = Dictionary { bytes, decoder, ..sound };
        let mut back = [0; PAGE_SIZE];
        scratch.decompress(coding.codec, Some(&damaged), length, &mut back).ok().map(|()| back)
    }

    #[test]
    fn a_dictionary_whose_memory_is_damaged_gives_no_page_another_byte() {
        let sample = alike(300);
        let bytes = train(&sample[..200 * PAGE_SIZE]).unwrap();
        let page: Page = sample[250 * PAGE_SIZE..251 * PAGE_SIZE].try_into().unwrap();
        let mut refused = 0;
        // The content comes last, and is what pages refer to.
        for at in (bytes.len() - 4000..bytes.len()).step_by(50) {
            let found = read_with_a_flipped_bit(&bytes, at, &page, true);
            assert!(found == Some(page), "byte {at}: what it was made of is sound");
            let found = read_with_a_flipped_bit(&bytes, at, &page, false);
            assert!(found.is_none_or(|found| found == page), "byte {at}: a page with another's bytes");
            refused += u32::from(found.is_none());
        }
        assert!(refused > 0, "no page refers to any of these bytes");
    }
}
