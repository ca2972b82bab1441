//! Codecs: how a page becomes a payload and back. A closed set, so an enum. [`Scratch`] holds what one thread needs
//! to work without allocating: buffers and the codecs' own contexts.
//!
//! LZ4 blocks are written by lz4_flex and read by the C library, which is as fast at the former and needs a quarter
//! less time for the latter; every load waits for that. zstd frames may have been made with a [`Dictionary`], and are
//! read with the same one.

mod compressor;
mod dictionary;
mod scratch;

pub use compressor::{Compressor, ParseCompressorError};
#[cfg(test)]
pub(super) use dictionary::tests::alike;
pub use dictionary::{DICTIONARY_BYTES_MAX, Dictionary, DictionaryNumber, Encoder, TrainError, train};
pub use scratch::{DecompressError, Kept, Scratch};

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

/// How a payload was made: what an object's header says of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Coding {
    /// The codec.
    pub codec: CodecId,
    /// The dictionary of its VM that it was made with, if there was one.
    pub dictionary: Option<DictionaryNumber>,
}

impl From<CodecId> for Coding {
    /// Without a dictionary.
    fn from(codec: CodecId) -> Self {
        Self { codec, dictionary: None }
    }
}
