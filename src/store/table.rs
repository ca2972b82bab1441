//! The page table of one VM: an entry and an age for every slot, in a sparse file of the state directory. Chunks of
//! it are backed when their first slot is used; an unbacked chunk is a chunk of empty slots and is never touched.
//! Tags (a generation, and the pool that made the object) live beside it in ordinary memory: they only have to tell
//! apart what one process sees.
//!
//! ```text
//! 0      header, little-endian: 0 magic "BALLTBL\0"  8 version u32  12 VM number u32
//!          16 slots u32  20 length of the name u32  24 name  88 crc32c of all before u32
//!          96 u32: all bits set once the VM's first pages (its swap header) are in place
//!          128 the key of the VM's records in the writeback file  160 crc32c of the key u32
//!          164 crashes in a row while working for the VM, once in each byte  168 the last one's second of the boot-time clock u32
//!          176 the second of the boot-time clock at which a VMM was connected last u32  180 the complement of that
//!          184 pages that the VM's balloon is to have u32  188 the complement  192 that it has u32  196 the complement
//! 2048   the same again but for the words at 96 and from 164 on, in case the first one is damaged
//! 4096   chunk 0: 4096 entries of 8 bytes, then 4096 ages of 4 bytes
//! 53248  chunk 1, and so on
//! ```

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::crashes::Crashes;
use super::mapping::{HalfWord, Mapping, Word};
use super::state::{STATE_VERSION, STATE_VERSION_MIN};
use crate::crash_point;
use crate::ids::{Bytes, Slot, VmId};
use crate::page::{PAGE_SIZE, PAGE_SIZE_U64};
use crate::private;

const MAGIC: &[u8; 8] = b"BALLTBL\0";
const HEADER_BYTES: u64 = PAGE_SIZE_U64;
const INITIALISED_AT: u64 = 96;
const CHECKSUM_AT: usize = 88;
const KEY_AT: usize = 128;
const KEY_BYTES: usize = 32;
const KEY_CHECKSUM_AT: usize = KEY_AT + KEY_BYTES;
const CRASHES_AT: u64 = 164;
const LAST_CRASH_AT: u64 = 168;
const COPY_AT: usize = PAGE_SIZE / 2;
/// The longest name of a VM, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Slots per chunk.
pub const CHUNK_SLOTS: usize = 4096;
const ENTRIES_BYTES: u64 = CHUNK_SLOTS as u64 * 8;
const CHUNK_BYTES: u64 = ENTRIES_BYTES + CHUNK_SLOTS as u64 * 4;

/// The second of the boot-time clock that it is.
#[must_use]
pub fn seconds_since_boot() -> u32 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u32::try_from(now.tv_sec).unwrap_or(u32::MAX)
}

/// How large the disk of so many slots is.
pub(super) fn disk_size(slots: u32) -> Bytes {
    Bytes(u64::from(slots) * PAGE_SIZE_U64)
}

/// One VM's page table.
pub struct Table {
    pub(super) mapping: Mapping,
    vm: VmId,
    name: String,
    slots: u32,
    key: [u8; KEY_BYTES],
    /// The tags of each backed chunk; unset for a chunk that is not backed.
    chunks: Vec<OnceLock<Box<[AtomicU32]>>>,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the key.
        f.debug_struct("Table").field("vm", &self.vm).field("slots", &self.slots).finish_non_exhaustive()
    }
}

/// Why a page table can't be used.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The header is not one that this version wrote for this VM.
    #[error("the page table's header is damaged")]
    Header,
    /// Somebody cut the file short.
    #[error("the page table has {found} bytes and must have {wanted}: it was cut short")]
    CutShort {
        /// Bytes that it has.
        found: u64,
        /// Bytes that it was made with.
        wanted: u64,
    },
    /// It is for a device of another size.
    #[error("the VM was created with {} of swap and is configured with {}", disk_size(*found), disk_size(*wanted))]
    Size {
        /// Slots in the table.
        found: u32,
        /// Slots in the configuration.
        wanted: u32,
    },
    /// Its disk, or the memory that it was in, is failing.
    #[error("parts of the page table can't be read: its disk is failing, or the host's memory")]
    Unreadable,
    /// The file can't be created or mapped, or not be read for now.
    #[error("the page table can't be opened")]
    Io(#[from] io::Error),
}

