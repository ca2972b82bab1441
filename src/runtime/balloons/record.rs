//! The trace of the controller's ticks in the state directory: what `ballast replay` reads. Two files of bounded size, the
//! older of which is dropped when the newer is full. It is there to understand what happened, so that no failure of it
//! stops anything.

use std::fs::{self, File};
use std::io::{self, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::balloon::trace::{self, Tick};
use crate::private;

/// The trace's name in the state directory.
const NAME: &str = "balloon.trace";
/// That of the one before.
const NAME_BEFORE: &str = "balloon.trace.1";
/// Where a file is full, in bytes: some six thousand decisions, which is eight hours of one VM. In host memory, as all of
/// the state.
const BYTES_MAX: u64 = 4 << 20;

/// The trace.
pub(super) struct Recorder {
    path: PathBuf,
    before: PathBuf,
    file: Option<File>,
    failed: bool,
}

impl Recorder {
    /// One in this state directory; there is no file before the first tick.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join(NAME), before: state_dir.join(NAME_BEFORE), file: None, failed: false }
    }

    /// What was noted last, maybe by a daemon before this one.
    pub(super) fn last(&self) -> Option<Tick> {
        let read = |path: &Path| trace::read(BufReader::new(File::open(path).ok()?)).filter_map(Result::ok).last();
        read(&self.path).or_else(|| read(&self.before))
    }

    /// Notes a tick. What can't be noted is told once.
    pub(super) fn note(&mut self, tick: &Tick) {
        let noted = self.append(tick);
        if let Err(err) = &noted
            && !self.failed
        {
            tracing::warn!(path = %self.path.display(), %err, "decisions about balloons can't be recorded");
        }
        self.failed = noted.is_err();
    }

    fn append(&mut self, tick: &Tick) -> io::Result<()> {
        let mut line = Vec::new();
        tick.write(&mut line)?;
        let mut file = match self.file.take() {
            Some(file) => file,
            None => private::open_or_create(&self.path)?,
        };
        if file.seek(SeekFrom::End(0))? >= BYTES_MAX {
            fs::rename(&self.path, &self.before)?;
            file = private::open_or_create(&self.path)?;
        }
        // In one piece: a daemon that is killed leaves whole lines, but for the last.
        file.write_all(&line)?;
        self.file = Some(file);
        Ok(())
    }
}
