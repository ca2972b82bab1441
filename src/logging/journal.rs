//! The log as entries of systemd's journal: `journalctl -u ballast VM=web1` finds what concerns a VM. The protocol is
//! public (systemd's "Native Journal Protocol"): one datagram an entry, a line for each field. Sent by `write` on a
//! connected socket, the only call for this that a worker may make; a library that names the receiver each time would
//! have workers be allowed to write to anybody. Nobody ever waits for the journal: what finds it full is counted, and told
//! when there is room again.

use std::fmt::{Debug, Write as _};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Where journald listens.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";
/// Most bytes of a field: an entry fits a datagram.
const VALUE_BYTES_MAX: usize = 16 * 1024;

/// A connection to the journal.
#[derive(Debug)]
pub(super) struct Journal {
    socket: UnixDatagram,
    path: PathBuf,
    dropped: AtomicU64,
}

impl Journal {
    /// Connects to journald.
    ///
    /// # Errors
    /// When nobody listens there.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.to_owned(), dropped: AtomicU64::new(0) })
    }

    /// Sends an entry; what nobody can be sent is written to `instead` as a line.
    fn send(&self, entry: &Entry, instead: &mut dyn io::Write) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            let mut lost = Entry::new(Level::WARN, module_path!());
            lost.put("MESSAGE", "the journal was full: lines of the log are missing");
            lost.put("DROPPED", &dropped.to_string());
            if self.write(&lost.bytes).is_err() {
                self.dropped.fetch_add(dropped, Ordering::Relaxed);
            }
        }
        match self.write(&entry.bytes) {
            Ok(()) => {}
            Err(Errno::AGAIN) => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            // It is another one by now, or there is none: stderr may lead somewhere, and when it doesn't there is nothing
            // left to do. A worker may not connect; some other thread will.
            Err(_) => {
                let again = self.socket.connect(&self.path).is_ok() && self.write(&entry.bytes).is_ok();
                if !again {
                    let _ = instead.write_all(entry.line().as_bytes());
                }
            }
        }
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Errno> {
        rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, bytes)).map(|_| ())
    }
}

impl<S: Subscriber> Layer<S> for Journal {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let metadata = event.metadata();
        let mut entry = Entry::new(*metadata.level(), metadata.target());
        event.record(&mut entry);
        self.send(&entry, &mut io::stderr());
    }
}

/// One entry, as it is sent.
struct Entry {
    bytes: Vec<u8>,
}

impl Entry {
    fn new(level: Level, target: &str) -> Self {
        let mut entry = Self { bytes: Vec::with_capacity(256) };
        entry.put("PRIORITY", priority(level));
        entry.put("SYSLOG_IDENTIFIER", "ballast");
        entry.put("TARGET", target);
        entry
    }

    /// Adds a field. Its value goes with its length, so that no guest's or VMM's newline begins a field of its own.
    fn put(&mut self, name: &str, value: &str) {
        let mut end = value.len().min(VALUE_BYTES_MAX);
        while !value.is_char_boundary(end) {
            end -= 1;
        }
        self.bytes.extend(name.bytes().map(|byte| byte.to_ascii_uppercase()));
        self.bytes.push(b'\n');
        self.bytes.extend((end as u64).to_le_bytes());
        self.bytes.extend(&value.as_bytes()[..end]);
        self.bytes.push(b'\n');
    }

    /// Its fields, by the protocol.
    fn fields(&self) -> impl Iterator<Item = (String, String)> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut rest = self.bytes.as_slice();
        std::iter::from_fn(move || {
            let name_end = rest.iter().position(|byte| *byte == b'\n')?;
            let (name, behind) = rest.split_at_checked(name_end)?;
            let (length, behind) = behind.get(1..)?.split_first_chunk::<8>()?;
            let (value, behind) =
                behind.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
            rest = behind.get(1..)?;
            Some((text(name), text(value)))
        })
    }

    /// The same for a person, as one line.
    fn line(&self) -> String {
        let (mut message, mut others) = (String::new(), String::new());
        for (name, value) in self.fields() {
            let value = value.replace('\n', "\\n");
            match name.as_str() {
                "MESSAGE" => message = value,
                "SYSLOG_IDENTIFIER" | "TARGET" => {}
                "PRIORITY" => others.insert_str(0, &format!(" priority={value}")),
                _ => others.push_str(&format!(" {}={value}", name.to_ascii_lowercase())),
            }
        }
        format!("ballast: {message}{others}\n")
    }
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.put(field.name(), &text);
    }
}