impl Table {
    /// Makes an empty table at `path`; the file appears complete or not at all.
    ///
    /// # Errors
    /// Those of creating, writing and renaming the file.
    pub fn create(path: &Path, vm: VmId, name: &str, slots: u32) -> Result<Self, TableError> {
        let mut key = [0; KEY_BYTES];
        rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty()).map_err(io::Error::from)?;
        let mut page = [0; PAGE_SIZE];
        let header = Header { vm, slots, key };
        page.chunks_exact_mut(COPY_AT).try_for_each(|copy| header.encode(name, copy))?;
        let new = path.with_extension("new");
        let made = || {
            private::write(&new, &page)?;
            // Before the table has its name: one that is shorter was cut short.
            crash_point::after(fs::OpenOptions::new().write(true).open(&new)?.set_len(file_bytes(slots)))?;
            crash_point::after(fs::rename(&new, path))
        };
        // Where there is no room it would take some for nothing.
        made().inspect_err(|_| drop(fs::remove_file(&new)))?;
        Self::open(path, name)
    }

    /// Opens the table at `path` and backs what holds data, without reading any entry.
    ///
    /// # Errors
    /// When the header is damaged or another VM's, or the file can't be mapped.
    pub fn open(path: &Path, name: &str) -> Result<Self, TableError> {
        let file = private::open(path)?;
        let mut page = [0; PAGE_SIZE];
        file.read_exact_at(&mut page, 0).map_err(|err| match err.kind() {
            io::ErrorKind::UnexpectedEof => TableError::Header,
            _ if private::is_unreadable(&err) => TableError::Unreadable,
            _ => TableError::Io(err),
        })?;
        let copies = page.chunks_exact_mut(COPY_AT);
        let (mut damaged, mut header) = (false, None);
        let mut old = Vec::new();
        for copy in copies {
            match Header::parse(name, copy) {
                Some((found, STATE_VERSION)) => header = Some(found),
                Some((found, _)) => {
                    header = Some(found);
                    old.push(copy);
                }
                None => {
                    damaged = true;
                    old.push(copy);
                }
            }
        }
        let header = header.ok_or(TableError::Header)?;
        if damaged {
            tracing::error!(vm = name, path = %path.display(), "one copy of the page table's header is damaged; it is mended from the other");
        }
        if !old.is_empty() {
            old.into_iter().try_for_each(|copy| header.encode(name, copy))?;
            crash_point::after(file.write_all_at(&page, 0))?;
        }
        let (found, wanted) = (file.metadata()?.len(), file_bytes(header.slots));
        if found < wanted {
            return Err(TableError::CutShort { found, wanted });
        }
        let (table, whole) = Self::map(file, header, name)?;
        if whole { Ok(table) } else { Err(TableError::Unreadable) }
    }

    /// Opens what is left of the table at `path` when its header is damaged, or parts of it can't be read: the length of
    /// the file says how many slots there are, and a chunk that can't be read passes for one that was never used. For
    /// looking at its entries, and for nothing else.
    ///
    /// # Errors
    /// When the file can't be opened or mapped.
    pub fn open_without_header(path: &Path) -> io::Result<Self> {
        let file = private::open(path)?;
        let chunks = file.metadata()?.len().saturating_sub(HEADER_BYTES) / CHUNK_BYTES;
        let slots = u32::try_from(chunks * CHUNK_SLOTS as u64).map_err(io::Error::other)?;
        Ok(Self::map(file, Header { vm: VmId(0), slots, key: [0; KEY_BYTES] }, "")?.0)
    }

    /// And whether all of its chunks can be read.
    fn map(file: File, Header { vm, slots, key }: Header, name: &str) -> io::Result<(Self, bool)> {
        let (chunks, length) = (chunks(slots), file_bytes(slots));
        let mapping = Mapping::new(file, length)?;
        let chunks = std::iter::repeat_with(OnceLock::new).take(chunks).collect();
        let table = Self { mapping, vm, name: name.to_owned(), slots, key, chunks };
        let whole = table.back_chunks_with_data(length)?;
        Ok((table, whole))
    }

    /// Whether all of them can be read.
    fn back_chunks_with_data(&self, length: u64) -> io::Result<bool> {
        let (mut at, mut whole) = (HEADER_BYTES, true);
        while at < length {
            at = match rustix::fs::seek(self.mapping.file(), SeekFrom::Data(at)) {
                Ok(data) => data,
                // No data from here to the end.
                Err(Errno::NXIO) => break,
                Err(err) => return Err(err.into()),
            };
            let chunk = usize::try_from((at - HEADER_BYTES) / CHUNK_BYTES).unwrap_or(usize::MAX);
            if chunk >= self.chunks.len() {
                break;
            }
            if self.mapping.back_data(chunk_offset(chunk), CHUNK_BYTES)? {
                self.set_backed(chunk);
            } else {
                whole = false;
            }
            at = chunk_offset(chunk + 1);
        }
        Ok(whole)
    }

    fn back_chunk(&self, chunk: usize) -> io::Result<()> {
        // Two threads may both back it: the second changes nothing.
        self.mapping.back(chunk_offset(chunk), CHUNK_BYTES)?;
        self.set_backed(chunk);
        Ok(())
    }

    fn set_backed(&self, chunk: usize) {
        self.chunks[chunk].get_or_init(|| (0..CHUNK_SLOTS).map(|_| AtomicU32::new(0)).collect());
    }

    /// The VM's number.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.vm
    }

    /// The VM's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key of the VM's records in the writeback file. It is gone when the table is.
    #[must_use]
    pub fn key(&self) -> &[u8; KEY_BYTES] {
        &self.key
    }

    /// Slots on the VM's device.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.slots
    }

    /// Whether the VM's first pages were put in place.
    #[must_use]
    pub fn initialised(&self) -> bool {
        // One flipped bit does not make it another answer.
        self.mapping.half_word(INITIALISED_AT).load(Ordering::Acquire).count_ones() > u32::BITS / 2
    }

    /// Keeps the host from swapping it out.
    ///
    /// # Errors
    /// Those of [`Mapping::lock`].
    pub fn lock(&self) -> io::Result<()> {
        self.mapping.lock()
    }

    /// Notes that the VM's first pages are in place.
    pub fn set_initialised(&self) {
        self.mapping.half_word(INITIALISED_AT).store(u32::MAX, Ordering::Release);
    }

    /// How often the daemon has ended itself while it worked for the VM.
    #[must_use]
    pub fn crashes(&self) -> Crashes<'_> {
        let (count, last_seconds) =
            (self.mapping.half_word(CRASHES_AT), self.mapping.half_word(LAST_CRASH_AT));
        Crashes { count, last_seconds }
    }

    /// Makes sure that `slot` can be written.
    ///
    /// # Errors
    /// `StorageFull` when the state directory has no room left.
    pub fn back(&self, slot: Slot) -> io::Result<()> {
        let chunk = slot.index() / CHUNK_SLOTS;
        if self.chunks[chunk].get().is_none() {
            self.back_chunk(chunk)?;
        }
        Ok(())
    }

    /// The record of a slot, or `None` when its chunk was never used and the slot is thus empty.
    ///
    /// # Panics
    /// When the slot is beyond the device.
    #[must_use]
    pub fn record(&self, slot: Slot) -> Option<Record<'_>> {
        assert!(slot.0 < self.slots, "slot {slot} is beyond the device");
        let (chunk, within) = (slot.index() / CHUNK_SLOTS, slot.index() % CHUNK_SLOTS);
        let tags = self.chunks[chunk].get()?;
        let offset = chunk_offset(chunk);
        Some(Record {
            entry: self.mapping.word(offset + within as u64 * 8),
            age: self.mapping.half_word(offset + ENTRIES_BYTES + within as u64 * 4),
            tag: &tags[within],
        })
    }

    /// The first slot from `slot` on whose chunk is backed, or `None` when the rest of the device was never used.
    #[must_use]
    pub fn next_backed(&self, slot: Slot) -> Option<Slot> {
        self.next_backed_before(slot, Slot(self.slots))
    }

    /// The same, looking no further than `end`.
    #[must_use]
    pub fn next_backed_before(&self, slot: Slot, end: Slot) -> Option<Slot> {
        let chunk = slot.index() / CHUNK_SLOTS;
        if self.chunks.get(chunk)?.get().is_some() {
            return (slot < end).then_some(slot);
        }
        let chunks = end.index().div_ceil(CHUNK_SLOTS).min(self.chunks.len());
        let next = (chunk + 1..chunks).find(|next| self.chunks[*next].get().is_some())?;
        u32::try_from(next * CHUNK_SLOTS).ok().map(Slot)
    }

    /// All slots of backed chunks, in order.
    pub fn backed_slots(&self) -> impl Iterator<Item = Slot> {
        std::iter::successors(self.next_backed(Slot(0)), |slot| {
            self.next_backed(Slot(slot.0.checked_add(1)?))
        })
    }

    /// All backed chunks, in order: for who looks at every slot, and has no time to ask for each.
    pub fn backed_chunks(&self) -> impl Iterator<Item = Chunk<'_>> {
        let backed = self.chunks.iter().enumerate().filter(|(_, chunk)| chunk.get().is_some());
        backed.map(|(chunk, _)| {
            let (first, offset) = (chunk * CHUNK_SLOTS, chunk_offset(chunk));
            // The last chunk may be longer than the device.
            let count = CHUNK_SLOTS.min(self.slots as usize - first);
            Chunk {
                first: Slot(u32::try_from(first).expect("no larger than the number of slots")),
                entries: self.mapping.words(offset, count),
                ages: self.mapping.half_words(offset + ENTRIES_BYTES, count),
            }
        })
    }

    /// Bytes of memory behind the table, tags included.
    #[must_use]
    pub fn metadata_bytes(&self) -> u64 {
        let backed = self.chunks.iter().filter(|chunk| chunk.get().is_some()).count() as u64;
        HEADER_BYTES + backed * (CHUNK_BYTES + CHUNK_SLOTS as u64 * 4)
    }
}

