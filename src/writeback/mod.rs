//! Writeback: the coldest objects, moved to a file or block device, still compressed, encrypted with a key per VM
//! that exists only in the state directory. The room knows no page tables: it hands out places, takes them back, and
//! at start is told which of them are named by entries.
//!
//! ```text
//!  0        1 MiB                      2 MiB
//! ┌────────┬──────────────────────────┬─────────
//! │ header │ batch │ batch │ …        │ segment     a batch: records back to back, each at 16 bytes,
//! └────────┴──────────────────────────┴─────────    padded to a block of 4 KiB
//! ```
//!
//! A record is written once. It lives from [`Writeback::append`] to [`Writeback::free`]; a segment in which nothing
//! lives and nobody reads is free, is given back to the file system, and is written anew. The file is not synced
//! for durability: pages live as long as the state directory, a tmpfs, and what ends that ends them too.
//!
//! Threads: one writes and cleans (the shrinker) and waits for the disk in doing so; any thread may free, pin and
//! read, and waits for nothing. Locks: the writer's is held across I/O and only the writing thread takes it; the
//! others (free lists, report, queue of the I/O thread) are held for a few instructions, never two at once except
//! under the writer's.

mod append;
mod clean;
pub mod file;
mod find;
mod give;
pub mod io;
mod open;
mod pin;
mod place;
mod plan;
mod read;
mod record;
mod segments;
mod state;
mod status;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

pub use append::{Outgoing, WriteError};
pub use find::RecordRef;
pub use open::{LOCK_WAIT, OpenError, Options, forget_file, known_file};
pub use pin::Pin;
pub use place::{
    FILE_BYTES_MAX, OBJECT_BYTES_MAX, OBJECT_BYTES_MIN, Place, RECORD_ALIGN, SEGMENT_BYTES, SegmentIndex,
    record_bytes,
};
pub use read::{ReadDone, ReadError};
pub use record::{BadRecord, Cipher, RecordBytes};
pub use segments::{AdoptError, SegmentCount};
pub use state::StateError;
pub use status::{Status, WritebackState};

use append::Writer;
use io::BackingFile;
use segments::Segments;
use state::State;
use status::{Counters, Report};

/// The writeback file. Shared by reference; every method takes `&self`.
#[derive(Debug)]
pub struct Writeback {
    file: Arc<dyn BackingFile>,
    direct: bool,
    /// True when the file was made at this start, so that nothing in it takes room.
    clean: bool,
    segments: Arc<Segments>,
    writer: Mutex<Writer>,
    /// `u64::MAX` for no limit.
    daily_bytes_max: AtomicU64,
    /// Why nothing is written any more. Set once.
    off: OnceLock<String>,
    report: Mutex<Report>,
    counters: Arc<Counters>,
}

impl Writeback {
    fn new(
        file: Arc<dyn BackingFile>,
        direct: bool,
        clean: bool,
        segments: Segments,
        state: State,
        daily_bytes_max: Option<u64>,
    ) -> Self {
        Self {
            file,
            direct,
            clean,
            segments: Arc::new(segments),
            report: Mutex::new(Report { wear: state.wear(), ..Report::default() }),
            writer: Mutex::new(Writer::new(state)),
            daily_bytes_max: AtomicU64::new(daily_bytes_max.unwrap_or(u64::MAX)),
            off: OnceLock::new(),
            counters: Arc::default(),
        }
    }

    /// At start: takes note of a record that an entry names.
    ///
    /// # Errors
    /// When the place is impossible, which means a damaged table or another file.
    pub fn adopt(&self, place: Place) -> Result<(), AdoptError> {
        self.segments.adopt(place)
    }

    /// At start, after the last [`Writeback::adopt`]: what no entry names is free from here on.
    pub fn finish_adoption(&self) {
        self.segments.finish_adoption(self.clean);
    }

    /// Keeps a record readable until the pin is dropped. The caller holds the lock of the entry that names it, so
    /// that its [`Writeback::free`] comes later. `None` when nothing lives there: a damaged entry.
    pub fn begin_read(&self, place: Place) -> Option<Pin> {
        self.segments.pin(place)
    }

    /// Gives up a record that no entry names any more. Cheap, from any thread.
    ///
    /// # Panics
    /// When it was not written, or is freed twice.
    pub fn free(&self, place: Place) {
        self.segments.free(place);
    }

    /// Changes the most bytes to be written on one day.
    pub fn set_daily_bytes_max(&self, daily_bytes_max: Option<u64>) {
        self.daily_bytes_max.store(daily_bytes_max.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn daily_bytes_max(&self) -> u64 {
        self.daily_bytes_max.load(Ordering::Relaxed)
    }

    /// Recounts from the places that all entries name and compares. Nothing may be written or freed meanwhile.
    ///
    /// # Panics
    /// When a segment's live bytes are not those of its records, or a free segment is not known as free.
    pub fn validate(&self, places: impl IntoIterator<Item = Place>) {
        self.segments.validate(places, true);
    }

    /// The same after entries were damaged: nobody knows where the records are that they named.
    ///
    /// # Panics
    /// As [`Writeback::validate`], but for records that live unnamed.
    pub fn validate_damaged(&self, places: impl IntoIterator<Item = Place>) {
        self.segments.validate(places, false);
    }
}
