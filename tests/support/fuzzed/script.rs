//! Bytes as a script: numbers one after another, zeros when they have run out.

/// The rest of the bytes.
pub struct Script<'bytes>(pub &'bytes [u8]);

impl<'bytes> Script<'bytes> {
    /// Whether nothing is left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// At most so many of the next bytes.
    pub fn bytes(&mut self, count: usize) -> &'bytes [u8] {
        let (now, later) = self.0.split_at(count.min(self.0.len()));
        self.0 = later;
        now
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let bytes = self.bytes(N);
        array[..bytes.len()].copy_from_slice(bytes);
        array
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.array())
    }

    /// The next two bytes.
    pub fn half_word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// A descriptor, and where it is to be written: in a table or anywhere.
    pub fn descriptor(&mut self) -> (u64, Vec<u8>) {
        let at = u64::from(self.half_word()) * 16;
        let mut bytes = u64::from(self.half_word()).to_le_bytes().to_vec();
        bytes.extend(u32::from(self.half_word()).to_le_bytes());
        bytes.extend(u16::from(self.byte() % 8).to_le_bytes());
        bytes.extend(u16::from(self.byte()).to_le_bytes());
        (at, bytes)
    }

    /// The next four bytes.
    pub fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// The next eight bytes.
    pub fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
