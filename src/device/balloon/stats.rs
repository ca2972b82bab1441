//! What a guest says of its memory through the statistics queue: a tag of two bytes and a value of eight, as often as it
//! likes (virtio 1.2, 5.5.6.4). Pure. A guest may say anything, and is quoted, not checked.

const ENTRY_BYTES: usize = 10;
/// Entries that are looked at. Linux sends 16 at most.
const ENTRIES_MAX: usize = 64;
/// Bytes of a guest's buffer that are looked at.
pub const BYTES_MAX: usize = ENTRY_BYTES * ENTRIES_MAX;

const SWAP_IN: u16 = 0;
const SWAP_OUT: u16 = 1;
const MAJOR_FAULTS: u16 = 2;
const FREE: u16 = 4;
const TOTAL: u16 = 5;
const AVAILABLE: u16 = 6;
const OOM_KILLS: u16 = 10;

/// Numbers of a guest. Counters begin at its boot; it leaves out what it doesn't know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Memory that it could use without swapping, in bytes: free, and cache that can be dropped.
    pub available_bytes: Option<u64>,
    /// Memory that nobody uses, in bytes.
    pub free_bytes: Option<u64>,
    /// All that its kernel manages, in bytes: without the balloon.
    pub total_bytes: Option<u64>,
    /// Faults that waited for a disk, since boot.
    pub major_faults: Option<u64>,
    /// Bytes read from swap since boot.
    pub swap_in_bytes: Option<u64>,
    /// Bytes written to swap since boot.
    pub swap_out_bytes: Option<u64>,
    /// Processes killed for want of memory since boot; guests before Linux 6.12 don't say.
    pub oom_kills: Option<u64>,
}

impl Stats {
    /// Reads a buffer. Tags that mean nothing here are passed over, a cut entry at the end as well; of two entries with one
    /// tag the last counts.
    #[must_use]
    pub fn parse(buffer: &[u8]) -> Self {
        let mut stats = Self::default();
        let (entries, _cut) = buffer.as_chunks::<ENTRY_BYTES>();
        for [low, high, value @ ..] in entries.iter().take(ENTRIES_MAX) {
            let field = match u16::from_le_bytes([*low, *high]) {
                SWAP_IN => &mut stats.swap_in_bytes,
                SWAP_OUT => &mut stats.swap_out_bytes,
                MAJOR_FAULTS => &mut stats.major_faults,
                FREE => &mut stats.free_bytes,
                TOTAL => &mut stats.total_bytes,
                AVAILABLE => &mut stats.available_bytes,
                OOM_KILLS => &mut stats.oom_kills,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(*value));
        }
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn known_tags_are_read_and_unknown_ones_passed_over() {
        let known = [(0, 10), (1, 11), (2, 12), (4, 14), (5, 15), (6, 16), (10, 20)];
        let entries = [(3, 1), (7, 1), (8, 1), (9, 1), (15, 1), (0xffff, 1)].iter().chain(&known);
        let buffer: Vec<u8> = entries.flat_map(|(tag, value)| entry(*tag, *value)).collect();
        let stats = Stats::parse(&buffer);
        let all = Stats {
            swap_in_bytes: Some(10),
            swap_out_bytes: Some(11),
            major_faults: Some(12),
            free_bytes: Some(14),
            total_bytes: Some(15),
            available_bytes: Some(16),
            oom_kills: Some(20),
        };
        assert_eq!(stats, all);
    }

    #[test]
    fn what_is_absurd_is_quoted_and_what_is_cut_left_out() {
        let buffer = [entry(6, 1), entry(6, u64::MAX), vec![4, 0, 1, 2, 3]].concat();
        let stats = Stats::parse(&buffer);
        assert_eq!(stats, Stats { available_bytes: Some(u64::MAX), ..Stats::default() });
        assert_eq!(Stats::parse(&[]), Stats::default());
    }

    proptest! {
        #[test]
        fn anything_can_be_parsed(buffer in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = Stats::parse(&buffer);
        }
    }
}
