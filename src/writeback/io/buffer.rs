//! Memory that direct I/O accepts: it starts at a block boundary. Safe code: a vector with room to spare, used from
//! its first aligned byte on. It never grows, so it never moves.

use crate::writeback::place::BLOCK_BYTES;

/// Bytes that start at a block boundary.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    /// `length` zeros.
    #[must_use]
    pub fn zeroed(length: usize) -> Self {
        let memory = vec![0; length + BLOCK_BYTES - 1];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start, length }
    }

    /// Uses the first `length` of the bytes that it was made with; those keep their values.
    ///
    /// # Panics
    /// When it was made with fewer.
    pub fn fit(&mut self, length: usize) {
        assert!(length <= self.memory.len() + 1 - BLOCK_BYTES, "a buffer does not grow");
        self.length = length;
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.length]
    }

    /// The bytes, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_starts_at_a_block_wherever_it_is_moved() {
        for length in [0, 1, 4096, 1 << 20] {
            let buffer = Box::new(Buffer::zeroed(length));
            assert_eq!(buffer.bytes().len(), length);
            let moved = *buffer;
            assert!(moved.bytes().as_ptr().addr().is_multiple_of(BLOCK_BYTES));
        }
    }
}
