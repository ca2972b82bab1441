//! The state directory: who may use it, which state it is, and which VM numbers were given out. Nothing here is on
//! the way of a page.
//!
//! ```text
//! STATE_DIR/lock             held exclusively by the daemon that runs on it
//! STATE_DIR/state            twice the same 64 bytes, little-endian, replaced whole by rename:
//!                              0 magic "BALLAST\0"   8 version u32    12 next VM number u32
//!                             16 random id [u8; 16]  32 bytes of arena per span length u64
//!                             40 zeros               60 crc32c of all before u32
//! STATE_DIR/arena            the arena (see `arena`)
//! STATE_DIR/vms/NAME.table   one page table per VM (see `table`), and beside it
//! STATE_DIR/vms/NAME.dictionary-N   its dictionaries (see `dictionaries`)
//! STATE_DIR/writeback        what the writeback file's own state is (see `crate::writeback`)
//! ```

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

use super::arena::SPAN_PAGES_MAX;
use super::dictionaries;
use super::entry::ARENA_BYTES_MAX;

use crate::crash_point;
use crate::ids::VmId;
use crate::private;

const MAGIC: &[u8; 8] = b"BALLAST\0";
/// The version of all state files. A state of another version is refused, never misread.
pub const STATE_VERSION: u32 = 5;
/// The oldest version that is read, and made the current one. Version 3 knew no dictionaries, version 4 no
/// objects that slots share; nothing else is different.
pub const STATE_VERSION_MIN: u32 = 3;
const RECORD_BYTES: usize = 64;
/// The same record stands there so often, so that no flipped bit costs the state.
const COPIES: usize = 2;

/// Even a small host's state must be usable with a larger pool after the next change of its configuration.
const REGION_BYTES_MIN: u64 = 16 << 30;

/// Names this state among all others: a VMM that was attached to another one must not go on with this.
pub type StateId = [u8; 16];

/// An open state directory, held exclusively until it is dropped.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    header: Header,
    /// Held for its lock.
    _lock: File,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    next_vm: u32,
    id: StateId,
    region_bytes: u64,
}

/// Why a state directory can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another daemon runs on it.
    #[error("the state directory {} is in use by another daemon: stop it, or configure another state_dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// It was written by another version.
    #[error(
        "{} holds a state of version {found}, and this build reads versions {STATE_VERSION_MIN} to {STATE_VERSION}: run the build that wrote it, \
         or power the VMs off and remove the directory", path.display()
    )]
    Version {
        /// The directory.
        path: PathBuf,
        /// The version found.
        found: u32,
    },
    /// The state file is not one.
    #[error(
        "{} is damaged or not a Ballast state: the pages in this directory can't be served; power the VMs off and \
         remove the directory, or configure another state_dir", path.display()
    )]
    Damaged {
        /// The state file.
        path: PathBuf,
    },
    /// The arena is not as long as this state made it.
    #[error(
        "{} has {found} bytes and must have {wanted}: it was cut short or removed, and the pages in it are gone; power \
         the VMs off and remove the directory", path.display()
    )]
    CutShort {
        /// The arena.
        path: PathBuf,
        /// Bytes that it has.
        found: u64,
        /// Bytes that it was made with.
        wanted: u64,
    },
    /// A file in it can't be created, read or mapped.
    #[error("can't {action} {}{}", path.display(), private::advice(source))]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// All VM numbers were given out.
    #[error("this state directory has given out all its VM numbers: power the VMs off and remove it")]
    OutOfVmIds,
    /// The writeback file can't be used.
    #[error(transparent)]
    Writeback(#[from] crate::writeback::OpenError),
}

