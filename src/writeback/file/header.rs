//! The header of the writeback file, in its first block and again in the second: which file this is. A file is Ballast's
//! to write only when it has one, or when its first segment is empty.
//!
//! ```text
//!  0         8         12         16        32       60       64
//! ┌─────────┬─────────┬──────────┬─────────┬────────┬────────┐
//! │ magic   │ version │ segments │ file id │ zeros  │ crc32c │   little-endian, then zeros
//! └─────────┴─────────┴──────────┴─────────┴────────┴────────┘
//!  BALLWBF\0  1         with this one, random         of 0–59
//! ```

use std::fmt;
use std::io;

use crate::writeback::io::Buffer;
use crate::writeback::place::BLOCK_BYTES;

const MAGIC: &[u8; 8] = b"BALLWBF\0";
/// The version of the file's layout.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 64;
/// Where the copies stand, in case a bit of one flips.
const COPIES_AT: [usize; 2] = [0, BLOCK_BYTES];

/// Names one writeback file among all others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileId(pub [u8; 16]);

impl FileId {
    /// A random one.
    ///
    /// # Errors
    /// When the kernel has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(id))
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What the first segment of a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Zeros, or nothing at all.
    Nothing,
    /// A header of this version.
    Header(FileId),
    /// A header of another version.
    Version(u32),
    /// Ours by the magic, with a wrong checksum.
    Damaged,
    /// Somebody's data.
    Data,
}

impl Found {
    /// Says what the first segment holds; `bytes` is as much of it as the file has.
    #[must_use]
    pub fn in_segment(bytes: &[u8]) -> Self {
        if bytes.iter().all(|byte| *byte == 0) {
            return Self::Nothing;
        }
        let [first, second] = Self::copies(bytes);
        if matches!(first, Self::Damaged | Self::Data) && matches!(second, Self::Header(_)) {
            second
        } else {
            first
        }
    }

    /// Whether both copies of the header are there, and sound.
    #[must_use]
    pub fn is_whole(bytes: &[u8]) -> bool {
        let [first, second] = Self::copies(bytes);
        first == second && matches!(first, Self::Header(_))
    }

    fn copies(bytes: &[u8]) -> [Self; 2] {
        COPIES_AT.map(|at| bytes.get(at..).map_or(Self::Data, Self::in_copy))
    }

    fn in_copy(bytes: &[u8]) -> Self {
        let Some(header) = bytes.first_chunk::<HEADER_BYTES>().filter(|header| header.starts_with(MAGIC))
        else {
            return Self::Data;
        };
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        match (word(60) == crc32c::crc32c(&header[..60]), word(8)) {
            (false, _) => Self::Damaged,
            (true, VERSION) => Self::Header(FileId(std::array::from_fn(|i| header[16 + i]))),
            (true, version) => Self::Version(version),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("an empty file"),
            Self::Header(id) => write!(f, "the writeback file {id}"),
            Self::Version(version) => write!(f, "a writeback file of version {version}"),
            Self::Damaged => f.write_str("a writeback file with a damaged header"),
            Self::Data => f.write_str("something that is no writeback file"),
        }
    }
}

/// The first blocks of the file `id` with so many segments.
#[must_use]
pub fn encode(id: FileId, segments: u32) -> Buffer {
    let mut blocks = Buffer::zeroed(COPIES_AT.len() * BLOCK_BYTES);
    let bytes = blocks.bytes_mut();
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..16].copy_from_slice(&segments.to_le_bytes());
    bytes[16..32].copy_from_slice(&id.0);
    let checksum = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
    let (first, second) = bytes.split_at_mut(BLOCK_BYTES);
    second.copy_from_slice(first);
    blocks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_known_from_anything_else() {
        let id = FileId([7; 16]);
        let block = encode(id, 9);
        let found = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = block.bytes().to_vec();
            change(&mut bytes);
            Found::in_segment(&bytes)
        };
        assert_eq!(found(&|_| {}), Found::Header(id));
        for bit in 0..64 * 8 {
            let flip = |bytes: &mut Vec<u8>| bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(found(&flip), Found::Header(id), "there is a copy");
        }
        let flip_both =
            |bytes: &mut Vec<u8>, at: usize| COPIES_AT.iter().for_each(|copy| bytes[copy + at] ^= 1);
        assert_eq!(found(&|bytes| flip_both(bytes, 20)), Found::Damaged);
        assert_eq!(found(&|bytes| flip_both(bytes, 0)), Found::Data);
        assert_eq!(
            found(&|bytes| bytes.truncate(BLOCK_BYTES)),
            Found::Header(id),
            "as an older build made it"
        );
        assert_eq!(found(&|bytes| bytes.truncate(63)), Found::Data);
        assert_eq!(found(&|bytes| bytes.fill(0)), Found::Nothing);
        assert_eq!(found(&Vec::clear), Found::Nothing);
        let newer = |bytes: &mut Vec<u8>| {
            bytes[8] = 2;
            let checksum = crc32c::crc32c(&bytes[..60]);
            bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        };
        assert_eq!(found(&newer), Found::Version(2));
        assert!(Found::is_whole(block.bytes()) && !Found::is_whole(&block.bytes()[..BLOCK_BYTES]));
        assert_eq!(id.to_string(), "07".repeat(16));
    }
}
