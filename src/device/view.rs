//! A guest's memory for as long as a turn lasts. A request reads and writes it a dozen times, nearly always in the region
//! that was used last; so that one is remembered, and looked up only once. What spans two regions goes the long way.

use std::cell::Cell;

use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    MemoryRegionAddress, VolatileMemory, VolatileSlice,
};

use super::dirty_log::Log;
use super::guest_memory::{Memory, Region};
use super::stream::Ways;

/// A guest's memory.
#[derive(Debug)]
pub struct View<'a> {
    memory: &'a Memory,
    last: Cell<Option<&'a Region>>,
}

impl<'a> View<'a> {
    /// Of this memory.
    #[must_use]
    pub fn new(memory: &'a Memory) -> Self {
        Self { memory, last: Cell::new(None) }
    }

    /// What it is of.
    #[must_use]
    pub fn memory(&self) -> &'a Memory {
        self.memory
    }

    /// A range of it, if it is shared and in one region.
    #[inline]
    #[must_use]
    pub fn slice(&self, address: GuestAddress, length: usize) -> Option<VolatileSlice<'a, Log<'a>>> {
        if let Some(region) = self.last.get()
            && let Some(offset) = address.0.checked_sub(region.start_addr().0)
            && offset < region.len()
        {
            return region.get_slice(MemoryRegionAddress(offset), length).ok();
        }
        let (region, offset) = self.memory.to_region_addr(address)?;
        self.last.set(Some(region));
        region.get_slice(offset, length).ok()
    }

    /// Whether all of a range is shared.
    #[inline]
    #[must_use]
    pub fn is_there(&self, address: GuestAddress, length: usize) -> bool {
        self.slice(address, length).is_some() || GuestMemoryBackend::check_range(self.memory, address, length)
    }

    /// Reads a value, once. `None` where nothing is shared.
    #[inline]
    #[must_use]
    pub fn read<T: ByteValued>(&self, address: GuestAddress) -> Option<T> {
        match self.slice(address, size_of::<T>()) {
            Some(slice) => Some(slice.get_ref(0).ok()?.load()),
            None => self.memory.read_obj(address).ok(),
        }
    }

    /// Writes a value.
    ///
    /// # Errors
    /// Where nothing is shared.
    #[inline]
    pub fn write<T: ByteValued>(&self, value: T, address: GuestAddress) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, size_of::<T>()) else {
            return self.memory.write_obj(value, address);
        };
        slice.get_ref(0)?.store(value);
        Ok(())
    }

    /// Copies a range out.
    ///
    /// # Errors
    /// When not all of it is shared.
    #[inline]
    pub fn copy_out(&self, address: GuestAddress, target: &mut [u8]) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, target.len()) else {
            return self.memory.read_slice(target, address);
        };
        slice.copy_to(target);
        Ok(())
    }

    /// Copies `source` in.
    ///
    /// # Errors
    /// When there is not room for all of it: nothing, or a part, is written then.
    #[inline]
    pub fn copy_in(&self, address: GuestAddress, source: &[u8]) -> Result<(), GuestMemoryError> {
        let Some(slice) = self.slice(address, source.len()) else {
            return self.memory.write_slice(source, address);
        };
        slice.copy_from(source);
        Ok(())
    }

    /// Copies a page in, the way that takes less by `ways`, and anything else like [`View::copy_in`].
    ///
    /// # Errors
    /// When there is not room for all of it.
    pub fn copy_page_in(
        &self,
        address: GuestAddress,
        source: &[u8],
        ways: &mut Ways,
    ) -> Result<(), GuestMemoryError> {
        match (source.try_into(), self.slice(address, source.len())) {
            (Ok(page), Some(slice)) => ways.copy_page(page, &slice),
            _ => self.copy_in(address, source)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use vm_memory::FileOffset;

    use super::*;
    use crate::device::dirty_log::DirtyLog;
    use crate::device::dirty_log::tests::{file, marked};

    const PAGE: u64 = 4096;

    /// Pages 2 and 3, 4 and 5, a hole, and 8 and 9, logged; and the log's file.
    fn memory() -> (Memory, File) {
        let log_file = file(8);
        let log = Arc::new(DirtyLog::open(log_file.try_clone().unwrap(), 0, 8).unwrap());
        let region = |page: u64| {
            let memory = FileOffset::new(file(2 * PAGE), 0);
            Region::map(memory, 8192, GuestAddress(page * PAGE), Some(Arc::clone(&log))).unwrap()
        };
        (Memory::from_regions(vec![region(2), region(4), region(8)]).unwrap(), log_file)
    }

    #[test]
    fn every_range_is_there_or_not_whatever_was_used_before() {
        let (memory, _) = memory();
        let view = View::new(&memory);
        let ends = [2, 4, 6, 8, 10].map(|page| page * PAGE);
        let starts = ends.iter().flat_map(|end| [end - 9, end - 8, end - 1, *end, end + 1]);
        let starts: Vec<_> = starts.chain([0, 1, u64::MAX - 3, u64::MAX]).collect();
        let mut there = 0;
        for before in [2, 4, 8].map(|page| GuestAddress(page * PAGE)) {
            for start in starts.iter().map(|start| GuestAddress(*start)) {
                for length in [1, 8, 9, 4096, 8192, 8193, 16384] {
                    assert!(view.slice(before, 1).is_some());
                    let wanted = GuestMemoryBackend::check_range(&memory, start, length);
                    assert_eq!(view.is_there(start, length), wanted, "{start:?} {length}");
                    let mut bytes = vec![0; length];
                    assert!(view.slice(before, 1).is_some());
                    assert_eq!(view.copy_out(start, &mut bytes).is_ok(), wanted, "{start:?} {length}");
                    assert_eq!(view.copy_in(start, &bytes).is_ok(), wanted, "{start:?} {length}");
                    assert!(view.slice(before, 1).is_some());
                    assert_eq!(
                        view.copy_page_in(start, &bytes, &mut Ways::leading(true)).is_ok(),
                        wanted,
                        "{start:?} {length}"
                    );
                    there += u32::from(wanted);
                }
                let wanted = memory.read_obj::<u64>(start).ok();
                assert!(view.slice(before, 1).is_some());
                assert_eq!(view.read::<u64>(start), wanted, "{start:?}");
                assert_eq!(view.write(7_u64, start).is_ok(), wanted.is_some(), "{start:?}");
            }
        }
        assert!(there > 50, "{there}");
    }

    #[test]
    fn what_is_written_is_there_and_logged_and_what_is_read_is_not() {
        let (memory, log) = memory();
        let view = View::new(&memory);
        let mut bytes = [0; 16];
        view.copy_out(GuestAddress(4 * PAGE - 8), &mut bytes).unwrap();
        assert_eq!((view.read::<u64>(GuestAddress(8 * PAGE)), bytes), (Some(0), [0; 16]));
        assert!(marked(&log).is_empty());
        view.copy_in(GuestAddress(3 * PAGE - 2), &[1, 2, 3, 4]).unwrap();
        assert_eq!(marked(&log), [2, 3]);
        view.copy_in(GuestAddress(4 * PAGE - 2), &[5, 6, 7, 8]).unwrap();
        assert_eq!(marked(&log), [2, 3, 4], "also across regions");
        view.write(9_u8, GuestAddress(9 * PAGE)).unwrap();
        assert_eq!(marked(&log), [2, 3, 4, 9]);
        let at = |address| memory.read_obj::<u32>(GuestAddress(address)).unwrap().to_le_bytes();
        assert_eq!((at(3 * PAGE - 2), at(4 * PAGE - 2)), ([1, 2, 3, 4], [5, 6, 7, 8]));
        assert_eq!(view.read::<u8>(GuestAddress(9 * PAGE)), Some(9));
    }

    #[test]
    fn a_page_is_there_whichever_way_it_came_and_logged_and_nothing_else_is_touched() {
        // Aligned for that or not, in one region or across two, and what is no page.
        let places = [(0, 4096), (16, 4096), (8, 4096), (1, 4096), (4096, 4096), (5000, 4096), (16, 4095)];
        let cases = [true, false].into_iter().flat_map(|streamed| places.map(|place| (streamed, place)));
        for (streamed, (at, length)) in cases {
            let (memory, log) = memory();
            let view = View::new(&memory);
            let bytes: Vec<u8> = (1..=251).cycle().take(length).collect();
            view.copy_page_in(GuestAddress(2 * PAGE + at as u64), &bytes, &mut Ways::leading(streamed))
                .unwrap();
            let mut found = vec![9; 16384];
            view.copy_out(GuestAddress(2 * PAGE), &mut found).unwrap();
            let mut expected = vec![0; 16384];
            expected[at..at + length].copy_from_slice(&bytes);
            assert!(found == expected, "{length} at {at}, {streamed}");
            let [first, last] = [at, at + length - 1].map(|at| 2 + at as u64 / PAGE);
            assert_eq!(marked(&log), (first..=last).collect::<Vec<_>>(), "{length} at {at}, {streamed}");
        }
    }
}
