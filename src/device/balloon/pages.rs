//! Returning pages to the host: a hole is punched into the file that the VMM shares, which takes them from every mapping
//! of it at once; whoever touches one later finds zeros. Runs of the guest's memory are cut at the ends of its regions, and
//! at huge pages, of which no part can be given back: what is left of one stays as it is, and is counted.
//!
//! `madvise(MADV_REMOVE)` is the same hole by another name, so a file that takes none has no second way.

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestUsize};

use crate::device::guest_memory::{Memory, Region};
use crate::device::segments::Segments;
use crate::page::PAGE_SIZE_U64;

/// Bytes of a page's number in a driver's list.
const NUMBER_BYTES: usize = 4;

/// What became of pages that were to be returned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Returned {
    /// Bytes that are holes now.
    pub punched_bytes: u64,
    /// Bytes that stay: parts of huge pages, or in a file that can't have holes.
    pub kept_bytes: u64,
    /// Bytes that are not in the guest's memory.
    pub outside_bytes: u64,
    /// Why the kernel refused, the last time it did.
    pub refusal: Option<Errno>,
}

impl Returned {
    fn count(&mut self, punched: Result<u64, Errno>, bytes: u64) {
        let punched_bytes = match punched {
            Ok(punched) => punched,
            Err(refusal) => {
                self.refusal = Some(refusal);
                0
            }
        };
        self.punched_bytes = self.punched_bytes.saturating_add(punched_bytes);
        self.kept_bytes = self.kept_bytes.saturating_add(bytes.saturating_sub(punched_bytes));
    }
}

/// Returns `bytes` of guest memory from `start` on.
pub fn give_back(memory: &Memory, start: u64, bytes: u64, returned: &mut Returned) {
    let (mut at, mut left) = (start, bytes);
    while left > 0 {
        let found =
            memory.find_region(GuestAddress(at)).and_then(|region| Some((region, within(region, at)?)));
        let Some((region, offset)) = found else {
            // Nobody gives up memory that begins outside and ends inside by mistake for less.
            returned.outside_bytes = returned.outside_bytes.saturating_add(left);
            return;
        };
        let bytes = left.min(region.len().saturating_sub(offset)).max(1);
        returned.count(punch(region, offset, bytes), bytes);
        at = at.saturating_add(bytes);
        left = left.saturating_sub(bytes);
    }
}

fn within(region: &Region, address: u64) -> Option<GuestUsize> {
    address.checked_sub(region.start_addr().0)
}

/// All of a guest's memory.
#[must_use]
pub fn memory_bytes(memory: &Memory) -> u64 {
    memory.iter().fold(0, |bytes, region| bytes.saturating_add(region.len()))
}

/// Whether a page is in the guest's memory, all of it.
#[must_use]
pub fn is_there(memory: &Memory, page: u32) -> bool {
    let start = u64::from(page).saturating_mul(PAGE_SIZE_U64);
    let region = memory.find_region(GuestAddress(start));
    let left = region.and_then(|region| region.len().checked_sub(within(region, start)?));
    left.is_some_and(|left| left >= PAGE_SIZE_U64)
}

/// Punches what are whole pages of the file out of `bytes` from `offset` in the region on. Returns how many bytes.
fn punch(region: &Region, offset: u64, bytes: u64) -> Result<u64, Errno> {
    let file = region.file_offset().ok_or(Errno::OPNOTSUPP)?;
    let grain = region.page_bytes();
    let start = file.start().checked_add(offset).ok_or(Errno::INVAL)?;
    let end = start.checked_add(bytes).ok_or(Errno::INVAL)?;
    let first = start.checked_next_multiple_of(grain).ok_or(Errno::INVAL)?;
    let behind = end.checked_div(grain).unwrap_or(0).saturating_mul(grain);
    let whole = behind.saturating_sub(first);
    if whole > 0 {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| fallocate(file.file(), flags, first, whole))?;
    }
    Ok(whole)
}

