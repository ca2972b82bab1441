//! The trace of the controller's ticks in the state directory: what `ballast replay` reads. Two files of bounded size, the
//! older of which is dropped when the newer is full. It is there to understand what happened, so that no failure of it
//! stops anything.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::balloon::Vmm;
use crate::balloon::trace::{self, Step, Tick};
use crate::private;

/// The trace's name in the state directory.
const NAME: &str = "balloon.trace";
/// That of the one before.
const NAME_BEFORE: &str = "balloon.trace.1";
/// The most that a file takes, in bytes: some three thousand decisions. Both are eight hours of one VM, or five minutes of a
/// hundred. In host memory, as all of the state.
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

    /// What this VM's guest had at the last tick that was noted, or was told to have, if that is more; `None` if nobody
    /// knows.
    pub(super) fn last_had_bytes(&self, vm: &str) -> Option<u64> {
        let last = |path: &PathBuf| {
            let text = fs::read(path).ok()?;
            let mut lines = text.rsplit(|byte| *byte == b'\n');
            lines.find_map(|line| trace::read(line).next()?.ok())
        };
        let tick = [&self.path, &self.before].into_iter().find_map(last)?;
        had_bytes(tick.vms.iter().find(|step| step.snapshot.vm == vm)?)
    }

    fn append(&mut self, tick: &Tick) -> io::Result<()> {
        let mut line = Vec::new();
        tick.write(&mut line)?;
        let line_bytes = u64::try_from(line.len()).unwrap_or(u64::MAX);
        if line_bytes > BYTES_MAX {
            let why = format!("one tick of {} VMs is more than the trace holds", tick.vms.len());
            return Err(io::Error::other(why));
        }
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.open()?,
        };
        let mut end = file.seek(SeekFrom::End(0))?;
        if end.saturating_add(line_bytes) > BYTES_MAX {
            file = self.begin_another()?;
            end = 0;
        }
        // A part of a line would make what comes after it unreadable.
        file.write_all(&line).inspect_err(|_| drop(file.set_len(end)))?;
        self.file = Some(file);
        Ok(())
    }

    /// The file of the daemon before, if it ends with a whole tick that this version reads; else another one.
    fn open(&self) -> io::Result<File> {
        let mut file = private::open_or_create(&self.path)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        let lines = text.strip_suffix(b"\n");
        let last = lines.and_then(|lines| lines.rsplit(|byte| *byte == b'\n').next());
        let whole = last.is_some_and(|last| trace::read(last).all(|tick| tick.is_ok()));
        if text.is_empty() || whole { Ok(file) } else { self.begin_another() }
    }

    fn begin_another(&self) -> io::Result<File> {
        fs::rename(&self.path, &self.before)?;
        private::open_or_create(&self.path)
    }
}

fn had_bytes(step: &Step) -> Option<u64> {
    let seen_bytes = match &step.snapshot.vmm {
        Vmm::Answers(memory) => Some(memory.actual_bytes),
        Vmm::Silent(_) => step.state.look.map(|look| look.actual_bytes),
        Vmm::Gone(_) => return None,
    };
    let told_bytes =
        if step.decision.apply { Some(step.decision.target_bytes) } else { step.state.target_bytes };
    seen_bytes.max(told_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::vmm::GuestMemory;
    use crate::balloon::{Host, Silence, Snapshot, State, Word};
    use std::fs::OpenOptions;

    fn tick(now_ms: u64) -> Tick {
        Tick::decide(Host { now_ms, ..Host::default() }, Vec::new(), &mut [])
    }

    fn times(path: &Path) -> Vec<u64> {
        let ticks = trace::read(io::BufReader::new(File::open(path).unwrap()));
        ticks.map(|tick| tick.unwrap().host.now_ms).collect()
    }

    /// A tick at which so many VMMs are gone, each with these words.
    fn long_tick(vms: usize, words: usize) -> Tick {
        let snapshot = Snapshot::of_nothing(Vmm::Gone("w".repeat(words)));
        Tick::decide(Host::default(), vec![snapshot; vms], &mut vec![State::default(); vms])
    }

    #[test]
    fn however_many_vms_there_are_the_trace_takes_no_more_than_two_files() {
        let dir = tempfile::tempdir().unwrap();
        let mut recorder = Recorder::new(dir.path());
        let bytes = |name| fs::metadata(dir.path().join(name)).map_or(0, |file| file.len());
        for _ in 0..20 {
            recorder.note(&long_tick(1000, 100));
            assert!(bytes(NAME) <= BYTES_MAX && bytes(NAME_BEFORE) <= BYTES_MAX);
        }
        assert!(bytes(NAME_BEFORE) > BYTES_MAX / 2, "{}", bytes(NAME_BEFORE));
        let before = bytes(NAME);
        recorder.note(&long_tick(1000, 5000));
        assert!(recorder.failed && bytes(NAME) == before, "a tick that is too long is left out, and told");
        recorder.note(&tick(7));
        assert!(!recorder.failed && times(&dir.path().join(NAME)).last() == Some(&7));
    }

    #[test]
    fn whatever_a_daemon_left_what_the_next_one_writes_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let (path, before) = (dir.path().join(NAME), dir.path().join(NAME_BEFORE));
        let note = |now_ms| Recorder::new(dir.path()).note(&tick(now_ms));
        note(1);
        note(2);
        assert_eq!(times(&path), [1, 2]);
        // Killed in the middle of a line.
        let length = fs::metadata(&path).unwrap().len();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(length - 5).unwrap();
        note(3);
        assert_eq!(times(&path), [3]);
        assert!(fs::read_to_string(&before).unwrap().starts_with(&fs::read_to_string(&path).unwrap()[..10]));
        // Of another version.
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains("\"version\":"), "{text}");
        fs::write(&path, text.replace("\"version\":", "\"version\":9")).unwrap();
        note(4);
        assert_eq!(times(&path), [4]);
    }
    #[test]
    fn what_a_guest_had_last_is_known_to_the_daemon_after() {
        let dir = tempfile::tempdir().unwrap();
        let had = || Recorder::new(dir.path()).last_had_bytes("web1");
        let mut states = [State::default()];
        let mut note = |vmm| {
            let snapshots = vec![Snapshot::of_nothing(vmm)];
            Recorder::new(dir.path()).note(&Tick::decide(Host::default(), snapshots, &mut states));
        };
        assert_eq!(had(), None);
        note(Vmm::Answers(GuestMemory { configured_bytes: 8 << 20, actual_bytes: 5 << 20, guest: None }));
        assert_eq!(had(), Some(5 << 20));
        note(Vmm::Silent(Silence { word: Word::Quarantined, text: "quarantined".to_owned() }));
        assert_eq!(had(), Some(5 << 20), "nobody has seen another");
        // The next was cut short, and the one after began another file.
        let mut text = fs::read(dir.path().join(NAME)).unwrap();
        text.extend_from_slice(&text.clone()[..40]);
        fs::write(dir.path().join(NAME), text).unwrap();
        assert_eq!(had(), Some(5 << 20));
        fs::rename(dir.path().join(NAME), dir.path().join(NAME_BEFORE)).unwrap();
        assert_eq!(had(), Some(5 << 20));
        note(Vmm::Gone("gone".to_owned()));
        assert_eq!(had(), None, "its memory went with it");
    }
}
