//! Opening: bringing the state and the file together. Each names the other by the file's id, and where they don't
//! agree nothing is written: a file that is not ours may be somebody's, and a state whose file is missing has pages
//! in it that a wrong file would turn into errors. Whether the daemon then does without a file is not decided here.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::Writeback;
use super::file::Target;
use super::file::header::{FileId, Found};
use super::io::BackingFile;
use super::place::{FILE_BYTES_MAX, SEGMENT_BYTES_U64};
use super::segments::Segments;
use super::state::{Known, State, StateError};

/// How long a new daemon waits for a killed one's last writes.
pub const LOCK_WAIT: Duration = Duration::from_secs(30);

/// What to open.
#[derive(Clone, Debug)]
pub struct Options {
    /// The file or block device.
    pub path: PathBuf,
    /// The most bytes of it to use. A device may have fewer.
    pub size_bytes: u64,
    /// The file in the state directory that says what outlives the daemon.
    pub state_path: PathBuf,
    /// The most bytes to write on one day, to spare flash.
    pub daily_bytes_max: Option<u64>,
    /// How long to wait for the file's lock; usually [`LOCK_WAIT`].
    pub lock_wait: Duration,
}

/// Why there is no writeback.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it, it is mounted, or a killed one's writes take too long.
    #[error("the writeback file {} is mounted or in use by another process: stop it, or configure another path", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The same, and the state knows a file.
    #[error(
        "pages of this state are in the writeback file {expected}, and another process still uses {}: wait for its end, or stop \
         it, and start again", path.display()
    )]
    Busy {
        /// The file.
        path: PathBuf,
        /// The file that the state knows.
        expected: FileId,
    },
    /// The state knows another file.
    #[error(
        "pages of this state are in the writeback file {expected}, and {} is {found}: give the right file back, or \
         clear the VMs", path.display()
    )]
    WrongFile {
        /// The configured file.
        path: PathBuf,
        /// What it holds.
        found: Found,
        /// The file that the state knows.
        expected: FileId,
    },
    /// The state knows a file, and none is configured.
    #[error(
        "pages of this state are in the writeback file {expected}, and none is configured: configure it again, or clear \
         the VMs"
    )]
    NotConfigured {
        /// The file that the state knows.
        expected: FileId,
    },
    /// The state knows a file, and the configured one is not there or can't be read.
    #[error(
        "pages of this state are in the writeback file {expected}, and {} can't be {done}: give the file back, or clear \
         the VMs", path.display()
    )]
    Unreadable {
        /// What was tried.
        done: &'static str,
        /// The configured file.
        path: PathBuf,
        /// The file that the state knows.
        expected: FileId,
        /// What the system said.
        source: io::Error,
    },
    /// The state knows no file, and this one has contents.
    #[error(
        "{} holds {found}, which would be overwritten: configure another path, or empty it if it is not needed",
        path.display()
    )]
    NotOurs {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: Found,
    },
    /// There is no room for a segment.
    #[error("the writeback file {} needs at least 2MiB, and has {bytes} bytes: give it a larger size", path.display())]
    TooSmall {
        /// The file.
        path: PathBuf,
        /// Bytes that it may have.
        bytes: u64,
    },
    /// The state can't be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The threads that read and write can't be started.
    #[error("the writeback file's threads can't be started: allow the daemon more (TasksMax in a unit)")]
    Threads(#[source] io::Error),
    /// The file can't be used, and the state knows no other.
    #[error(
        "the writeback file {} can't be {done}: it must be a file or a block device that the daemon's user may read and write",
        path.display()
    )]
    Io {
        /// What was tried.
        done: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl OpenError {
    /// Whether this is for somebody to mend before a daemon starts: a mistake in the configuration, or something that
    /// is the matter with this process. Else it is the file's failure, and a daemon without a file serves more than
    /// none.
    #[must_use]
    pub fn refuses_start(&self) -> bool {
        use io::ErrorKind::{
            InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem,
        };
        let kind = |kinds: &[io::ErrorKind], source: &io::Error| kinds.contains(&source.kind());
        match self {
            // Its disk may hang, and with it a killed daemon that wrote there.
            Self::Busy { .. } | Self::WrongFile { .. } | Self::NotConfigured { .. } => false,
            Self::Unreadable { source, .. } => kind(&[IsADirectory], source),
            Self::Io { source, .. } => kind(
                &[InvalidInput, IsADirectory, NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem],
                source,
            ),
            Self::InUse { .. }
            | Self::NotOurs { .. }
            | Self::TooSmall { .. }
            | Self::State(_)
            | Self::Threads(_) => true,
        }
    }

    /// Whether the state knows a file that is not to be had. It may be forgotten when no page is in it.
    #[must_use]
    pub fn is_about_known_file(&self) -> bool {
        matches!(self, Self::WrongFile { .. } | Self::NotConfigured { .. } | Self::Unreadable { .. })
    }

    /// The file was not `done`.
    fn io<'a>(
        done: &'static str,
        path: &'a Path,
        known: Option<Known>,
    ) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| match known {
            Some(Known { id, .. }) => Self::Unreadable { done, path: path.to_owned(), expected: id, source },
            None => Self::Io { done, path: path.to_owned(), source },
        }
    }
}

