//! Numbers of a report in words: times, shares, lengths; and lines of words.

use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

const DAY: u64 = 86_400;
/// The units that times are said in, the largest first.
const UNITS: [(u64, &str); 4] = [(DAY, "d"), (3600, "h"), (60, "min"), (1, "s")];

/// A time in one unit: `15 min`.
pub(super) fn time(seconds: u64) -> String {
    let (unit, name) = unit(seconds);
    format!("{} {name}", seconds / unit)
}

/// The same where there is little room: `15m`.
pub(super) fn short_time(seconds: u64) -> String {
    let (unit, name) = unit(seconds);
    format!("{}{}", seconds / unit, &name[..1])
}

/// The largest unit of which there is a whole one. A day and less than two are so many hours.
fn unit(seconds: u64) -> (u64, &'static str) {
    if (DAY..2 * DAY).contains(&seconds) { (3600, "h") } else { unit_of_bound(seconds) }
}

fn unit_of_bound(seconds: u64) -> (u64, &'static str) {
    UNITS.into_iter().find(|(unit, _)| seconds >= *unit).unwrap_or((1, "s"))
}

/// The ages between two bounds, in the unit of the lower one: `15-60 min`.
pub(super) fn ages(from: Option<u64>, below: Option<u64>) -> String {
    match (from, below) {
        (None, None) => "any".to_owned(),
        (None, Some(below)) => format!("< {}", time(below)),
        (Some(_), None) => "older".to_owned(),
        (Some(from), Some(below)) => {
            let (unit, name) = unit_of_bound(from);
            format!("{}-{} {name}", from / unit, below / unit)
        }
    }
}

/// What so many pages are, in bytes as the guest has them.
pub(super) fn pages(pages: u64) -> Bytes {
    Bytes(pages.saturating_mul(PAGE_SIZE_U64))
}

/// How many hundredths of `whole` are `part`, rounded; `None` of nothing.
pub(super) fn percent(part: u64, whole: u64) -> Option<u64> {
    let hundredths =
        (u128::from(part) * 200).checked_add(whole.into())?.checked_div(u128::from(whole) * 2)?;
    u64::try_from(hundredths).ok()
}

/// `part` as so many of `size`, at most `size`: the length of a bar.
pub(super) fn scaled(part: u64, whole: u64, size: u32) -> u32 {
    let scaled = (u128::from(part) * u128::from(size)).checked_div(whole.into()).unwrap_or(0);
    u32::try_from(scaled).unwrap_or(size).min(size)
}

/// Nanoseconds as microseconds to one place.
pub(super) fn microseconds(ns: u64) -> String {
    let tenths = ns.saturating_add(50) / 100;
    format!("{}.{} µs", tenths / 10, tenths % 10)
}

/// How many a second, to two places below ten.
pub(super) fn rate(count: u64, seconds: u64) -> String {
    let hundredths = u128::from(count) * 100 / u128::from(seconds.max(1));
    match hundredths {
        1000.. => format!("{}", hundredths / 100),
        _ => format!("{}.{:02}", hundredths / 100, hundredths % 100),
    }
}

/// Words in lines of at most `columns` characters; a word that is longer has a line of its own.
pub(super) fn wrapped(text: &str, columns: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= columns => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_one_unit() {
        let said = [0, 59, 60, 900, 3600, 86_399, 86_400, 172_800, 604_800].map(time);
        assert_eq!(said, ["0 s", "59 s", "1 min", "15 min", "1 h", "23 h", "24 h", "2 d", "7 d"]);
        assert_eq!([60, 900, 14_400, 86_400].map(short_time), ["1m", "15m", "4h", "24h"]);
        let bounds = [60, 120, 300, 900, 3600, 14_400, 86_400, 604_800].map(Some);
        let below = bounds.into_iter().chain([None]);
        let from = std::iter::once(None).chain(bounds);
        let said: Vec<_> = from.zip(below).map(|(from, below)| ages(from, below)).collect();
        let expected =
            ["< 1 min", "1-2 min", "2-5 min", "5-15 min", "15-60 min", "1-4 h", "4-24 h", "1-7 d", "older"];
        assert_eq!(said, expected);
    }

    #[test]
    fn parts_of_nothing_are_nothing() {
        assert_eq!(
            [(1, 2), (61, 100), (2, 3), (3, 2)].map(|(a, b)| percent(a, b)),
            [50, 61, 67, 150].map(Some)
        );
        assert_eq!((percent(1, 0), scaled(1, 0, 9), scaled(1, 3, 9), scaled(7, 3, 9)), (None, 0, 3, 9));
        assert_eq!(
            [0, 49, 50, 3949, 76_000].map(microseconds),
            ["0.0 µs", "0.0 µs", "0.1 µs", "3.9 µs", "76.0 µs"]
        );
        assert_eq!(percent(u64::MAX, u64::MAX), Some(100));
        assert_eq!(
            (rate(7, 0), rate(1, 3), rate(99, 3)),
            ("7.00".to_owned(), "0.33".to_owned(), "33".to_owned())
        );
    }

    #[test]
    fn words_are_not_broken() {
        assert_eq!(wrapped("aaa bb cc dddddd e", 6), ["aaa bb", "cc", "dddddd", "e"]);
        assert_eq!(wrapped("", 6), [""]);
    }
}
