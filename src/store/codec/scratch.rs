//! One thread's buffers and codec contexts, and what becomes of a page in them.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use zstd::bulk;
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

use super::{CodecId, Coding, Compressor, Dictionary, Encoder};
use crate::page::{PAGE_SIZE, Page};
use crate::store::entry::Entry;
use crate::store::object::{HEADER_BYTES, OBJECT_BYTES_MAX};
use crate::store::same_filled;

/// A page whose payload is longer than this is kept raw: what it would save is not worth decompressing it.
const WORTHWHILE_BYTES_MAX: usize = PAGE_SIZE - PAGE_SIZE / 16;

/// What every frame of zstd's begins with. Written with a dictionary, it begins with a checksum of the page instead: that
/// of the object doesn't cover the dictionary's memory, and a bit that flipped there would get into all its pages.
const MAGIC: u32 = 0xfd2f_b528;
const MAGIC_AT: std::ops::Range<usize> = 0..4;

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
    zstd_with_dictionary: Option<CCtx<'static>>,
    unzstd: Option<DCtx<'static>>,
}

impl Default for Scratch {
    fn default() -> Self {
        Self {
            object: Box::new([0; BUFFER_BYTES]),
            page: Box::new([0; PAGE_SIZE]),
            lz4: CompressTable::small(),
            zstd: None,
            zstd_with_dictionary: None,
            unzstd: None,
        }
    }
}

/// What a page is kept as.
#[derive(Debug)]
pub enum Kept<'scratch> {
    /// A word in its entry.
    Entry(Entry),
    /// An object, header room included, whose payload was made in this way.
    Object(Coding, &'scratch mut [u8]),
}

/// A payload that does not become a page again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stored page can't be decompressed")]
pub struct DecompressError;

impl Scratch {
    /// Compresses `page` into the object buffer, behind the header's room; with a dictionary if the compressor takes one
    /// and `encoder` has one. Returns how that was done and the object, header room included.
    pub fn compress(
        &mut self,
        compressor: Compressor,
        encoder: Option<&Encoder>,
        page: &Page,
    ) -> (Coding, &mut [u8]) {
        let room = &mut self.object[HEADER_BYTES..];
        let mut coding = Coding::from(compressor.codec());
        let length = match (compressor, encoder) {
            (Compressor::Lz4, _) => compress_into_with_table(page, &mut room[..], &mut self.lz4).ok(),
            (Compressor::ZstdWithDictionary(_), Some(encoder)) => {
                coding.dictionary = Some(encoder.number());
                let context = self.zstd_with_dictionary.get_or_insert_with(CCtx::create);
                let length = context.compress_using_cdict(&mut room[..], page, encoder.encoder()).ok();
                room[MAGIC_AT].copy_from_slice(&crc32c::crc32c(page).to_le_bytes());
                length
            }
            (Compressor::Zstd(level) | Compressor::ZstdWithDictionary(level), _) => {
                compress_zstd(&mut self.zstd, level, page, room)
            }
        };
        match length {
            Some(length) if length <= WORTHWHILE_BYTES_MAX => {
                (coding, &mut self.object[..HEADER_BYTES + length])
            }
            _ => {
                self.object[HEADER_BYTES..OBJECT_BYTES_MAX].copy_from_slice(page);
                (CodecId::Raw.into(), &mut self.object[..OBJECT_BYTES_MAX])
            }
        }
    }