/// What the header says but for the name.
#[derive(Clone, Copy)]
struct Header {
    vm: VmId,
    slots: u32,
    key: [u8; KEY_BYTES],
}

impl Header {
    fn encode(&self, name: &str, header: &mut [u8]) -> Result<(), TableError> {
        header[..8].copy_from_slice(MAGIC);
        header[8..12].copy_from_slice(&STATE_VERSION.to_le_bytes());
        header[12..16].copy_from_slice(&self.vm.0.to_le_bytes());
        header[16..20].copy_from_slice(&self.slots.to_le_bytes());
        let length = u32::try_from(name.len()).map_err(|_| TableError::Header)?;
        header[20..24].copy_from_slice(&length.to_le_bytes());
        let room = &mut header[24..24 + NAME_BYTES_MAX];
        room.fill(0);
        let room = room.get_mut(..name.len()).ok_or(TableError::Header)?;
        room.copy_from_slice(name.as_bytes());
        let checksum = crc32c::crc32c(&header[..CHECKSUM_AT]);
        header[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        header[KEY_AT..KEY_CHECKSUM_AT].copy_from_slice(&self.key);
        let checksum = crc32c::crc32c(&self.key);
        header[KEY_CHECKSUM_AT..KEY_CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
        Ok(())
    }

    /// The header, and the version that wrote it. `None` when none that is read here did, for a VM of this name.
    fn parse(name: &str, header: &[u8]) -> Option<(Self, u32)> {
        let half_word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let named = &header[24..24 + NAME_BYTES_MAX];
        let key: [u8; KEY_BYTES] = std::array::from_fn(|i| header[KEY_AT + i]);
        let sound = &header[..8] == MAGIC
            && half_word(CHECKSUM_AT) == crc32c::crc32c(&header[..CHECKSUM_AT])
            && (STATE_VERSION_MIN..=STATE_VERSION).contains(&half_word(8))
            && half_word(KEY_CHECKSUM_AT) == crc32c::crc32c(&key)
            && usize::try_from(half_word(20)).ok().and_then(|length| named.get(..length))
                == Some(name.as_bytes());
        sound.then(|| (Self { vm: VmId(half_word(12)), slots: half_word(16), key }, half_word(8)))
    }
}

fn chunks(slots: u32) -> usize {
    (slots as usize).div_ceil(CHUNK_SLOTS)
}

fn file_bytes(slots: u32) -> u64 {
    HEADER_BYTES + chunks(slots) as u64 * CHUNK_BYTES
}

fn chunk_offset(chunk: usize) -> u64 {
    HEADER_BYTES + chunk as u64 * CHUNK_BYTES
}

/// The part of the table that is about some neighbouring slots.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'table> {
    /// The first of the slots.
    pub first: Slot,
    /// Their packed entries.
    pub entries: &'table [Word],
    /// When their pages were last used.
    pub ages: &'table [HalfWord],
}

/// One slot's part of the table.
#[derive(Clone, Copy, Debug)]
pub struct Record<'table> {
    /// The packed entry.
    pub entry: &'table Word,
    /// When the page was last used (see `lru`).
    pub age: &'table HalfWord,
    /// The generation, which changes with every published entry, and the pool that made the object (see `vm`).
    pub tag: &'table AtomicU32,
}

impl Record<'_> {
    /// Whether there is anything in the slot.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.entry.load(Ordering::Relaxed) != 0
    }
}

#[cfg(test)]
mod tests;
