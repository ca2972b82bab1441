//! Codecs: how a page becomes a payload and back. A closed set, so an enum. [`Scratch`] holds what one thread needs
//! to work without allocating: buffers and the codecs' own contexts.
//!
//! LZ4 blocks are written by lz4_flex and read by the C library, which is as fast at the former and needs a quarter
//! less time for the latter; every load waits for that.

use std::fmt;
use std::str::FromStr;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd::bulk;
use zstd::zstd_safe::CParameter;

use super::entry::Entry;
use super::object::{HEADER_BYTES, OBJECT_BYTES_MAX};
use super::same_filled;
use crate::page::{PAGE_SIZE, Page};

/// What is written into an object's header. The numbers are part of the file format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum CodecId {
    /// The page as it is: it would not shrink.
    Raw = 0,
    /// An LZ4 block.
    Lz4 = 1,
    /// A zstd frame, of any level.
    Zstd = 2,
    /// Eight bytes that the page repeats, and that no entry can hold.
    SameFilled = 3,
}

impl CodecId {
    /// The codec of the three bits in a header.
    #[must_use]
    pub fn from_bits(bits: u16) -> Option<Self> {
        [Self::Raw, Self::Lz4, Self::Zstd, Self::SameFilled].into_iter().find(|id| *id as u16 == bits)
    }
}

/// The compressor that a pool is made with: `lz4`, `zstd` or `zstd:LEVEL`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compressor {
    /// LZ4 (lz4_flex): fast, about 3.5 on ordinary heaps.
    #[default]
    Lz4,
    /// zstd at this level, -7 to 22: denser, three times slower.
    Zstd(i32),
}

const ZSTD_LEVEL_DEFAULT: i32 = 1;
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = -7..=22;

impl Compressor {
    /// The compressor as a number below 2^16, for a word that is read by everybody and seldom changes.
    #[must_use]
    pub(super) fn to_bits(self) -> u32 {
        match self {
            Self::Lz4 => 0,
            Self::Zstd(level) => 1 + level.abs_diff(*ZSTD_LEVELS.start()),
        }
    }

    /// The compressor of [`Compressor::to_bits`].
    #[must_use]
    pub(super) fn from_bits(bits: u32) -> Self {
        match bits.checked_sub(1).map(i32::try_from) {
            Some(Ok(level)) => Self::Zstd(ZSTD_LEVELS.start() + level),
            _ => Self::Lz4,
        }
    }

    /// The codec that this compressor writes.
    #[must_use]
    pub fn codec(self) -> CodecId {
        match self {
            Self::Lz4 => CodecId::Lz4,
            Self::Zstd(_) => CodecId::Zstd,
        }
    }
}

/// Why a text names no compressor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is not a compressor: write \"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22"
)]
pub struct ParseCompressorError {
    given: String,
}

impl FromStr for Compressor {
    type Err = ParseCompressorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseCompressorError { given: text.to_owned() };
        match text.split_once(':') {
            None if text == "lz4" => Ok(Self::Lz4),
            None if text == "zstd" => Ok(Self::Zstd(ZSTD_LEVEL_DEFAULT)),
            Some(("zstd", level)) => {
                let level = level.parse().map_err(|_| err())?;
                if ZSTD_LEVELS.contains(&level) { Ok(Self::Zstd(level)) } else { Err(err()) }
            }
            _ => Err(err()),
        }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// A page whose payload is longer than this is kept raw: what it would save is not worth decompressing it.
const WORTHWHILE_BYTES_MAX: usize = PAGE_SIZE - PAGE_SIZE / 16;

/// LZ4 wants room for the worst case before it starts, whatever the page.
const BUFFER_BYTES: usize = HEADER_BYTES + get_maximum_output_size(PAGE_SIZE);
const _: () = assert!(BUFFER_BYTES >= OBJECT_BYTES_MAX);

/// One thread's buffers and codec contexts.
pub struct Scratch {
    /// The object under construction, or the one that was copied out: header room, then payload.
    object: Box<[u8; BUFFER_BYTES]>,
    /// A page for the caller: copied out of guest memory, or on its way there.
    pub page: Box<Page>,
    lz4: CompressTable,
    zstd: Option<(i32, bulk::Compressor<'static>)>,
    unzstd: Option<bulk::Decompressor<'static>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            object: Box::new([0; BUFFER_BYTES]),
            page: Box::new([0; PAGE_SIZE]),
            lz4: CompressTable::small(),
            zstd: None,
            unzstd: None,
        }
    }
}