/// The file that the state at `state_path` knows.
///
/// # Errors
/// When the state can't be read.
pub fn known_file(state_path: &Path) -> Result<Option<FileId>, StateError> {
    Ok(State::open(state_path)?.known().map(|known| known.id))
}

/// Makes the state know no writeback file, so that the next [`Writeback::open`] begins anew with whatever is
/// configured then. Only for a state of whose entries none names a place. Write counters go on. True when there was
/// a file to forget.
///
/// # Errors
/// When the state can't be read or written.
pub fn forget_file(state_path: &Path) -> Result<bool, StateError> {
    let mut state = State::open(state_path)?;
    let known = state.known().is_some();
    if known {
        state.set_known(None)?;
    }
    Ok(known)
}

impl Writeback {
    /// Opens the file, waiting for its lock, and starts its I/O. [`Writeback::adopt`] every place that an entry names,
    /// then [`Writeback::finish_adoption`]; until then nothing can be written.
    ///
    /// # Errors
    /// When state and file don't belong together, somebody else has the file, or the system refuses.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        Self::open_with(options, super::io::start)
    }

    /// The same with an I/O of the caller's choice: how tests put a faulty file underneath.
    ///
    /// # Errors
    /// As for [`Writeback::open`].
    pub fn open_with(
        options: &Options,
        start: impl FnOnce(Target) -> io::Result<Arc<dyn BackingFile>>,
    ) -> Result<Self, OpenError> {
        let path = &options.path;
        let mut state = State::open(&options.state_path)?;
        let known = state.known();
        // Where the file that the state knows should be none is made.
        let target = Target::open(path, known.is_none(), options.lock_wait)
            .map_err(OpenError::io("opened", path, known))?;
        let target = target.ok_or_else(|| match known {
            Some(Known { id, .. }) => OpenError::Busy { path: path.clone(), expected: id },
            None => OpenError::InUse { path: path.clone() },
        })?;
        let segments = segments_for(&target, options, known)?;
        let (found, is_whole) = target.look().map_err(OpenError::io("read", path, known))?;
        let known = match (known, found) {
            (Some(known), Found::Header(id)) if id == known.id => {
                let wanted = Known { segments: segments.max(known.segments), ..known };
                extend(&target, &mut state, wanted, is_whole, path)?
            }
            (Some(Known { id, .. }), found) => {
                return Err(OpenError::WrongFile { path: path.clone(), found, expected: id });
            }
            (None, Found::Damaged | Found::Data) => {
                return Err(OpenError::NotOurs { path: path.clone(), found });
            }
            (None, found) => begin(&target, &mut state, found, segments, path)?,
        };
        // Blocks of a device that was just taken over are somebody's old ones, to be discarded.
        let clean = found != Found::Header(known.id) && !target.device();
        let table = Segments::new(known.segments, segments);
        let direct = target.direct();
        let file = start(target).map_err(OpenError::Threads)?;
        Ok(Self::new(file, direct, clean, table, state, options.daily_bytes_max))
    }
}

fn segments_for(target: &Target, options: &Options, known: Option<Known>) -> Result<u32, OpenError> {
    let path = &options.path;
    let bytes = target.bytes_max(options.size_bytes).map_err(OpenError::io("measured", path, known))?;
    let segments = bytes.min(FILE_BYTES_MAX) / SEGMENT_BYTES_U64;
    // The first segment is the header's.
    u32::try_from(segments)
        .ok()
        .filter(|segments| *segments >= 2)
        .ok_or_else(|| OpenError::TooSmall { path: path.clone(), bytes })
}

/// Goes on with the file that the state knows. It may have been configured larger; a smaller one keeps what lives
/// beyond, and the state keeps knowing so. A header that `is_whole` stands there twice; another is mended.
fn extend(
    target: &Target,
    state: &mut State,
    wanted: Known,
    is_whole: bool,
    path: &Path,
) -> Result<Known, OpenError> {
    let known = Some(wanted);
    target.lengthen(bytes_of(wanted), false).map_err(OpenError::io("extended", path, known))?;
    if !is_whole {
        tracing::warn!(path = %path.display(), "the writeback file's header stood there once: it is written twice");
    }
    if state.known() != known || !is_whole {
        target.write_header(wanted.id, wanted.segments).map_err(OpenError::io("written", path, known))?;
        state.set_known(Some(wanted))?;
    }
    Ok(wanted)
}

/// Makes the file ours. The header comes first: a state never names a file that doesn't exist.
fn begin(
    target: &Target,
    state: &mut State,
    found: Found,
    segments: u32,
    path: &Path,
) -> Result<Known, OpenError> {
    if found != Found::Nothing {
        let path = path.display();
        tracing::warn!(%path, "{found} is taken over: nobody has it open, and this state knows no pages in it");
    }
    let id = FileId::random().map_err(OpenError::io("given an id", path, None))?;
    let known = Known { id, segments };
    target.lengthen(bytes_of(known), true).map_err(OpenError::io("extended", path, None))?;
    target.write_header(id, segments).map_err(OpenError::io("written", path, None))?;
    state.set_known(Some(known))?;
    Ok(known)
}

fn bytes_of(known: Known) -> u64 {
    u64::from(known.segments) * SEGMENT_BYTES_U64
}