/// The runs in numbers of pages that are in order: first page and how many.
pub fn runs(pages: &[u32]) -> impl Iterator<Item = (u32, u32)> + '_ {
    pages.chunk_by(|page, next| page.checked_add(1) == Some(*next)).filter_map(|run| {
        let length = u32::try_from(run.len()).ok()?;
        Some((*run.first()?, length))
    })
}

/// Takes at most `most` numbers of pages off the front of a driver's list. A cut number at its end is none.
pub fn take_numbers(memory: &Memory, list: &mut Segments, most: usize, pages: &mut Vec<u32>) {
    pages.clear();
    let mut number = [0; NUMBER_BYTES];
    let mut filled = 0usize;
    while pages.len() < most {
        let wanted = NUMBER_BYTES.saturating_sub(filled);
        let Some((address, length)) = list.take_front(wanted) else { return };
        let part = number.get_mut(filled..).and_then(|rest| rest.get_mut(..length));
        // What was checked when the chain was walked may be gone by now.
        let Some(Ok(())) = part.map(|part| memory.read_slice(part, address)) else { return };
        filled = filled.saturating_add(length);
        if filled == NUMBER_BYTES {
            pages.push(u32::from_le_bytes(number));
            filled = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::{FileExt, MetadataExt};

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
    use vm_memory::FileOffset;

    use super::*;
    use crate::device::segments::Segment;

    const PAGE: u64 = PAGE_SIZE_U64;

    fn file(flags: MemfdFlags, pages: u64, page_bytes: u64) -> File {
        let flags = flags | MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("given", flags).unwrap());
        file.set_len(pages * page_bytes).unwrap();
        file
    }

    /// Pages of a file, from its second on, as guest memory at `start`.
    fn region(file: &File, pages: u64, start: u64) -> Region {
        let offset = FileOffset::new(file.try_clone().unwrap(), PAGE);
        let length = usize::try_from(pages * PAGE).unwrap();
        Region::map(offset, length, GuestAddress(start), None).unwrap()
    }

    fn given(memory: &Memory, start: u64, bytes: u64) -> Returned {
        let mut returned = Returned::default();
        give_back(memory, start, bytes, &mut returned);
        returned
    }

    #[test]
    fn what_is_given_back_is_gone_and_its_neighbours_are_not() {
        let file = file(MemfdFlags::empty(), 9, PAGE);
        file.write_all_at(&[7; 9 * 4096], 0).unwrap();
        let memory = Memory::from_regions(vec![region(&file, 8, 1 << 32)]).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 9 * 8);
        let returned = given(&memory, (1 << 32) + PAGE, 3 * PAGE);
        assert_eq!(returned, Returned { punched_bytes: 3 * PAGE, ..Returned::default() });
        assert_eq!(file.metadata().unwrap().blocks(), 6 * 8);
        let bytes: Vec<u8> =
            (0..8).map(|n| memory.read_obj(GuestAddress((1 << 32) + n * PAGE)).unwrap()).collect();
        assert_eq!(bytes, [7, 0, 0, 0, 7, 7, 7, 7]);
    }

    #[test]
    fn a_run_goes_on_in_the_next_region_and_ends_where_there_is_none() {
        let (one, other) = (file(MemfdFlags::empty(), 5, PAGE), file(MemfdFlags::empty(), 5, PAGE));
        for file in [&one, &other] {
            file.write_all_at(&[7; 5 * 4096], 0).unwrap();
        }
        let memory = Memory::from_regions(vec![region(&one, 4, 0), region(&other, 4, 4 * PAGE)]).unwrap();
        let returned = given(&memory, 3 * PAGE, 7 * PAGE);
        assert_eq!((returned.punched_bytes, returned.outside_bytes), (5 * PAGE, 2 * PAGE));
        assert_eq!(one.metadata().unwrap().blocks(), 4 * 8);
        assert_eq!(other.metadata().unwrap().blocks(), 8);
        assert_eq!(given(&memory, 8 * PAGE, u64::MAX).outside_bytes, u64::MAX);
        assert_eq!(given(&memory, u64::MAX, 5).outside_bytes, 5);
        assert!(is_there(&memory, 7) && !is_there(&memory, 8) && !is_there(&memory, u32::MAX));
    }

    #[test]
    fn a_part_of_a_page_stays() {
        let file = file(MemfdFlags::empty(), 5, PAGE);
        file.write_all_at(&[7; 5 * 4096], 0).unwrap();
        let memory = Memory::from_regions(vec![region(&file, 4, 0)]).unwrap();
        let returned = given(&memory, 1, 2 * PAGE);
        assert_eq!((returned.punched_bytes, returned.kept_bytes), (PAGE, PAGE));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(PAGE - 1)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(2 * PAGE)).unwrap(), 7);
        let returned = given(&memory, 5, 100);
        assert_eq!((returned.punched_bytes, returned.kept_bytes), (0, 100));
    }

    #[test]
    fn huge_pages_go_whole_or_not_at_all() {
        const HUGE: u64 = 2 << 20;
        let file = file(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, 4, HUGE);
        let length = usize::try_from(3 * HUGE).unwrap();
        let region = Region::map(FileOffset::new(file, HUGE), length, GuestAddress(0), None).unwrap();
        let memory = Memory::from_regions(vec![region]).unwrap();
        let all_but_one = given(&memory, PAGE, HUGE - PAGE);
        assert_eq!((all_but_one.punched_bytes, all_but_one.kept_bytes), (0, HUGE - PAGE));
        let more_than_one = given(&memory, PAGE, 2 * HUGE);
        assert_eq!((more_than_one.punched_bytes, more_than_one.kept_bytes), (HUGE, HUGE));
        assert_eq!(given(&memory, HUGE, 2 * HUGE).punched_bytes, 2 * HUGE);
    }

    #[test]
    fn a_file_that_takes_no_holes_keeps_its_pages() {
        let file = file(MemfdFlags::empty(), 5, PAGE);
        let memory = Memory::from_regions(vec![region(&file, 4, 0)]).unwrap();
        memory.write_obj(7u8, GuestAddress(0)).unwrap();
        // For whoever has no mapping yet: ours may go on writing.
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        let returned = given(&memory, 0, 2 * PAGE);
        assert_eq!((returned.kept_bytes, returned.refusal), (2 * PAGE, Some(Errno::PERM)));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
    }

    #[test]
    fn lists_may_be_cut_anywhere() {
        let file = file(MemfdFlags::empty(), 5, PAGE);
        let memory = Memory::from_regions(vec![region(&file, 4, 0)]).unwrap();
        let numbers: Vec<u8> = (1..=5u32).flat_map(|n| (n << 16).to_le_bytes()).collect();
        memory.write_slice(&numbers, GuestAddress(100)).unwrap();
        let mut list = Segments::default();
        for (at, length) in [(100, 3), (103, 6), (109, 11), (100, 2)] {
            list.push(Segment { address: GuestAddress(at), length });
        }
        let mut pages = Vec::new();
        take_numbers(&memory, &mut list, 2, &mut pages);
        assert_eq!(pages, [1 << 16, 2 << 16]);
        take_numbers(&memory, &mut list, 9, &mut pages);
        assert_eq!(pages, [3 << 16, 4 << 16, 5 << 16]);
        take_numbers(&memory, &mut list, 9, &mut pages);
        assert!(pages.is_empty() && list.is_empty());
    }

    #[test]
    fn neighbours_are_one_run() {
        let found: Vec<_> = runs(&[1, 2, 3, 7, 9, 10, u32::MAX]).collect();
        assert_eq!(found, [(1, 3), (7, 1), (9, 2), (u32::MAX, 1)]);
        assert_eq!(runs(&[]).count(), 0);
    }
}
