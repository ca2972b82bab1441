//! Pressure where the kernel keeps no PSI: how much of the host's memory is still available. Pure: takes the text of
//! `/proc/meminfo` and what was true before.

use super::Level;

/// What counts of `/proc/meminfo`, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meminfo {
    total_kib: u64,
    available_kib: u64,
}

/// Below this share of the host's memory the daemon's pages should go to the file. The kernel starts to reclaim on its
/// own at about one percent, and then takes what our guests and their VMMs run on.
const MODERATE_BELOW_PERMILLE: u64 = 100;
/// Below this one there is no time left to be choosy.
const SEVERE_BELOW_PERMILLE: u64 = 50;
/// How far above a threshold it must be until that is over; what one batch of evictions frees is not the end of it.
const HYSTERESIS_PERMILLE: u64 = 20;

impl Meminfo {
    /// Reads the two lines that count; `None` when one isn't there or isn't a number of kB.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let kib = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            value.trim().strip_suffix("kB")?.trim_end().parse().ok()
        };
        let (total_kib, available_kib) = (kib("MemTotal")?, kib("MemAvailable")?);
        (total_kib > 0).then_some(Self { total_kib, available_kib })
    }

    /// The pressure now, when it was `before` at the last look; `None` when there is none.
    pub(super) fn level(self, before: Option<Level>) -> Option<Level> {
        let permille = u128::from(self.available_kib) * 1000 / u128::from(self.total_kib);
        let below = |threshold: u64, level: Level| {
            let already = before.is_some_and(|before| before >= level);
            permille < u128::from(threshold + if already { HYSTERESIS_PERMILLE } else { 0 })
        };
        if below(SEVERE_BELOW_PERMILLE, Level::Severe) {
            Some(Level::Severe)
        } else {
            below(MODERATE_BELOW_PERMILLE, Level::Moderate).then_some(Level::Moderate)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_numbers_are_read() {
        let text = "MemTotal:       16303884 kB\nMemFree:  1 kB\nMemAvailable:   12 kB\nBuffers: 3 kB\n";
        assert_eq!(Meminfo::parse(text), Some(Meminfo { total_kib: 16_303_884, available_kib: 12 }));
    }

    #[test]
    fn garbage_is_no_number() {
        for text in [
            "",
            "MemTotal: 1 kB",
            "MemTotal: 0 kB\nMemAvailable: 0 kB",
            "MemTotal: -1 kB\nMemAvailable: 1 kB",
            "MemTotal: 100\nMemAvailable: 1 kB",
            "MemTotal: 100 kB\nMemAvailable: 1 MB",
            "MemTotal: 100 kB\nMemAvailableX: 1 kB",
            "MemTotal: 99999999999999999999 kB\nMemAvailable: 1 kB",
            "MemTotal\u{e9}: \u{e9} kB\nMemAvailable:",
        ] {
            assert_eq!(Meminfo::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_level_is_left_later_than_it_is_entered() {
        let mut before = None;
        for (available_kib, level) in [
            (500, None),
            (100, None),
            (99, Some(Level::Moderate)),
            (119, Some(Level::Moderate)),
            (120, None),
            (110, None),
            (49, Some(Level::Severe)),
            (69, Some(Level::Severe)),
            (70, Some(Level::Moderate)),
            (60, Some(Level::Moderate)),
            (0, Some(Level::Severe)),
            (1000, None),
        ] {
            before = Meminfo { total_kib: 1000, available_kib }.level(before);
            assert_eq!(before, level, "{available_kib}");
        }
    }

    #[test]
    fn numbers_at_the_end_of_their_range_are_compared_rightly() {
        let level = |total_kib, available_kib| Meminfo { total_kib, available_kib }.level(None);
        assert_eq!(level(u64::MAX, u64::MAX), None);
        assert_eq!(level(u64::MAX, u64::MAX / 30), Some(Level::Severe));
        assert_eq!(level(1, u64::MAX), None);
    }
}