impl StateError {
    /// Wraps an error of the system, saying what was done to which file.
    pub fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

impl StateDir {
    /// Opens the state in `path`, creating both when they are missing. `host_bytes` sizes the address space of a new
    /// state's arena: a pool can't become larger than the host.
    ///
    /// # Errors
    /// When another daemon holds it, it is of another version or damaged, or the file system refuses.
    pub fn open(path: &Path, host_bytes: u64) -> Result<Self, StateError> {
        let tables = path.join("vms");
        private::create_dir(&tables).map_err(StateError::io("create", &tables))?;
        let lock_path = path.join("lock");
        let lock = private::open_or_create(&lock_path).map_err(StateError::io("open", &lock_path))?;
        rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|err| match err {
            rustix::io::Errno::WOULDBLOCK => StateError::InUse { path: path.to_owned() },
            err => StateError::io("lock", &lock_path)(err.into()),
        })?;
        let mut dir = Self { path: path.to_owned(), header: Header::fresh(host_bytes)?, _lock: lock };
        let state_path = path.join("state");
        match fs::read(&state_path) {
            Ok(bytes) => dir.read(&bytes, &state_path)?,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                // Files without the state that names them belong to nobody that could still use them safely.
                if dir.arena_path().exists() {
                    return Err(StateError::Damaged { path: state_path });
                }
                dir.save()?;
            }
            Err(err) => return Err(StateError::io("read", &state_path)(err)),
        }
        Ok(dir)
    }

    /// Goes on with a state that is there, and mends it when not all of its copies are sound.
    fn read(&mut self, bytes: &[u8], path: &Path) -> Result<(), StateError> {
        self.header = Header::parse(bytes, path)?;
        if bytes == self.header.encode(STATE_VERSION) {
            return Ok(());
        }
        if (STATE_VERSION_MIN..STATE_VERSION).any(|version| bytes == self.header.encode(version)) {
            tracing::info!(
                version = STATE_VERSION,
                "the state is of an earlier version: from now on it is of this one"
            );
            return self.save();
        }
        // As long as a build wrote it that knew of no copy.
        if bytes.len() > RECORD_BYTES {
            tracing::error!(path = %path.display(), "one copy of the state is damaged; it is mended from the other");
        }
        self.save()
    }

    fn save(&self) -> Result<(), StateError> {
        let (path, new) = (self.path.join("state"), self.path.join("state.new"));
        private::write(&new, &self.header.encode(STATE_VERSION)).map_err(StateError::io("write", &new))?;
        crash_point::after(fs::rename(&new, &path)).map_err(StateError::io("replace", &path))
    }

    /// Gives out a VM number that no VM of this state has had.
    ///
    /// # Errors
    /// When the number can't be made durable first.
    pub fn next_vm_id(&mut self) -> Result<VmId, StateError> {
        let id = VmId(self.header.next_vm);
        self.header.next_vm = self.header.next_vm.checked_add(1).ok_or(StateError::OutOfVmIds)?;
        self.save()?;
        Ok(id)
    }

    /// The random id of this state.
    #[must_use]
    pub fn id(&self) -> StateId {
        self.header.id
    }

    /// The arena's address space per span length, in bytes.
    #[must_use]
    pub fn region_bytes(&self) -> u64 {
        self.header.region_bytes
    }

    /// The file that says which writeback file belongs to the state at `path`.
    #[must_use]
    pub fn writeback_path(path: &Path) -> PathBuf {
        path.join("writeback")
    }

    /// The same of this state.
    #[must_use]
    pub fn writeback_state_path(&self) -> PathBuf {
        Self::writeback_path(&self.path)
    }

    /// The arena file.
    #[must_use]
    pub fn arena_path(&self) -> PathBuf {
        self.path.join("arena")
    }

    /// Looks whether the arena is as long as it was made. A new one has no length yet; then there are no page tables that
    /// could name anything in it.
    ///
    /// # Errors
    /// When it was cut short or removed.
    pub fn check_arena(&self, arena: &File) -> Result<(), StateError> {
        let path = self.arena_path();
        let found = arena.metadata().map_err(StateError::io("measure", &path))?.len();
        let wanted = self.header.region_bytes.saturating_mul(SPAN_PAGES_MAX as u64);
        if found == wanted || self.vm_names()?.is_empty() {
            return Ok(());
        }
        Err(StateError::CutShort { path, found, wanted })
    }

    /// Where page tables and dictionaries are.
    #[must_use]
    pub fn tables_path(&self) -> PathBuf {
        self.path.join("vms")
    }

    /// Removes dictionaries of VMs that have no page table any more: whoever removed that was ended before he came to
    /// them.
    ///
    /// # Errors
    /// When the directory can't be read, or a file not removed.
    pub fn remove_stray_dictionaries(&self) -> Result<(), StateError> {
        let tables = self.tables_path();
        for file in fs::read_dir(&tables).map_err(StateError::io("read", &tables))? {
            let path = file.map_err(StateError::io("read", &tables))?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(dictionaries::name_of);
            if name.is_some_and(|name| !self.table_path(name).exists()) {
                crash_point::after(fs::remove_file(&path)).map_err(StateError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// The page table of the VM called `name`.
    #[must_use]
    pub fn table_path(&self, name: &str) -> PathBuf {
        self.path.join("vms").join(format!("{name}.table"))
    }

    /// The names of all VMs that have a page table, sorted.
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn vm_names(&self) -> Result<Vec<String>, StateError> {
        let tables = self.path.join("vms");
        let mut names = Vec::new();
        for file in fs::read_dir(&tables).map_err(StateError::io("read", &tables))? {
            let file = file.map_err(StateError::io("read", &tables))?.file_name();
            names.extend(file.to_str().and_then(|file| file.strip_suffix(".table")).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }
}

impl Header {
    fn fresh(host_bytes: u64) -> Result<Self, StateError> {
        let mut id = [0; 16];
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())
            .map_err(|err| StateError::io("read", Path::new("the kernel's random numbers"))(err.into()))?;
        let region_bytes = host_bytes
            .checked_next_power_of_two()
            .unwrap_or(u64::MAX)
            .clamp(REGION_BYTES_MIN, ARENA_BYTES_MAX / SPAN_PAGES_MAX as u64);
        Ok(Self { next_vm: 1, id, region_bytes })
    }

    fn encode(&self, version: u32) -> [u8; COPIES * RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.next_vm.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.id);
        bytes[32..40].copy_from_slice(&self.region_bytes.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&checksum.to_le_bytes());
        std::array::from_fn(|i| bytes[i % RECORD_BYTES])
    }

    /// What the first sound copy says.
    fn parse(bytes: &[u8], path: &Path) -> Result<Self, StateError> {
        let checksum = |record: &[u8; RECORD_BYTES]| crc32c::crc32c(&record[..60]).to_le_bytes();
        let is_sound =
            |record: &&[u8; RECORD_BYTES]| record.starts_with(MAGIC) && record[60..] == checksum(record);
        let mut copies = bytes.as_chunks::<RECORD_BYTES>().0.iter().take(COPIES);
        let bytes = copies.find(is_sound).ok_or_else(|| StateError::Damaged { path: path.to_owned() })?;
        let half_word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        if !(STATE_VERSION_MIN..=STATE_VERSION).contains(&half_word(8)) {
            let path = path.parent().unwrap_or(path).to_owned();
            return Err(StateError::Version { path, found: half_word(8) });
        }
        let region_bytes = u64::from_le_bytes(std::array::from_fn(|i| bytes[32 + i]));
        Ok(Self { next_vm: half_word(12), id: std::array::from_fn(|i| bytes[16 + i]), region_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_keeps_its_id_and_never_repeats_a_vm_number() {
        let dir = tempfile::tempdir().unwrap();
        let mut state = StateDir::open(dir.path(), 1 << 30).unwrap();
        let (id, region_bytes) = (state.id(), state.region_bytes());
        assert_eq!(state.next_vm_id().unwrap(), VmId(1));
        drop(state);
        let mut state = StateDir::open(dir.path(), 64 << 30).unwrap();
        assert_eq!((state.id(), state.region_bytes()), (id, region_bytes));
        assert_eq!(state.next_vm_id().unwrap(), VmId(2));
    }

    #[test]
    fn a_second_daemon_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let _held = StateDir::open(dir.path(), 1 << 30).unwrap();
        assert!(matches!(StateDir::open(dir.path(), 1 << 30), Err(StateError::InUse { .. })));
    }

    #[test]
    fn another_version_is_refused_and_damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        drop(StateDir::open(dir.path(), 1 << 30).unwrap());
        let path = dir.path().join("state");
        let good = fs::read(&path).unwrap();

        let mut newer = good[..RECORD_BYTES].to_vec();
        newer[8] = 6;
        let checksum = crc32c::crc32c(&newer[..60]);
        newer[60..].copy_from_slice(&checksum.to_le_bytes());
        fs::write(&path, newer).unwrap();
        assert!(matches!(StateDir::open(dir.path(), 1 << 30), Err(StateError::Version { found: 6, .. })));

        for damaged in [&good[..63], &[0; 64][..], &[0; 128][..]] {
            fs::write(&path, damaged).unwrap();
            assert!(matches!(StateDir::open(dir.path(), 1 << 30), Err(StateError::Damaged { .. })));
        }
    }

    #[test]
    fn earlier_versions_are_read_and_become_this_one() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path(), 1 << 30).unwrap();
        let (id, path) = (state.id(), dir.path().join("state"));
        drop(state);
        for version in STATE_VERSION_MIN..STATE_VERSION {
            let state = StateDir::open(dir.path(), 1 << 30).unwrap();
            fs::write(&path, state.header.encode(version)).unwrap();
            drop(state);
            let state = StateDir::open(dir.path(), 1 << 30).unwrap();
            assert_eq!(state.id(), id);
            assert_eq!(fs::read(&path).unwrap(), state.header.encode(STATE_VERSION));
        }
    }

    #[test]
    fn a_copy_that_is_damaged_or_missing_is_mended() {
        let dir = tempfile::tempdir().unwrap();
        drop(StateDir::open(dir.path(), 1 << 30).unwrap());
        let path = dir.path().join("state");
        let good = fs::read(&path).unwrap();
        let mut cut = good.clone();
        cut.pop();
        let mut second = good.clone();
        second[RECORD_BYTES..].fill(0);
        let mut first = good.clone();
        first[..RECORD_BYTES].fill(0);
        for damaged in [first, second, cut, good[..RECORD_BYTES].to_vec()] {
            fs::write(&path, damaged).unwrap();
            drop(StateDir::open(dir.path(), 1 << 30).unwrap());
            assert_eq!(fs::read(&path).unwrap(), good);
        }
    }
}
