//! Requests and answers in the words of virtio-blk, apart from where they stand in memory.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

/// Bytes of a request's header: type, reserved, sector.
pub(crate) const HEADER_BYTES: usize = 16;

/// Bytes of one range of a discard or write-zeroes.
pub(crate) const RANGE_BYTES: u32 = 16;

/// Bytes of the answer to [`Op::GetId`].
pub(crate) const ID_BYTES: u32 = 20;

/// What to ask of the device. The data of a request with a given number of bytes is in its tag's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Load `bytes` from `sector` on.
    Read {
        /// First sector.
        sector: u64,
        /// Length of the data.
        bytes: u32,
    },
    /// Store `bytes` from `sector` on.
    Write {
        /// First sector.
        sector: u64,
        /// Length of the data.
        bytes: u32,
    },
    /// Make earlier writes durable.
    Flush,
    /// The device's name.
    GetId,
    /// Give up ranges, which [`super::Queue::write_ranges`] has put into the buffer.
    Discard {
        /// How many ranges.
        ranges: u32,
    },
    /// Make ranges read as zeros; like [`Op::Discard`].
    WriteZeroes {
        /// How many ranges.
        ranges: u32,
    },
    /// Anything else, right or wrong.
    Other {
        /// The request's type.
        kind: u32,
        /// The header's sector field.
        sector: u64,
        /// Length of the data.
        bytes: u32,
        /// Whether the device is to write the data.
        device_writes: bool,
    },
}

impl Op {
    /// Name for messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Read { .. } => "a read",
            Self::Write { .. } => "a write",
            Self::Flush => "a flush",
            Self::GetId => "a get-id",
            Self::Discard { .. } => "a discard",
            Self::WriteZeroes { .. } => "a write-zeroes",
            Self::Other { .. } => "a request of another type",
        }
    }

    /// The header's sector.
    #[must_use]
    pub fn sector(self) -> u64 {
        match self {
            Self::Read { sector, .. } | Self::Write { sector, .. } | Self::Other { sector, .. } => sector,
            Self::Flush | Self::GetId | Self::Discard { .. } | Self::WriteZeroes { .. } => 0,
        }
    }

    /// Length of the data.
    pub(crate) fn bytes(self) -> u32 {
        match self {
            Self::Read { bytes, .. } | Self::Write { bytes, .. } | Self::Other { bytes, .. } => bytes,
            Self::Flush => 0,
            Self::GetId => ID_BYTES,
            Self::Discard { ranges } | Self::WriteZeroes { ranges } => ranges.saturating_mul(RANGE_BYTES),
        }
    }

    /// Whether the device writes the data.
    pub(crate) fn device_writes(self) -> bool {
        match self {
            Self::Read { .. } | Self::GetId => true,
            Self::Other { device_writes, .. } => device_writes,
            Self::Write { .. } | Self::Flush | Self::Discard { .. } | Self::WriteZeroes { .. } => false,
        }
    }

    pub(crate) fn header(self) -> [u8; HEADER_BYTES] {
        let kind = match self {
            Self::Read { .. } => VIRTIO_BLK_T_IN,
            Self::Write { .. } => VIRTIO_BLK_T_OUT,
            Self::Flush => VIRTIO_BLK_T_FLUSH,
            Self::GetId => VIRTIO_BLK_T_GET_ID,
            Self::Discard { .. } => VIRTIO_BLK_T_DISCARD,
            Self::WriteZeroes { .. } => VIRTIO_BLK_T_WRITE_ZEROES,
            Self::Other { kind, .. } => kind,
        };
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&self.sector().to_le_bytes());
        header
    }
}

/// The device's answer: the byte at the end of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoError,
    /// The device doesn't know such requests.
    Unsupported,
    /// The chain came back, but nobody wrote an answer.
    Unwritten,
    /// An answer that the specification doesn't have.
    Other(u8),
}

impl Status {
    /// What stands in the status byte before the device writes it.
    pub(crate) const UNWRITTEN: u8 = 0xff;
}

impl From<u8> for Status {
    fn from(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            1 => Self::IoError,
            2 => Self::Unsupported,
            Self::UNWRITTEN => Self::Unwritten,
            other => Self::Other(other),
        }
    }
}

/// One range of a discard or write-zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// Number of sectors.
    pub sectors: u32,
    /// Flags: 1 lets a write-zeroes unmap, everything else is reserved.
    pub flags: u32,
}

impl Range {
    pub(crate) fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.sector.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[12..].copy_from_slice(&self.flags.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_carry_type_and_sector() {
        let header = Op::Write { sector: 0x0102, bytes: 4096 }.header();
        assert_eq!(header, [1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Op::Discard { ranges: 2 }.header()[0], 11);
        assert_eq!(Op::WriteZeroes { ranges: 2 }.bytes(), 32);
        assert_eq!(Op::Discard { ranges: u32::MAX }.bytes(), u32::MAX);
    }

    #[test]
    fn every_status_byte_has_a_meaning() {
        let read = [0, 1, 2, 0xff, 3].map(Status::from);
        let meant = [Status::Ok, Status::IoError, Status::Unsupported, Status::Unwritten, Status::Other(3)];
        assert_eq!(read, meant);
    }
}
