//! What a pool compresses with, as operators write it: `lz4`, `zstd`, `zstd:LEVEL`, and the last two with `+dictionary`.

use std::fmt;
use std::str::FromStr;

use super::CodecId;

/// The compressor that a pool is made with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compressor {
    /// LZ4 (lz4_flex): fast, about 3.5 on ordinary heaps.
    #[default]
    Lz4,
    /// zstd at this level, -7 to 22: denser, three times slower.
    Zstd(i32),
    /// The same with a dictionary of each VM's own, once it has one.
    ZstdWithDictionary(i32),
}

const ZSTD_LEVEL_DEFAULT: i32 = 1;
const ZSTD_LEVELS: std::ops::RangeInclusive<i32> = -7..=22;
/// Levels are numbered from 0 in this many bits.
const LEVEL_BITS: u32 = 5;
/// What follows zstd's name and level.
const WITH_DICTIONARY: &str = "+dictionary";

impl Compressor {
    /// The compressor as a number below 2^16, for a word that is read by everybody and seldom changes.
    #[must_use]
    pub(in crate::store) fn to_bits(self) -> u32 {
        let (kind, level) = match self {
            Self::Lz4 => (0, 0),
            Self::Zstd(level) => (1, level.abs_diff(*ZSTD_LEVELS.start())),
            Self::ZstdWithDictionary(level) => (2, level.abs_diff(*ZSTD_LEVELS.start())),
        };
        kind << LEVEL_BITS | level
    }

    /// The compressor of [`Compressor::to_bits`].
    #[must_use]
    pub(in crate::store) fn from_bits(bits: u32) -> Self {
        let level = i32::try_from(bits & ((1 << LEVEL_BITS) - 1)).unwrap_or(0) + ZSTD_LEVELS.start();
        match bits >> LEVEL_BITS {
            1 => Self::Zstd(level),
            2 => Self::ZstdWithDictionary(level),
            _ => Self::Lz4,
        }
    }

    /// The codec that this compressor writes.
    #[must_use]
    pub fn codec(self) -> CodecId {
        match self {
            Self::Lz4 => CodecId::Lz4,
            Self::Zstd(_) | Self::ZstdWithDictionary(_) => CodecId::Zstd,
        }
    }

    /// The level of a zstd that writes with a dictionary.
    #[must_use]
    pub fn dictionary_level(self) -> Option<i32> {
        match self {
            Self::ZstdWithDictionary(level) => Some(level),
            Self::Lz4 | Self::Zstd(_) => None,
        }
    }
}

/// Why a text names no compressor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is not a compressor: write \"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22, and \"+dictionary\" \
     behind zstd for one that learns from each VM's pages"
)]
pub struct ParseCompressorError {
    given: String,
}

impl FromStr for Compressor {
    type Err = ParseCompressorError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let err = || ParseCompressorError { given: text.to_owned() };
        let (plain, make): (_, fn(i32) -> Self) = match text.strip_suffix(WITH_DICTIONARY) {
            Some(plain) => (plain, Self::ZstdWithDictionary),
            None if text == "lz4" => return Ok(Self::Lz4),
            None => (text, Self::Zstd),
        };
        let level = match plain.split_once(':') {
            None if plain == "zstd" => ZSTD_LEVEL_DEFAULT,
            Some(("zstd", level)) => level.parse().map_err(|_| err())?,
            _ => return Err(err()),
        };
        if ZSTD_LEVELS.contains(&level) { Ok(make(level)) } else { Err(err()) }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::ZstdWithDictionary(level) => write!(f, "zstd:{level}{WITH_DICTIONARY}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressors_are_read_and_printed() {
        for (text, compressor) in [
            ("lz4", Compressor::Lz4),
            ("zstd", Compressor::Zstd(1)),
            ("zstd:-7", Compressor::Zstd(-7)),
            ("zstd+dictionary", Compressor::ZstdWithDictionary(1)),
            ("zstd:22+dictionary", Compressor::ZstdWithDictionary(22)),
        ] {
            assert_eq!(text.parse(), Ok(compressor));
            assert_eq!(compressor.to_string().parse(), Ok(compressor));
            assert_eq!(Compressor::from_bits(compressor.to_bits()), compressor);
        }
        let wrong =
            ["", "LZ4", "lz4:1", "lz4+dictionary", "zstd:", "zstd:23", "zstd:-8", "zstd:x", "deflate"];
        for text in wrong.into_iter().chain(["+dictionary", "zstd+dictionary:3", "zstd:3+dict"]) {
            assert!(text.parse::<Compressor>().is_err(), "{text}");
        }
    }
}