    /// What `page` is kept as when it goes through `compressor`: nothing but an entry if it repeats a word that fits one,
    /// else the object that is in the buffer then.
    pub fn keep(&mut self, compressor: Compressor, encoder: Option<&Encoder>, page: &Page) -> Kept<'_> {
        let (coding, object) = match same_filled::word_of(page) {
            Some(word) => match Entry::same_filled(word) {
                Some(entry) => return Kept::Entry(entry),
                None => self.same_filled(word),
            },
            None => self.compress(compressor, encoder, page),
        };
        Kept::Object(coding, object)
    }

    /// Puts the word of a same-filled page into the object buffer, for words that no entry can hold.
    fn same_filled(&mut self, word: u64) -> (Coding, &mut [u8]) {
        self.object[HEADER_BYTES..HEADER_BYTES + 8].copy_from_slice(&word.to_le_bytes());
        (CodecId::SameFilled.into(), &mut self.object[..HEADER_BYTES + 8])
    }

    /// Gives back the memory of what compresses with zstd, for whoever has nothing to compress for a while.
    pub fn forget_compressors(&mut self) {
        (self.zstd, self.zstd_with_dictionary) = (None, None);
    }

    /// The first `length` bytes of the object buffer, for copying an object into.
    ///
    /// # Panics
    /// When `length` exceeds [`OBJECT_BYTES_MAX`].
    pub fn object(&mut self, length: usize) -> &mut [u8] {
        &mut self.object[..length]
    }

    /// Makes `page` of the payload in the first `length` bytes of the object buffer; `dictionary` is the one that the
    /// payload was made with, if any.
    ///
    /// # Errors
    /// When the payload is not what `codec` would have written for one page.
    pub fn decompress(
        &mut self,
        codec: CodecId,
        dictionary: Option<&Dictionary>,
        length: usize,
        page: &mut Page,
    ) -> Result<(), DecompressError> {
        let payload = self.object.get_mut(HEADER_BYTES..length).ok_or(DecompressError)?;
        let payload: &[u8] = match dictionary {
            Some(dictionary) if codec == CodecId::Zstd => {
                let context = self.unzstd.get_or_insert_with(DCtx::create);
                return decompress_with_dictionary(context, dictionary, payload, page);
            }
            _ => payload,
        };
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
                let context = self.unzstd.get_or_insert_with(DCtx::create);
                context.decompress(page.as_mut_slice(), payload).map_err(|_| DecompressError)?
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

/// Makes a page of what was written with a dictionary, and compares it with its checksum.
fn decompress_with_dictionary(
    context: &mut DCtx<'static>,
    dictionary: &Dictionary,
    frame: &mut [u8],
    page: &mut Page,
) -> Result<(), DecompressError> {
    let stored = frame.get_mut(MAGIC_AT).ok_or(DecompressError)?;
    let checksum = u32::from_le_bytes([stored[0], stored[1], stored[2], stored[3]]);
    stored.copy_from_slice(&MAGIC.to_le_bytes());
    let decoded = dictionary.decode(|decoder| {
        let produced = context.decompress_using_ddict(page.as_mut_slice(), frame, decoder);
        // Builds before the checksum left zstd's number there.
        produced == Ok(PAGE_SIZE) && (checksum == MAGIC || checksum == crc32c::crc32c(page))
    });
    frame[MAGIC_AT].copy_from_slice(&checksum.to_le_bytes());
    if decoded { Ok(()) } else { Err(DecompressError) }
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
    use super::super::dictionary::tests::alike;
    use super::super::{DictionaryNumber, train};
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
                let (codec, object) = scratch.compress(compressor, None, &page);
                let length = object.len();
                let codec = codec.codec;
                assert_eq!(codec == CodecId::Raw, page == pages()[1], "{compressor}");
                assert!(codec == CodecId::Raw || length < 1400, "{compressor}: {length}");
                let mut back = [0xff; PAGE_SIZE];
                scratch.decompress(codec, None, length, &mut back).unwrap();
                assert!(back == page, "{compressor}");
            }
        }
    }

    #[test]
    fn a_page_that_repeats_a_word_is_kept_as_that_word() {
        let mut scratch = Scratch::default();
        assert!(matches!(
            scratch.keep(Compressor::Lz4, None, &[0; PAGE_SIZE]),
            Kept::Entry(Entry::SameFilled(0))
        ));
        let mut page = [0; PAGE_SIZE];
        same_filled::fill(&mut page, 0x7123_4567_89ab_cdef);
        match scratch.keep(Compressor::Zstd(1), None, &page) {
            Kept::Object(codec, object) => {
                assert_eq!((codec.codec, object.len()), (CodecId::SameFilled, HEADER_BYTES + 8))
            }
            Kept::Entry(entry) => panic!("{entry:?} can't hold it"),
        }
        match scratch.keep(Compressor::Zstd(1), None, &pages()[3]) {
            Kept::Object(codec, object) => assert!(codec == CodecId::Zstd.into() && object.len() < 200),
            Kept::Entry(entry) => panic!("{entry:?}"),
        }
    }

    #[test]
    fn what_does_not_shrink_is_kept_raw() {
        let mut scratch = Scratch::default();
        let (codec, object) = scratch.compress(Compressor::Lz4, None, &pages()[1]);
        assert_eq!((codec, object.len()), (CodecId::Raw.into(), OBJECT_BYTES_MAX));
    }

    #[test]
    fn a_wrong_payload_is_an_error() {
        let mut scratch = Scratch::default();
        scratch.object(200).fill(0x7f);
        let mut page = [0; PAGE_SIZE];
        for codec in [CodecId::Raw, CodecId::Lz4, CodecId::Zstd, CodecId::SameFilled] {
            assert_eq!(scratch.decompress(codec, None, 100, &mut page), Err(DecompressError), "{codec:?}");
            assert_eq!(scratch.decompress(codec, None, 3, &mut page), Err(DecompressError), "{codec:?}");
        }
    }

    #[test]
    fn a_page_written_with_a_dictionary_is_read_with_that_one_alone() {
        let sample = alike(300);
        let dictionary = |number| {
            Dictionary::new(
                "web1",
                DictionaryNumber::new(number).unwrap(),
                train(&sample[..200 * PAGE_SIZE]).unwrap(),
            )
            .unwrap()
        };
        let own = dictionary(1);
        let bytes = train(&sample[100 * PAGE_SIZE..]).unwrap();
        let other = Dictionary::new("web1", own.number(), bytes).unwrap();
        let mut scratch = Scratch::default();
        let page: &Page = sample[250 * PAGE_SIZE..251 * PAGE_SIZE].try_into().unwrap();
        let plain = scratch.compress(Compressor::ZstdWithDictionary(9), None, page).1.len();
        let (coding, object) =
            scratch.compress(Compressor::ZstdWithDictionary(9), own.encoder(9).as_ref(), page);
        let length = object.len();
        assert_eq!(coding, Coding { codec: CodecId::Zstd, dictionary: DictionaryNumber::new(1) });
        assert!(length < plain * 9 / 10, "{length} of {plain}");
        let mut back = [0; PAGE_SIZE];
        scratch.decompress(CodecId::Zstd, Some(&own), length, &mut back).unwrap();
        assert!(back == *page);
        for wrong in [None, Some(&other)] {
            assert_eq!(scratch.decompress(CodecId::Zstd, wrong, length, &mut back), Err(DecompressError));
        }
    }
}