/// What a page is kept as.
#[derive(Debug)]
pub enum Kept<'scratch> {
    /// A word in its entry.
    Entry(Entry),
    /// An object, header room included, whose payload is of this codec.
    Object(CodecId, &'scratch mut [u8]),
}

/// A payload that does not become a page again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored page can't be decompressed")]
pub struct DecompressError;

impl Scratch {
    /// Compresses `page` into the object buffer, behind the header's room. Returns the codec that was used and
    /// the object, header room included.
    pub fn compress(&mut self, compressor: Compressor, page: &Page) -> (CodecId, &mut [u8]) {
        let room = &mut self.object[HEADER_BYTES..];
        let (codec, length) = match compressor {
            Compressor::Lz4 => {
                (CodecId::Lz4, compress_into_with_table(page, &mut room[..], &mut self.lz4).ok())
            }
            Compressor::Zstd(level) => (CodecId::Zstd, compress_zstd(&mut self.zstd, level, page, room)),
        };
        match length {
            Some(length) if length <= WORTHWHILE_BYTES_MAX => {
                (codec, &mut self.object[..HEADER_BYTES + length])
            }
            _ => {
                self.object[HEADER_BYTES..OBJECT_BYTES_MAX].copy_from_slice(page);
                (CodecId::Raw, &mut self.object[..OBJECT_BYTES_MAX])
            }
        }
    }

    /// What `page` is kept as when it goes through `compressor`: nothing but an entry if it repeats a word that fits one,
    /// else the object that is in the buffer then.
    pub fn keep(&mut self, compressor: Compressor, page: &Page) -> Kept<'_> {
        let (codec, object) = match same_filled::word_of(page) {
            Some(word) => match Entry::same_filled(word) {
                Some(entry) => return Kept::Entry(entry),
                None => self.same_filled(word),
            },
            None => self.compress(compressor, page),
        };
        Kept::Object(codec, object)
    }

    /// Puts the word of a same-filled page into the object buffer, for words that no entry can hold.
    pub fn same_filled(&mut self, word: u64) -> (CodecId, &mut [u8]) {
        self.object[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&word.to_le_bytes());
        (CodecId::SameFilled, &mut self.object[..HEADER_BYTES + 8])
    }

    /// The first `length` bytes of the object buffer, for copying an object into.
    ///
    /// # Panics
    /// When `length` exceeds [`OBJECT_BYTES_MAX`].
    pub fn object(&mut self, length: usize) -> &mut [u8] {
        &mut self.object[..length]
    }

    /// Makes `page` of the payload in the first `length` bytes of the object buffer.
    ///
    /// # Errors
    /// When the payload is not what `codec` would have written for one page.
    pub fn decompress(
        &mut self,
        codec: CodecId,
        length: usize,
        page: &mut Page,
    ) -> Result<(), DecompressError> {
        let payload = self.object.get(HEADER_BYTES..length).ok_or(DecompressError)?;
        let produced = match codec {
            CodecId::Raw => {
                *page = *<&Page>::try_from(payload).map_err(|_| DecompressError)?;
                PAGE_SIZE
            }
            CodecId::Lz4 => {
                let size = i32::try_from(PAGE_SIZE).map_err(|_| DecompressError)?;
                lz4::block::decompress_to_buffer(payload, Some(size), page.as_mut_slice())
                    .map_err(|_| DecompressError)?
            }
            CodecId::Zstd => {
                if self.unzstd.is_none() {
                    self.unzstd = Some(bulk::Decompressor::new().map_err(|_| DecompressError)?);
                }
                let context = self.unzstd.as_mut().ok_or(DecompressError)?;
                context.decompress_to_buffer(payload, page.as_mut_slice()).map_err(|_| DecompressError)?
            }
            CodecId::SameFilled => {
                let word = payload.try_into().map_err(|_| DecompressError)?;
                same_filled::fill(page, u64::from_le_bytes(word));
                PAGE_SIZE
            }
        };
        if produced == PAGE_SIZE { Ok(()) } else { Err(DecompressError) }
    }
}

