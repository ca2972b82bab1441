//! The dictionaries of one VM, each in a file beside its page table. A dictionary's file is complete before an object is
//! made with it, and stays as long as the VM's pages do: whatever becomes the current one later, every page can be read.
//!
//! ```text
//! STATE_DIR/vms/NAME.dictionary-N   twice the same bytes, little-endian:
//!   0 magic "BALLDCT\0"  8 version u32  12 VM number u32  16 N u32  20 length u32
//!   24 the dictionary    at its end: crc32c of all before u32
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use super::codec::{DICTIONARY_BYTES_MAX, Dictionary, DictionaryNumber, Encoder};
use crate::crash_point;
use crate::ids::VmId;
use crate::private;

const MAGIC: &[u8; 8] = b"BALLDCT\0";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 24;
const CHECKSUM_BYTES: usize = 4;
const SUFFIX: &str = ".dictionary-";
/// What a file is called until it is complete.
const NEW: &str = ".new";

/// The most dictionaries that a VM has before its pages are dropped: each costs some 80 KiB as long.
pub const DICTIONARIES_MAX: usize = 15;

/// See the top of the file.
#[derive(Debug)]
pub struct Dictionaries {
    /// The page tables' directory.
    dir: PathBuf,
    vm: VmId,
    name: String,
    all: [OnceLock<Dictionary>; DICTIONARIES_MAX],
    /// What writes with the last one, for each level that was asked for.
    encoders: RwLock<Vec<Arc<Encoder>>>,
    /// Whether the VM's pages were dropped.
    removed: Mutex<bool>,
}

/// Why a VM has no other dictionary.
#[derive(Debug, thiserror::Error)]
pub enum AddDictionaryError {
    /// It has had as many as it may.
    #[error(
        "the VM has had {DICTIONARIES_MAX} dictionaries: it keeps the last one until its pages are dropped"
    )]
    TooMany,
    /// It was trained on pages that are gone.
    #[error("the VM's pages were dropped meanwhile")]
    Removed,
    /// It isn't one.
    #[error("the bytes are no dictionary, or memory is short")]
    Unusable,
    /// Its file can't be made.
    #[error("the dictionary's file can't be made")]
    Io(#[from] io::Error),
}

fn path(dir: &Path, name: &str, number: DictionaryNumber) -> PathBuf {
    dir.join(format!("{name}{SUFFIX}{number}"))
}

fn numbers() -> impl Iterator<Item = DictionaryNumber> {
    (1..).take(DICTIONARIES_MAX).filter_map(DictionaryNumber::new)
}

/// The VM whose dictionary a file of this name has.
#[must_use]
pub fn name_of(file: &str) -> Option<&str> {
    let (name, number) = file.strip_suffix(NEW).unwrap_or(file).rsplit_once(SUFFIX)?;
    number.parse::<u16>().ok().map(|_| name)
}

impl Dictionaries {
    /// Those of the VM that are in `dir`. What an earlier VM of the name has left is removed; a damaged one is left
    /// alone, as is one whose disk or memory is failing, and pages that were made with it can't be read.
    ///
    /// # Errors
    /// When a file can't be read for now, which says nothing about what is in it.
    pub fn open(dir: &Path, name: &str, vm: VmId) -> io::Result<Self> {
        let all = [const { OnceLock::new() }; DICTIONARIES_MAX];
        for number in numbers() {
            let path = path(dir, name, number);
            let bytes = match fs::read(&path) {
                Ok(bytes) => bytes,
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                Err(err) if private::is_unreadable(&err) => {
                    unusable(name, &path);
                    continue;
                }
                Err(err) => return Err(err),
            };
            match parse(&bytes) {
                Some(found) if (found.vm, found.number) == (vm, u32::from(number.get())) => {
                    if bytes != encode(vm, number, found.dictionary) {
                        tracing::error!(vm = name, path = %path.display(), "one copy of a dictionary is damaged; it is mended from the other");
                        // What can't be mended now, for want of room say, is sound in one copy all the same.
                        if let Err(err) = save(&path, &encode(vm, number, found.dictionary)) {
                            tracing::error!(vm = name, %err, "the dictionary can't be mended, and is read as it is");
                        }
                    }
                    match Dictionary::new(name, number, found.dictionary.to_vec()) {
                        Some(dictionary) => drop(all[number.index()].set(dictionary)),
                        None => unusable(name, &path),
                    }
                }
                // A number that this VM has not given out.
                Some(_) => {
                    let _ = crash_point::after(fs::remove_file(&path));
                }
                None => unusable(name, &path),
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            vm,
            name: name.to_owned(),
            all,
            encoders: RwLock::default(),
            removed: Mutex::default(),
        })
    }

    /// The dictionary of this number, if there is one and it is sound.
    #[must_use]
    pub fn get(&self, number: DictionaryNumber) -> Option<&Dictionary> {
        self.all.get(number.index())?.get()
    }

    /// The dictionary that pages are made with now: the last one.
    #[must_use]
    pub fn current(&self) -> Option<&Dictionary> {
        self.all.iter().rev().find_map(OnceLock::get)
    }

