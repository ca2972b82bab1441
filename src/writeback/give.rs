//! Giving back: segments in which nothing lives take no room in the file system, and a file that was configured smaller
//! becomes so once nothing lives beyond its size. For the writing thread, some at a time.

use rustix::io::Errno;

use super::Writeback;
use super::append::Writer;
use super::file::header;
use super::io::{Op, transfer_blocking};
use super::place::{SEGMENT_BYTES, SEGMENT_BYTES_U64};
use super::state::Known;
use super::status::bump;

/// Segments given back at a time, so that a start with many of them holds no batch up.
const SEGMENTS_MAX: usize = 64;

/// What the writing thread remembers of giving back.
#[derive(Debug, Default)]
pub(super) struct Giving {
    /// The file system or the device takes nothing back, ever.
    unsupported: bool,
    /// Somebody was told that it failed.
    told: bool,
    /// The file could not be shortened, which the next start may try again.
    stays_long: bool,
}

impl Writeback {
    /// Gives dead segments back, and shortens a file that is longer than configured and empty there. Whether there is
    /// more to give back at once. Blocks; for the writing thread.
    pub fn give_back(&self) -> bool {
        if !self.is_on() {
            return false;
        }
        let mut writer = self.writer.lock();
        let more = self.give_back_dead(&mut writer);
        self.shorten(&mut writer);
        more
    }

    /// Gives some dead segments back, neighbours together. Those that fail are tried again another time.
    pub(super) fn give_back_dead(&self, writer: &mut Writer) -> bool {
        if writer.giving.unsupported {
            return false;
        }
        let dead = self.segments.take_dead(SEGMENTS_MAX);
        let mut rest = &dead[..];
        while let Some(first) = rest.first() {
            let neighbours = rest.iter().zip(first.0..).take_while(|(segment, at)| segment.0 == *at).count();
            let bytes = (neighbours * SEGMENT_BYTES) as u64;
            if let Err(err) = self.file.discard(first.offset(), bytes) {
                bump(&self.counters.discard_errors, 1);
                writer.giving.unsupported = Errno::from_io_error(&err) == Some(Errno::OPNOTSUPP);
                if !std::mem::replace(&mut writer.giving.told, true) {
                    tracing::warn!(%err, "segments of the writeback file can't be given back; they are used again as they are");
                }
                break;
            }
            let (given, behind) = rest.split_at(neighbours);
            self.segments.put_back(given);
            rest = behind;
        }
        self.segments.put_back_dead(rest);
        // The next segment that is cleaned may find room in the file system.
        writer.no_space &= rest.len() == dead.len();
        rest.is_empty() && dead.len() == SEGMENTS_MAX
    }

    /// Ends the file where its size does, when nothing lives behind that. The state is the last to know: killed in
    /// between, the next start finds a file that is longer than it need be, and nothing in it that an entry names.
    fn shorten(&self, writer: &mut Writer) {
        let limit = self.segments.limit();
        let longer = |known: &Known| known.segments > limit;
        let Some(known) = writer.state.known().filter(longer) else { return };
        if writer.giving.stays_long || !self.segments.give_up_beyond() {
            return;
        }
        let header = header::encode(known.id, limit);
        let shortened = transfer_blocking(&self.file, Op::Write, 0, header).0;
        let shortened = shortened.and_then(|()| self.file.shorten(u64::from(limit) * SEGMENT_BYTES_U64));
        if let Err(err) = shortened {
            writer.giving.stays_long = true;
            tracing::warn!(%err, "the writeback file can't be shortened to the size that is configured");
        } else if let Err(err) = writer.state.set_known(Some(Known { segments: limit, ..known })) {
            writer.giving.stays_long = true;
            bump(&self.counters.state_errors, 1);
            tracing::warn!(%err, "the size of the writeback file can't be noted");
        }
    }
}