fn compress_zstd(
    context: &mut Option<(i32, bulk::Compressor<'static>)>,
    level: i32,
    page: &Page,
    room: &mut [u8],
) -> Option<usize> {
    if context.as_ref().is_none_or(|(made_for, _)| *made_for != level) {
        let mut compressor = bulk::Compressor::new(level).ok()?;
        // Eight bytes a page that say what the object's header says already.
        compressor.set_parameter(CParameter::ContentSizeFlag(false)).ok()?;
        compressor.set_parameter(CParameter::ChecksumFlag(false)).ok()?;
        compressor.set_parameter(CParameter::DictIdFlag(false)).ok()?;
        *context = Some((level, compressor));
    }
    let (_, compressor) = context.as_mut()?;
    compressor.compress_to_buffer(page, room).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages() -> Vec<Page> {
        let mut noise = 0x1234_5678_u32;
        let mut random = [0; PAGE_SIZE];
        for byte in &mut random {
            noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = noise.to_be_bytes()[0];
        }
        let mut half = random;
        half[1000..].fill(3);
        let text: Vec<u8> = b"the quick brown fox ".iter().copied().cycle().take(PAGE_SIZE).collect();
        vec![[0; PAGE_SIZE], random, half, text.try_into().expect("one page")]
    }

    #[test]
    fn every_codec_gives_back_what_it_took() {
        let mut scratch = Scratch::default();
        for compressor in [Compressor::Lz4, Compressor::Zstd(-5), Compressor::Zstd(1), Compressor::Zstd(19)] {
            for page in pages() {
                let (codec, object) = scratch.compress(compressor, &page);
                let length = object.len();
                assert_eq!(codec == CodecId::Raw, page == pages()[1], "{compressor}");
                assert!(codec == CodecId::Raw || length < 1400, "{compressor}: {length}");
                let mut back = [0xff; PAGE_SIZE];
                scratch.decompress(codec, length, &mut back).unwrap();
                assert!(back == page, "{compressor}");
            }
        }
    }

    #[test]
    fn a_page_that_repeats_a_word_is_kept_as_that_word() {
        let mut scratch = Scratch::default();
        assert!(matches!(scratch.keep(Compressor::Lz4, &[0; PAGE_SIZE]), Kept::Entry(Entry::SameFilled(0))));
        let mut page = [0; PAGE_SIZE];
        same_filled::fill(&mut page, 0x7123_4567_89ab_cdef);
        match scratch.keep(Compressor::Zstd(1), &page) {
            Kept::Object(codec, object) => {
                assert_eq!((codec, object.len()), (CodecId::SameFilled, HEADER_BYTES + 8))
            }
            Kept::Entry(entry) => panic!("{entry:?} can't hold it"),
        }
        match scratch.keep(Compressor::Zstd(1), &pages()[3]) {
            Kept::Object(codec, object) => assert!(codec == CodecId::Zstd && object.len() < 200),
            Kept::Entry(entry) => panic!("{entry:?}"),
        }
    }

    #[test]
    fn what_does_not_shrink_is_kept_raw() {
        let mut scratch = Scratch::default();
        let (codec, object) = scratch.compress(Compressor::Lz4, &pages()[1]);
        assert_eq!((codec, object.len()), (CodecId::Raw, OBJECT_BYTES_MAX));
    }

    #[test]
    fn a_wrong_payload_is_an_error() {
        let mut scratch = Scratch::default();
        scratch.object(200).fill(0x7f);
        let mut page = [0; PAGE_SIZE];
        for codec in [CodecId::Raw, CodecId::Lz4, CodecId::Zstd, CodecId::SameFilled] {
            assert_eq!(scratch.decompress(codec, 100, &mut page), Err(DecompressError), "{codec:?}");
            assert_eq!(scratch.decompress(codec, 3, &mut page), Err(DecompressError), "{codec:?}");
        }
    }

    #[test]
    fn compressors_are_read_and_printed() {
        for (text, compressor) in
            [("lz4", Compressor::Lz4), ("zstd", Compressor::Zstd(1)), ("zstd:-5", Compressor::Zstd(-5))]
        {
            assert_eq!(text.parse(), Ok(compressor));
            assert_eq!(compressor.to_string().parse(), Ok(compressor));
            assert_eq!(Compressor::from_bits(compressor.to_bits()), compressor);
        }
        for text in ["", "LZ4", "lz4:1", "zstd:", "zstd:23", "zstd:-8", "zstd:x", "deflate"] {
            assert!(text.parse::<Compressor>().is_err(), "{text}");
        }
    }
}