    /// What writes with the current dictionary at this level, if there is one.
    #[must_use]
    pub fn encoder(&self, level: i32) -> Option<Arc<Encoder>> {
        let dictionary = self.current()?;
        let fits =
            |encoder: &&Arc<Encoder>| (encoder.number(), encoder.level()) == (dictionary.number(), level);
        if let Some(encoder) = self.encoders.read().iter().find(fits) {
            return Some(Arc::clone(encoder));
        }
        let made = Arc::new(dictionary.encoder(level)?);
        let mut encoders = self.encoders.write();
        encoders.retain(|encoder| encoder.number() == dictionary.number() && encoder.level() != level);
        encoders.push(Arc::clone(&made));
        Some(made)
    }

    /// How many there are that can be used.
    #[must_use]
    pub fn count(&self) -> usize {
        self.all.iter().filter_map(OnceLock::get).count()
    }

    /// Whether there can be no other.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.all.last().is_some_and(|last| last.get().is_some())
    }

    /// Makes `bytes`, which come from training, the current dictionary. When this returns, it outlives the process. One
    /// caller at a time.
    ///
    /// # Errors
    /// When there are too many, or the state directory has no room; the current one then stays.
    pub fn add(&self, bytes: Vec<u8>) -> Result<DictionaryNumber, AddDictionaryError> {
        // A number is used once its file is there, whatever is in it.
        let unused = |number: &DictionaryNumber| !path(&self.dir, &self.name, *number).exists();
        let is_known = |number: &DictionaryNumber| self.all[number.index()].get().is_some();
        let last = numbers().filter(|number| is_known(number) || !unused(number)).last();
        let number = numbers().find(|number| Some(*number) > last).ok_or(AddDictionaryError::TooMany)?;
        let dictionary = Dictionary::new(&self.name, number, bytes).ok_or(AddDictionaryError::Unusable)?;
        if dictionary.bytes().len() > DICTIONARY_BYTES_MAX {
            return Err(AddDictionaryError::Unusable);
        }
        let removed = self.removed.lock();
        if *removed {
            return Err(AddDictionaryError::Removed);
        }
        save(&path(&self.dir, &self.name, number), &encode(self.vm, number, dictionary.bytes()))?;
        drop(removed);
        let _ = self.all[number.index()].set(dictionary);
        Ok(number)
    }

    /// Gives up what writes with the current dictionary, until somebody asks for it again. Whether there was anything.
    pub fn forget_encoders(&self) -> bool {
        !std::mem::take(&mut *self.encoders.write()).is_empty()
    }

    /// Removes the files, and lets there be no more. The VM's pages are gone.
    pub fn remove(&self) {
        // Whoever trained one meanwhile has it still.
        *self.removed.lock() = true;
        for number in numbers() {
            // What is left is removed when a VM of this name is made, or at the next start.
            let _ = fs::remove_file(path(&self.dir, &self.name, number));
        }
    }

    /// Bytes of memory that they take: files, copies in the process, and zstd's tables.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        let dictionaries = self.all.iter().filter_map(OnceLock::get);
        let bytes: usize = dictionaries.map(|one| 2 * encoded_bytes(one.bytes()) + one.memory_bytes()).sum();
        let encoders: usize = self.encoders.read().iter().map(|encoder| encoder.memory_bytes()).sum();
        (bytes + encoders) as u64
    }
}

fn unusable(vm: &str, path: &Path) {
    tracing::error!(
        vm,
        path = %path.display(),
        "a dictionary is damaged: pages that were made with it can't be read; keep the file, or put a sound copy in its place and \
         start again"
    );
}

fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(NEW);
    let saved =
        private::write(Path::new(&new), bytes).and_then(|()| crash_point::after(fs::rename(&new, path)));
    // Where there is no room it would take some for nothing.
    saved.inspect_err(|_| drop(fs::remove_file(&new)))
}

fn encoded_bytes(dictionary: &[u8]) -> usize {
    HEADER_BYTES + dictionary.len() + CHECKSUM_BYTES
}

fn encode(vm: VmId, number: DictionaryNumber, dictionary: &[u8]) -> Vec<u8> {
    let mut record = Vec::with_capacity(2 * encoded_bytes(dictionary));
    record.extend(MAGIC);
    let length = u32::try_from(dictionary.len()).unwrap_or(u32::MAX);
    for word in [VERSION, vm.0, number.get().into(), length] {
        record.extend(word.to_le_bytes());
    }
    record.extend(dictionary);
    record.extend(crc32c::crc32c(&record).to_le_bytes());
    record.extend_from_within(..);
    record
}

struct Parsed<'bytes> {
    vm: VmId,
    number: u32,
    dictionary: &'bytes [u8],
}

