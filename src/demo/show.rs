//! What the demo prints, as text out of numbers. Pure.

use super::status::{Status, VmStatus};
use crate::ids::Bytes;

/// Widths hold the largest figures of a demo; a wider one only shifts its line.
const HEADER: &str =
    "VM      stored pages  uncompressed    in the pool  ratio  same-filled        saved  the guest says";

/// The table: one line a VM, with what its guest says, and one for the pool.
#[must_use]
pub fn table(status: &Status, phrases: &[(String, String)]) -> Vec<String> {
    let mut lines = vec![HEADER.to_owned()];
    for (name, phrase) in phrases {
        let vm = status.vm(name).cloned().unwrap_or_default();
        lines.push(format!("{name:<6} {}  {phrase}", figures(&vm)));
    }
    lines.push(format!(
        "both   {}  pool: {} of {}",
        figures(&status.sum()),
        Bytes(status.used_bytes),
        Bytes(status.max_bytes)
    ));
    lines
}

fn figures(vm: &VmStatus) -> String {
    format!(
        "{:>13}  {:>12}  {:>13}  {:>5}  {:>11}  {:>11}",
        vm.stored_pages,
        Bytes(vm.uncompressed_bytes()),
        Bytes(vm.pool_bytes),
        ratio(vm),
        vm.same_filled_pages,
        Bytes(vm.saved_bytes()),
    )
}

/// Uncompressed bytes per pool byte, with one decimal place; `-` while there are none.
fn ratio(vm: &VmStatus) -> String {
    match (vm.uncompressed_bytes() * 10).checked_div(vm.pool_bytes) {
        Some(tenths) => format!("{}.{}", tenths / 10, tenths % 10),
        None => "-".to_owned(),
    }
}

/// One line for a log that nobody watches.
#[must_use]
pub fn line(status: &Status, phrases: &[(String, String)]) -> String {
    let sum = status.sum();
    let guests: Vec<String> = phrases.iter().map(|(name, phrase)| format!("{name}: {phrase}")).collect();
    format!(
        "{} pages ({}) in {} of pool, ratio {}, {} saved · {}",
        sum.stored_pages,
        Bytes(sum.uncompressed_bytes()),
        Bytes(sum.pool_bytes),
        ratio(&sum),
        Bytes(sum.saved_bytes()),
        guests.join(" · "),
    )
}

/// The end: what the daemon held when it held most, and what passed through it.
#[must_use]
pub fn summary(peak: &Status, last: &Status) -> String {
    let (peak, last) = (peak.sum(), last.sum());
    format!(
        "At its peak the daemon held {} pages of the guests, {} of memory, in {}: {} saved, ratio {}, {} pages same-filled.\n\
         In all it stored {} pages, loaded {} and dropped {}; {} requests failed.",
        peak.stored_pages,
        Bytes(peak.uncompressed_bytes()),
        Bytes(peak.pool_bytes),
        Bytes(peak.saved_bytes()),
        ratio(&peak),
        peak.same_filled_pages,
        last.stores,
        last.loads,
        last.invalidates,
        last.errors,
    )
}

/// The escape sequence that goes up over `lines` printed lines and clears from there on.
#[must_use]
pub fn rewind(lines: usize) -> String {
    if lines == 0 { String::new() } else { format!("\x1b[{lines}A\x1b[J") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status() -> Status {
        let vm = |name: &str, stored_pages, pool_bytes| VmStatus {
            name: name.to_owned(),
            stored_pages,
            same_filled_pages: 12,
            pool_bytes,
            stores: stored_pages,
            ..VmStatus::default()
        };
        Status {
            max_bytes: 1 << 30,
            used_bytes: 3 << 20,
            vms: vec![vm("web1", 1024, 1 << 20), vm("web2", 512, 0)],
        }
    }

    fn phrases() -> Vec<(String, String)> {
        vec![("web1".to_owned(), "round 1".to_owned()), ("web2".to_owned(), "booting".to_owned())]
    }

    #[test]
    fn the_table_has_a_line_for_each_vm_and_one_for_both() {
        let lines = table(&status(), &phrases());
        let words = |line: &String| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&lines[1]), ["web1", "1024", "4MiB", "1MiB", "4.0", "12", "3MiB", "round", "1"]);
        assert_eq!(words(&lines[2]), ["web2", "512", "2MiB", "0B", "-", "12", "2MiB", "booting"]);
        assert_eq!(words(&lines[3])[..7], ["both", "1536", "6MiB", "1MiB", "6.0", "24", "5MiB"]);
        assert!(lines[3].ends_with("pool: 3MiB of 1GiB"));
        assert_eq!(lines.len(), 4);
    }

    #[test]
    fn columns_stand_under_their_titles() {
        let lines = table(&status(), &phrases());
        for title in ["stored pages", "uncompressed", "in the pool", "ratio", "same-filled", "saved"] {
            let end = lines[0].find(title).expect("a title") + title.len();
            let (cell, next) = (&lines[1][end - 1..end], &lines[1][end..=end]);
            assert!(cell != " " && next == " ", "{title}: {}", lines[1]);
        }
    }

    #[test]
    fn a_line_tells_the_sum_and_every_guest() {
        assert_eq!(
            line(&status(), &phrases()),
            "1536 pages (6MiB) in 1MiB of pool, ratio 6.0, 5MiB saved · web1: round 1 · web2: booting"
        );
    }

    #[test]
    fn the_summary_takes_amounts_from_the_peak_and_counts_from_the_end() {
        let text = summary(&status(), &Status::default());
        assert!(text.starts_with(
            "At its peak the daemon held 1536 pages of the guests, 6MiB of memory, in 1MiB: 5MiB saved"
        ));
        assert!(text.ends_with("stored 0 pages, loaded 0 and dropped 0; 0 requests failed."));
    }

    #[test]
    fn rewinding_nothing_prints_nothing() {
        assert_eq!(rewind(0), "");
        assert_eq!(rewind(4), "\x1b[4A\x1b[J");
    }
}
