//! The columns: what stands in them, what a key or `--sort` calls them, and how they sort.

use std::cmp::Ordering;
use std::time::Duration;

use clap::ValueEnum;

use super::rows::Row;
use crate::ids::Bytes;

/// What a VM's row has, in the order in which it is shown where there is room. 80 columns have room for those up to
/// [`Column::Pressure`], and for a sparkline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Column {
    /// Its name.
    Vm,
    /// Pages written in a second.
    Stores,
    /// Pages read in a second.
    Loads,
    /// Pages read from the writeback file in a second.
    File,
    /// How far its pages shrink.
    Ratio,
    /// What keeping them saves.
    Saved,
    /// The share of its limit that it uses.
    Limit,
    /// Stores that wait for room.
    Waiting,
    /// The share of time that its guest waited for loads.
    Pressure,
    /// What 99 % of its loads took at most.
    P99,
    /// Its pages in memory.
    Stored,
    /// What its guest has of memory.
    Memory,
    /// What it should have.
    Target,
    /// Why it should have that.
    Why,
}

impl Column {
    /// All of them.
    pub(super) const ALL: [Self; 14] = [
        Self::Vm,
        Self::Stores,
        Self::Loads,
        Self::File,
        Self::Ratio,
        Self::Saved,
        Self::Limit,
        Self::Waiting,
        Self::Pressure,
        Self::P99,
        Self::Stored,
        Self::Memory,
        Self::Target,
        Self::Why,
    ];

    /// The heading; the key that sorts by the column is the letter that stands first of those not taken before it.
    pub(super) fn heading(self) -> &'static str {
        match self {
            Self::Vm => "VM",
            Self::Stores => "STORES/s",
            Self::Loads => "LOADS/s",
            Self::File => "FILE/s",
            Self::P99 => "LOAD P99",
            Self::Pressure => "PRESSURE",
            Self::Ratio => "RATIO",
            Self::Stored => "STORED",
            Self::Saved => "SAVED",
            Self::Limit => "LIMIT",
            Self::Waiting => "WAITS",
            Self::Memory => "MEMORY",
            Self::Target => "TARGET",
            Self::Why => "WHY",
        }
    }

    /// The key that sorts by it.
    pub(super) fn key(self) -> char {
        match self {
            Self::Vm => 'n',
            Self::Stores => 's',
            Self::Loads => 'l',
            Self::File => 'f',
            Self::P99 => 'p',
            Self::Pressure => 'e',
            Self::Ratio => 'r',
            Self::Stored => 't',
            Self::Saved => 'v',
            Self::Limit => 'u',
            Self::Waiting => 'w',
            Self::Memory => 'm',
            Self::Target => 'a',
            Self::Why => 'y',
        }
    }

    /// Cells that a number in it takes; a name takes what it takes.
    pub(super) fn width(self) -> u16 {
        match self {
            Self::Vm => 12,
            Self::Ratio | Self::Limit | Self::Waiting => 5,
            Self::File => 6,
            Self::Loads | Self::Stored | Self::Saved | Self::Memory | Self::Target => 7,
            Self::Stores | Self::P99 | Self::Pressure => 8,
            Self::Why => 30,
        }
    }

    /// What stands in it.
    pub(super) fn text(self, row: &Row) -> String {
        let rate = |rate: Option<f64>| rate.map_or_else(none, |rate| format!("{rate:.0}"));
        match self {
            Self::Vm if row.state == "ready" => row.vm.clone(),
            Self::Vm => format!("{} ({})", row.vm, row.state),
            Self::Stores => rate(row.stores_per_second),
            Self::Loads => rate(row.loads_per_second),
            Self::File => rate(row.file_loads_per_second),
            Self::P99 => row.load_p99_ns.map_or_else(none, |p99| short(Duration::from_nanos(p99))),
            Self::Ratio => {
                row.ratio.map_or_else(none, |ratio| format!("{ratio:.2}").chars().take(5).collect())
            }
            Self::Stored => size(row.stored_bytes),
            Self::Saved => size(row.saved_bytes),
            Self::Limit => row.limit_used.map_or_else(none, |used| format!("{:.0}%", used * 100.0)),
            Self::Pressure => row.pressure.map_or_else(none, |share| format!("{:.1}%", share * 100.0)),
            Self::Waiting => row.waiting_stores.to_string(),
            Self::Memory => row.memory_bytes.map_or_else(none, size),
            Self::Target => row.target_bytes.map_or_else(none, size),
            // As much as fits; `status` has all of it.
            Self::Why => row.reason.as_ref().map_or_else(none, |why| why.chars().take(30).collect()),
        }
    }

    /// Names from the first letter on, numbers from the largest; what has none comes last.
    fn compare(self, a: &Row, b: &Row) -> Ordering {
        let by = |of: fn(&Row) -> f64| of(b).total_cmp(&of(a));
        match self {
            Self::Vm => Ordering::Equal,
            Self::Stores => by(|row| row.stores_per_second.unwrap_or(-1.0)),
            Self::Loads => by(|row| row.loads_per_second.unwrap_or(-1.0)),
            Self::File => by(|row| row.file_loads_per_second.unwrap_or(-1.0)),
            Self::Ratio => by(|row| row.ratio.unwrap_or(-1.0)),
            Self::Limit => by(|row| row.limit_used.unwrap_or(-1.0)),
            Self::Pressure => by(|row| row.pressure.unwrap_or(-1.0)),
            Self::P99 => b.load_p99_ns.cmp(&a.load_p99_ns),
            Self::Memory => b.memory_bytes.cmp(&a.memory_bytes),
            Self::Target => b.target_bytes.cmp(&a.target_bytes),
            Self::Why => a.reason.is_none().cmp(&b.reason.is_none()).then_with(|| a.reason.cmp(&b.reason)),
            Self::Stored => b.stored_bytes.cmp(&a.stored_bytes),
            Self::Saved => b.saved_bytes.cmp(&a.saved_bytes),
            Self::Waiting => b.waiting_stores.cmp(&a.waiting_stores),
        }
    }

    /// The rows in this column's order, equal ones by name.
    pub(super) fn sorted(self, rows: &[Row]) -> Vec<&Row> {
        let mut rows: Vec<_> = rows.iter().collect();
        rows.sort_by(|a, b| self.compare(a, b).then_with(|| a.vm.cmp(&b.vm)));
        rows
    }
}