/// As syslog numbers them.
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "3",
        Level::WARN => "4",
        Level::INFO => "6",
        _ => "7",
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    /// The next entry's fields, by the protocol.
    fn fields(journald: &UnixDatagram) -> BTreeMap<String, String> {
        let mut buffer = vec![0; 1 << 18];
        let length = journald.recv(&mut buffer).unwrap();
        let (mut rest, mut fields) = (&buffer[..length], BTreeMap::new());
        while !rest.is_empty() {
            let name_end = rest.iter().position(|byte| *byte == b'\n').unwrap();
            let name = String::from_utf8(rest[..name_end].to_vec()).unwrap();
            let (length, value) = rest[name_end + 1..].split_first_chunk::<8>().unwrap();
            let length = usize::try_from(u64::from_le_bytes(*length)).unwrap();
            fields.insert(name, String::from_utf8(value[..length].to_vec()).unwrap());
            assert_eq!(value[length], b'\n');
            rest = &value[length + 1..];
        }
        fields
    }

    fn journald() -> (tempfile::TempDir, UnixDatagram, Journal) {
        let dir = tempfile::tempdir().unwrap();
        let journald = UnixDatagram::bind(dir.path().join("socket")).unwrap();
        let journal = Journal::connect(&dir.path().join("socket")).unwrap();
        (dir, journald, journal)
    }

    #[test]
    fn an_entry_has_the_vm_as_a_field_and_nobody_can_forge_another() {
        let (_dir, journald, journal) = journald();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            tracing::warn!(vm = "web1", pages = 7, "a line\nVM=web2");
        });
        let found = fields(&journald);
        assert_eq!(found["VM"], "web1");
        assert_eq!((found["PAGES"].as_str(), found["PRIORITY"].as_str()), ("7", "4"));
        assert_eq!(found["MESSAGE"], "a line\nVM=web2");
        assert_eq!(found["SYSLOG_IDENTIFIER"], "ballast");
    }

    #[test]
    fn a_long_value_is_cut_between_two_characters() {
        let (_dir, journald, journal) = journald();
        let long = "ä".repeat(VALUE_BYTES_MAX);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), || {
            tracing::info!(vm = "a", what = long.as_str(), "long");
        });
        assert_eq!(fields(&journald)["WHAT"].len(), VALUE_BYTES_MAX);
    }

    #[test]
    fn a_journal_that_reads_nothing_holds_nobody_up_and_is_told_how_much_it_missed() {
        let (_dir, journald, journal) = journald();
        let entry = Entry::new(Level::INFO, "test");
        // Until it is full, which takes a bounded number of datagrams.
        while journal.dropped.load(Ordering::Relaxed) < 3 {
            journal.send(&entry, &mut io::sink());
        }
        journald.set_nonblocking(true).unwrap();
        while journald.recv(&mut [0; 4096]).is_ok() {}
        journal.send(&entry, &mut io::sink());
        assert_eq!(fields(&journald)["DROPPED"], "3");
        assert!(!fields(&journald).contains_key("DROPPED"));
    }

    #[test]
    fn without_a_journal_lines_go_elsewhere_and_with_the_next_one_there_again() {
        let (dir, journald, journal) = journald();
        let mut entry = Entry::new(Level::WARN, "test");
        entry.put("message", "a line\nPRIORITY=0");
        entry.put("vm", "web1");
        drop(journald);
        std::fs::remove_file(dir.path().join("socket")).unwrap();
        let mut instead = Vec::new();
        journal.send(&entry, &mut instead);
        let line = "ballast: a line\\nPRIORITY=0 priority=4 vm=web1\n";
        assert_eq!(String::from_utf8(instead).unwrap(), line);
        let next = UnixDatagram::bind(dir.path().join("socket")).unwrap();
        let mut instead = Vec::new();
        journal.send(&entry, &mut instead);
        assert_eq!((fields(&next)["VM"].as_str(), instead.len()), ("web1", 0));
    }
}
