//! A state file, mapped shared: what is written here outlives the process, whatever ends it. The store's only
//! unsafe code. Every access is checked against the mapping's length; that the bytes are *backed* (a hole in a full
//! tmpfs would be SIGBUS) is the caller's part: [`Mapping::back`] first, touch then.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::crash_point;

/// A word of a mapped file.
#[derive(Debug)]
#[repr(transparent)]
pub struct Word(AtomicU64);

impl Word {
    /// Reads it.
    #[must_use]
    pub fn load(&self, order: Ordering) -> u64 {
        self.0.load(order)
    }

    /// Changes it.
    pub fn store(&self, value: u64, order: Ordering) {
        self.0.store(value, order);
        crash_point::passed();
    }
}

/// Half a word of a mapped file.
#[derive(Debug)]
#[repr(transparent)]
pub struct HalfWord(AtomicU32);

impl HalfWord {
    /// Reads it.
    #[must_use]
    pub fn load(&self, order: Ordering) -> u32 {
        self.0.load(order)
    }

    /// Changes it.
    pub fn store(&self, value: u32, order: Ordering) {
        self.0.store(value, order);
        crash_point::passed();
    }
}

/// A whole file, mapped readable and writable.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    length: usize,
    file: File,
}

// SAFETY: the mapping is shared memory with no thread affinity; `base` and `length` never change. Who may touch
// which bytes when is the callers' protocol, stated at each method.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `length` bytes of `file`, extending it with a hole if it is shorter.
    ///
    /// # Errors
    /// Those of ftruncate and mmap; `InvalidInput` when `length` doesn't fit the address space.
    pub fn new(file: File, length: u64) -> io::Result<Self> {
        if file.metadata()?.len() < length {
            crash_point::after(file.set_len(length))?;
        }
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no memory that exists.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                &file,
                0,
            )?
        };
        let base = NonNull::new(base.cast::<u8>()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { base, length, file })
    }

    /// Keeps the host from swapping out what is backed, now or later.
    ///
    /// # Errors
    /// Those of mlock: `PermissionDenied` or `OutOfMemory` when the process may not lock as much address space.
    pub fn lock(&self) -> io::Result<()> {
        use rustix::mm::{MlockFlags, mlock_with};
        // SAFETY: the range is this mapping, all of it; to be locked changes nothing of what is in it.
        unsafe { mlock_with(self.base.as_ptr().cast(), self.length, MlockFlags::ONFAULT)? };
        Ok(())
    }

    /// Backs a range with memory, zeroed where it was a hole. After this it may be touched.
    ///
    /// The file's length stays as it is. Were somebody to cut it short, it would otherwise grow again, and what was in it
    /// read as zeros; so whoever looks ends by a signal, and the next start finds the file too short.
    ///
    /// # Errors
    /// Those of fallocate: `StorageFull` when the file system has no room left.
    pub fn back(&self, offset: u64, length: u64) -> io::Result<()> {
        crash_point::after(self.fallocate(FallocateFlags::KEEP_SIZE, offset, length))?;
        // What can't be touched says so again, by a signal.
        let _ = self.map_in(offset, length);
        Ok(())
    }

    /// Backs a range that has data and says whether all of it can be read. Where it can't it may not be touched: its disk
    /// is failing, or the memory that it was in.
    ///
    /// # Errors
    /// As [`Self::back`].
    pub fn back_data(&self, offset: u64, length: u64) -> io::Result<bool> {
        crash_point::after(self.fallocate(FallocateFlags::KEEP_SIZE, offset, length))?;
        // EFAULT is a SIGBUS that was spared us.
        Ok(!matches!(self.map_in(offset, length), Err(Errno::FAULT | Errno::HWPOISON)))
    }

    /// Enters a backed range into this process's page table: one system call instead of a fault for every page. Kernels
    /// before 5.14 don't know it; then the first touch of each page does the same.
    fn map_in(&self, offset: u64, length: u64) -> rustix::io::Result<()> {
        let Ok(length) = usize::try_from(length) else { return Err(Errno::INVAL) };
        let start = self.at(offset, length);
        // SAFETY: `at` checked the range, which is backed; populating changes no byte of it.
        unsafe { rustix::mm::madvise(start.as_ptr().cast(), length, rustix::mm::Advice::LinuxPopulateWrite) }
    }

    /// Gives a range back to the host. Nobody may touch it until it is backed again.
    ///
    /// # Errors
    /// Those of fallocate.
    pub fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(crash_point::after(self.fallocate(flags, offset, length))?)
    }

    /// A tmpfs gives up at any signal, also at one that only stops the process for a while.
    fn fallocate(&self, flags: FallocateFlags, offset: u64, length: u64) -> rustix::io::Result<()> {
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, length))
    }

    /// Where it is in the address space, and how many bytes it has.
    #[must_use]
    pub fn range(&self) -> (*const u8, usize) {
        (self.base.as_ptr(), self.length)
    }

    /// The file behind the mapping.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    fn at(&self, offset: u64, length: usize) -> NonNull<u8> {
        let offset = usize::try_from(offset).expect("offsets are within the mapping");
        assert!(length <= self.length && offset <= self.length - length, "access outside a state file");
        // SAFETY: the assertion keeps base + offset inside the mapping.
        unsafe { self.base.add(offset) }
    }

    /// Copies a range out. The range must be backed. Bytes that another thread writes meanwhile arrive torn, which
    /// the checksum of an object finds.
    pub fn read(&self, offset: u64, target: &mut [u8]) {
        let length = target.len();
        let source = self.at(offset, length);
        // SAFETY: `at` checked the source range; the target is a distinct, exclusive borrow in ordinary memory. The
        // caller holds the lock of the VM whose object this is, and objects are freed under that lock, so nobody
        // writes here.
        unsafe { source.copy_to_nonoverlapping(NonNull::from(target).cast(), length) };
    }

    /// Copies `source` in. The range must be backed and, by the arena's allocation, nobody else's.
    pub fn write(&self, offset: u64, source: &[u8]) {
        let target = self.at(offset, source.len());
        // SAFETY: `at` checked the target range; the arena hands a range out once until it is freed, so no other
        // thread reads or writes it; the source is ordinary memory.
        unsafe { target.copy_from_nonoverlapping(NonNull::from(source).cast(), source.len()) };
        crash_point::passed();
    }

    /// `count` aligned words from `offset` on, which must be backed while the reference lives.
    ///
    /// # Panics
    /// When they are not all within the mapping, or `offset` is not a multiple of eight.
    #[must_use]
    pub fn words(&self, offset: u64, count: usize) -> &[Word] {
        assert!(offset.is_multiple_of(8), "words are aligned");
        let start = self.at(offset, count.saturating_mul(8)).cast::<Word>();
        // SAFETY: in bounds by `at`, aligned by the assertion (mappings are page-aligned), valid for any bit
        // pattern, and only ever accessed as atomics, which is all that a `Word` is.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), count) }
    }

    /// The aligned word at `offset`, which must be backed while the reference lives.
    ///
    /// # Panics
    /// As [`Mapping::words`].
    #[must_use]
    pub fn word(&self, offset: u64) -> &Word {
        &self.words(offset, 1)[0]
    }

    /// `count` aligned half-words from `offset` on, which must be backed while the reference lives.
    ///
    /// # Panics
    /// When they are not all within the mapping, or `offset` is not a multiple of four.
    #[must_use]
    pub fn half_words(&self, offset: u64, count: usize) -> &[HalfWord] {
        assert!(offset.is_multiple_of(4), "half-words are aligned");
        let start = self.at(offset, count.saturating_mul(4)).cast::<HalfWord>();
        // SAFETY: as for `words`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), count) }
    }

    /// The aligned half-word at `offset`, which must be backed while the reference lives.
    ///
    /// # Panics
    /// As [`Mapping::half_words`].
    #[must_use]
    pub fn half_word(&self, offset: u64) -> &HalfWord {
        &self.half_words(offset, 1)[0]
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `new` mapped, and every reference into it borrowed `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering;

    fn mapping(length: u64) -> Mapping {
        Mapping::new(tempfile::tempfile().unwrap(), length).unwrap()
    }

    #[test]
    fn what_is_written_is_in_the_file() {
        let mapping = mapping(1 << 20);
        mapping.back(8192, 4096).unwrap();
        mapping.write(8200, b"stays");
        mapping.word(8192).store(7, Ordering::Release);
        let again = Mapping::new(mapping.file().try_clone().unwrap(), 1 << 20).unwrap();
        let mut found = [0; 5];
        again.read(8200, &mut found);
        assert_eq!((&found, again.word(8192).load(Ordering::Acquire)), (b"stays", 7));
    }

    #[test]
    fn a_punched_range_reads_as_zeros_when_backed_again() {
        let mapping = mapping(1 << 16);
        mapping.back(0, 4096).unwrap();
        mapping.half_word(12).store(9, Ordering::Relaxed);
        mapping.punch(0, 4096).unwrap();
        mapping.back(0, 4096).unwrap();
        assert_eq!(mapping.half_word(12).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_file_that_was_cut_short_does_not_grow_again() {
        let mapping = mapping(1 << 16);
        mapping.back(0, 4096).unwrap();
        mapping.file().set_len(4096).unwrap();
        mapping.back(8192, 4096).unwrap();
        assert_eq!(mapping.file().metadata().unwrap().len(), 4096);
    }

    #[test]
    fn several_words_are_those_that_are_asked_for() {
        let mapping = mapping(1 << 16);
        mapping.back(0, 4096).unwrap();
        mapping.word(16).store(1 | 2 << 32, Ordering::Relaxed);
        let words: Vec<_> = mapping.words(8, 3).iter().map(|word| word.load(Ordering::Relaxed)).collect();
        let halves: Vec<_> =
            mapping.half_words(12, 3).iter().map(|half| half.load(Ordering::Relaxed)).collect();
        assert_eq!((&words[..], &halves[..]), (&[0, 1 | 2 << 32, 0][..], &[0, 1, 2][..]));
    }

    #[test]
    #[should_panic(expected = "outside a state file")]
    fn words_that_end_outside_are_refused() {
        let _ = mapping(4096).words(4088, 2);
    }

    #[test]
    #[should_panic(expected = "outside a state file")]
    fn access_outside_is_refused() {
        mapping(4096).write(4090, &[0; 7]);
    }
}