fn none() -> String {
    "-".to_owned()
}

/// A size in seven characters at most: to hundredths below ten, to tenths below a hundred; rounded down.
fn size(bytes: u64) -> String {
    let whole = Bytes(bytes).to_string();
    let Some((number, rest)) = whole.split_once('.') else { return whole };
    let unit = rest.trim_start_matches(|digit: char| digit.is_ascii_digit());
    match number.len() {
        1 => whole,
        2 => format!("{number}.{}{unit}", &rest[..1]),
        _ => format!("{number}{unit}"),
    }
}

/// A duration in three figures or fewer.
fn short(duration: Duration) -> String {
    let units = [("s", 1e9), ("ms", 1e6), ("us", 1e3)];
    let ns = duration.as_nanos() as f64;
    let (name, unit) = units.into_iter().find(|(_, unit)| ns >= *unit).unwrap_or(("ns", 1.0));
    let number = ns / unit;
    if number < 10.0 { format!("{number:.1}{name}") } else { format!("{number:.0}{name}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_sort_from_the_largest_names_from_the_first_and_unknowns_come_last() {
        let row = |vm: &str, stores: Option<f64>, stored_bytes| Row {
            vm: vm.to_owned(),
            stores_per_second: stores,
            stored_bytes,
            ..Row::default()
        };
        let rows = [row("b", None, 5), row("c", Some(1.0), 5), row("a", Some(3.0), 1)];
        let names =
            |column: Column| column.sorted(&rows).iter().map(|row| row.vm.clone()).collect::<String>();
        assert_eq!([Column::Vm, Column::Stores, Column::Stored].map(names), ["abc", "acb", "bca"]);
    }

    #[test]
    fn every_column_has_a_key_of_its_own_and_fits_its_width() {
        let row = Row {
            stores_per_second: Some(999_999.0),
            load_p99_ns: Some(8_192),
            limit_used: Some(1.0),
            ratio: Some(1234.5),
            stored_bytes: (1 << 40) - 1,
            saved_bytes: 99 << 30 | 1 << 29,
            memory_bytes: Some(9 << 30 | 1),
            target_bytes: Some((1 << 40) - 1),
            loads_per_second: Some(999_999.0),
            file_loads_per_second: Some(99_999.0),
            waiting_stores: 65_536,
            pressure: Some(64.0),
            reason: Some("it gives up what nobody misses, and a little more of it each time".to_owned()),
            ..Row::default()
        };
        let mut keys: Vec<_> = Column::ALL.iter().map(|column| column.key()).collect();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), Column::ALL.len());
        for column in Column::ALL.into_iter().skip(1) {
            let width = usize::from(column.width());
            assert!(column.heading().len() <= width && column.text(&row).len() <= width, "{column:?}");
        }
        assert_eq!(Column::P99.text(&row), "8.2us");
        let sizes = [0, 1023 << 20, (10 << 20) + (3 << 18), 1025 << 20, 3 << 29].map(size);
        assert_eq!(sizes, ["0B", "1023MiB", "10.7MiB", "1.00GiB", "1.50GiB"]);
        assert_eq!(
            [600, 1 << 20, 3 << 30].map(|ns| short(Duration::from_nanos(ns))),
            ["600ns", "1.0ms", "3.2s"]
        );
    }
}