/// What the first sound copy says.
fn parse(bytes: &[u8]) -> Option<Parsed<'_>> {
    // Each by its own length, or by where it should be: the file may have been cut.
    let length = bytes.get(20..24).and_then(|word| Some(u32::from_le_bytes(word.try_into().ok()?) as usize));
    let end = length
        .map_or(bytes.len() / 2, |length| HEADER_BYTES.saturating_add(length).saturating_add(CHECKSUM_BYTES));
    let (first, second) = (bytes.get(..end), bytes.get(bytes.len() / 2..));
    [first, second].into_iter().flatten().find_map(|copy| {
        let (covered, checksum) = copy.split_last_chunk::<CHECKSUM_BYTES>()?;
        let (header, dictionary) = covered.split_at_checked(HEADER_BYTES)?;
        let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| header[at + i]));
        let sound = crc32c::crc32c(covered).to_le_bytes() == *checksum
            && header.starts_with(MAGIC)
            && word(8) == VERSION
            && word(20) as usize == dictionary.len();
        sound.then(|| Parsed { vm: VmId(word(12)), number: word(16), dictionary })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_SIZE;
    use crate::store::codec::{alike, train};

    fn trained() -> Vec<u8> {
        train(&alike(100)).unwrap()
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn dictionaries_outlive_the_process_and_the_last_one_is_current() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Dictionaries::open(dir.path(), "web1", VmId(5)).unwrap();
        let all = open();
        assert!(all.current().is_none() && all.encoder(3).is_none());
        assert_eq!(all.memory_bytes(), 0);
        let bytes = trained();
        let first = all.add(bytes.clone()).unwrap();
        let second = all.add(train(&alike(200)[100 * PAGE_SIZE..]).unwrap()).unwrap();
        assert_eq!((first.get(), second.get()), (1, 2));
        let (slow, fast) = (all.encoder(9).unwrap(), all.encoder(1).unwrap());
        assert!(Arc::ptr_eq(&slow, &all.encoder(9).unwrap()) && fast.level() == 1 && slow.number() == second);
        assert!(all.memory_bytes() > 60_000);
        drop(all);
        let all = open();
        assert_eq!(all.current().unwrap().number(), second);
        assert_eq!(all.get(first).unwrap().bytes()[8..], bytes[8..]);
        assert_eq!(name_of(&files(dir.path())[0]), Some("web1"));
        all.remove();
        assert!(files(dir.path()).is_empty());
        // Training takes its time, and what comes of it was in pages that somebody wanted to be gone.
        assert!(matches!(all.add(bytes), Err(AddDictionaryError::Removed)));
        assert!(files(dir.path()).is_empty());
    }

    #[test]
    fn a_damaged_copy_is_mended_and_two_cost_the_dictionary_but_not_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let open = || Dictionaries::open(dir.path(), "web1", VmId(5)).unwrap();
        let first = open().add(trained()).unwrap();
        let path = path(dir.path(), "web1", first);
        let good = fs::read(&path).unwrap();
        for at in [0, 13, 20, 100, good.len() / 2 - 1, good.len() / 2 + 3, good.len() - 1] {
            let mut damaged = good.clone();
            damaged[at] ^= 4;
            fs::write(&path, &damaged).unwrap();
            assert!(open().get(first).is_some(), "byte {at}");
            assert!(fs::read(&path).unwrap() == good, "byte {at}");
        }
        for length in [good.len() / 2, good.len() - 1] {
            fs::write(&path, &good[..length]).unwrap();
            assert!(open().get(first).is_some() && fs::read(&path).unwrap() == good, "cut to {length}");
        }
        let mut damaged = good.clone();
        damaged[50] ^= 1;
        damaged[good.len() / 2 + 51] ^= 1;
        fs::write(&path, &damaged).unwrap();
        let all = open();
        assert!(all.get(first).is_none() && all.current().is_none());
        assert!(fs::read(&path).unwrap() == damaged, "whoever can mend it finds it");
        assert_eq!(all.add(trained()).unwrap().get(), 2);
        // A file that somebody removes frees no number while its daemon runs.
        fs::remove_file(super::path(dir.path(), "web1", DictionaryNumber::new(2).unwrap())).unwrap();
        assert_eq!(all.add(trained()).unwrap().get(), 3);
    }

    #[test]
    fn those_of_an_earlier_vm_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        Dictionaries::open(dir.path(), "web1", VmId(5)).unwrap().add(trained()).unwrap();
        let all = Dictionaries::open(dir.path(), "web1", VmId(6)).unwrap();
        assert!(all.current().is_none() && files(dir.path()).is_empty());
    }

    #[test]
    fn there_is_an_end_to_dictionaries() {
        let dir = tempfile::tempdir().unwrap();
        let all = Dictionaries::open(dir.path(), "web1", VmId(5)).unwrap();
        let bytes = trained();
        assert!(matches!(all.add(vec![7; 900]), Err(AddDictionaryError::Unusable)));
        for number in numbers() {
            assert!(!all.is_full(), "{number}");
            assert_eq!(all.add(bytes.clone()).unwrap(), number);
        }
        assert!(all.is_full());
        assert!(matches!(all.add(bytes), Err(AddDictionaryError::TooMany)));
        assert_eq!(all.current().unwrap().number().get(), 15);
    }
}
