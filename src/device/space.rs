//! Configuration spaces: a few bytes at offsets, read and written as a VMM counts them.

/// Where cloud-hypervisor before 2026 starts to count: the offset of the configuration in virtio-mmio.
const MMIO_CONFIG_OFFSET: u32 = 0x100;

/// Where a VMM's offset is in the space.
#[must_use]
pub fn offset_in_space(offset: u32) -> usize {
    offset.checked_sub(MMIO_CONFIG_OFFSET).unwrap_or(offset) as usize
}

/// The answer to a request for `size` bytes at `offset`: exactly that many, zeros where there is nothing. QEMU counts
/// from 0, older cloud-hypervisors from 0x100.
#[must_use]
pub fn read(space: &[u8], offset: u32, size: u32) -> Vec<u8> {
    let mut answer = vec![0; size as usize];
    for (target, source) in answer.iter_mut().zip(space.iter().skip(offset_in_space(offset))) {
        *target = *source;
    }
    answer
}

/// Puts what a driver writes at `offset` into the space; what lies beyond its end goes nowhere.
pub fn write(space: &mut [u8], offset: u32, bytes: &[u8]) {
    for (target, source) in space.iter_mut().skip(offset_in_space(offset)).zip(bytes) {
        *target = *source;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_of_counting_get_the_same_bytes() {
        let space: Vec<u8> = (0..60).collect();
        assert_eq!(read(&space, 0, 60), space);
        assert_eq!(read(&space, 0x100, 60), space);
        assert_eq!(read(&space, 34, 2), [34, 35]);
    }

    #[test]
    fn what_lies_beyond_is_zero() {
        let space = [1; 60];
        assert_eq!(read(&space, 56, 8), [1, 1, 1, 1, 0, 0, 0, 0]);
        assert_eq!(read(&space, u32::MAX, 4), [0; 4]);
        assert_eq!(read(&space, 0, 256).len(), 256);
    }

    #[test]
    fn what_is_written_beyond_is_nowhere() {
        let mut space = [0; 4];
        write(&mut space, 2, &[1, 2, 3]);
        assert_eq!(space, [0, 0, 1, 2]);
        write(&mut space, 0x100, &[7]);
        write(&mut space, u32::MAX, &[9]);
        assert_eq!(space, [7, 0, 1, 2]);
    }
}
