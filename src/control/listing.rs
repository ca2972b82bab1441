//! What `vm show`, `vm add`, `vm remove`, `vm release` and `reload` say to people. Pure functions from an answer to a text.

use super::api::{ChangeOutcome, ReloadReport, SettingValue, VmDetails, VmRemoved};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

/// Rows whose cells stand below each other, with a newline at the end of each.
fn columns<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[String; N]| {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

/// One VM, and where each of its values comes from.
#[must_use]
pub fn details(vm: &VmDetails) -> String {
    let status = &vm.status;
    let connected = if status.connected { "connected" } else { "not connected" };
    let mut text = format!("{}: {}, {connected}\n", status.name, status.state.as_str());
    if let Some(seconds) = vm.disconnected_seconds {
        text.push_str(&format!("last connected: {} ago\n", ago(seconds)));
    }
    if let Some(message) = &status.message {
        text.push_str(&format!("{message}\n"));
    }
    if let Some(socket) = &vm.socket {
        text.push_str(&format!("socket: {socket}\n"));
    }
    text.push_str(&format!(
        "pages: {} in memory ({} of the pool), {} in the file, {} lost\n",
        Bytes(status.stored_pages.saturating_mul(PAGE_SIZE_U64)),
        Bytes(status.pool_bytes),
        Bytes(status.file_pages.saturating_mul(PAGE_SIZE_U64)),
        status.lost_pages,
    ));
    if !vm.settings.is_empty() {
        let rows = vm.settings.iter().map(|setting| {
            [setting.key.clone(), setting.value.to_string(), setting.source.as_str().to_owned()]
        });
        let heading = ["KEY", "VALUE", "FROM"].map(str::to_owned);
        text.push_str(&columns(&std::iter::once(heading).chain(rows).collect::<Vec<_>>()));
    }
    text
}

/// The line for one key of a VM, if it has that.
#[must_use]
pub fn setting(vm: &VmDetails, key: &str) -> Option<String> {
    let setting = vm.settings.iter().find(|setting| setting.key == key)?;
    Some(format!("{}: {key} {}\n", vm.status.name, setting.value))
}

/// A time in the largest unit of which there is a whole one.
fn ago(seconds: u64) -> String {
    let units = [(86_400, "days"), (3600, "hours"), (60, "minutes")];
    let found = units.into_iter().find(|(unit, _)| seconds >= 2 * unit);
    let (unit, name) = found.unwrap_or((1, "seconds"));
    format!("{} {name}", seconds / unit)
}

/// A VM that was added.
#[must_use]
pub fn added(vm: &VmDetails) -> String {
    let socket = vm.socket.as_deref().unwrap_or("nowhere");
    format!("{}: a disk of {} at {socket}\n", vm.status.name, Bytes(vm.status.size_bytes))
}

/// A VM that was removed.
#[must_use]
pub fn removed(vm: &VmRemoved) -> String {
    let pages = match vm.dropped_pages {
        0 => "it held no pages".to_owned(),
        1 => "1 page was dropped".to_owned(),
        pages => format!("{pages} pages were dropped"),
    };
    let returns = if vm.returns { "; it is back, empty, when the daemon starts again" } else { "" };
    format!("{}: removed; {pages}{returns}\n", vm.removed)
}

/// A VM that was released.
#[must_use]
pub fn released(name: &str, was_quarantined: bool) -> String {
    let before = if was_quarantined { "it is in no quarantine any more" } else { "it was in no quarantine" };
    format!("{name}: {before}; its VMM may attach\n")
}

/// What reading the configuration again came to, or would.
#[must_use]
pub fn reload(report: &ReloadReport) -> String {
    if report.changes.is_empty() {
        return format!("{}: nothing is another than the daemon goes by\n", report.path);
    }
    let shown = |value: &Option<SettingValue>| value.as_ref().map_or("-".to_owned(), ToString::to_string);
    let rows = report.changes.iter().map(|change| {
        let why = change.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
        let outcome = format!("{}{why}", change.outcome.as_str());
        [change.key.clone(), shown(&change.old), shown(&change.new), outcome]
    });
    let applied = if report.check { "WOULD BE APPLIED" } else { "APPLIED" };
    let heading = ["KEY", "OLD", "NEW", applied].map(str::to_owned);
    columns(&std::iter::once(heading).chain(rows).collect::<Vec<_>>())
}

/// Which of the changes went wrong, if any did.
#[must_use]
pub fn failures(report: &ReloadReport) -> Option<String> {
    let failed = report.changes.iter().filter(|change| change.outcome == ChangeOutcome::Failed);
    let keys: Vec<&str> = failed.map(|change| change.key.as_str()).collect();
    (!keys.is_empty()).then(|| format!("not everything could be changed: {}", keys.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::super::api::{Change, Setting, SettingSource, VmStatus};
    use super::*;

    #[test]
    fn a_vm_is_shown_with_the_source_of_each_value() {
        let setting = |key: &str, value, source| Setting { key: key.to_owned(), value, source };
        let vm = VmDetails {
            status: VmStatus { name: "web1".to_owned(), stored_pages: 256, ..VmStatus::default() },
            socket: Some("/run/ballast/web1.sock".to_owned()),
            disconnected_seconds: Some(7300),
            settings: vec![
                setting("size", SettingValue::Text("4GiB".to_owned()), SettingSource::File),
                setting("writeback", SettingValue::Flag(false), SettingSource::Runtime),
            ],
        };
        let expected = "web1: ready, not connected\nlast connected: 2 hours ago\nsocket: /run/ballast/web1.sock\n\
                        pages: 1MiB in memory (0B of the pool), 0B in the file, 0 lost\n\
                        KEY        VALUE  FROM\nsize       4GiB   file\nwriteback  false  runtime\n";
        assert_eq!(details(&vm), expected);
    }

    #[test]
    fn a_reload_is_a_table_of_what_changed() {
        let mut report = ReloadReport { path: "/f".to_owned(), ..ReloadReport::default() };
        assert_eq!(reload(&report), "/f: nothing is another than the daemon goes by\n");
        report.changes.push(Change {
            key: "workers".to_owned(),
            old: Some(SettingValue::Number(2)),
            new: Some(SettingValue::Number(4)),
            outcome: ChangeOutcome::Restart,
            why: Some("they run".to_owned()),
        });
        report.changes.push(Change { key: "vm.a".to_owned(), ..Change::default() });
        let expected = "KEY      OLD  NEW  APPLIED\nworkers  2    4    needs a restart: they run\nvm.a     -    -    now\n";
        assert_eq!((reload(&report).as_str(), failures(&report)), (expected, None));
        report.changes[1].outcome = ChangeOutcome::Failed;
        assert_eq!(failures(&report).unwrap(), "not everything could be changed: vm.a");
    }

    #[test]
    fn a_removal_says_what_went_and_whether_it_stays_so() {
        let vm = VmRemoved { removed: "a".to_owned(), dropped_pages: 3, returns: true };
        let expected = "a: removed; 3 pages were dropped; it is back, empty, when the daemon starts again\n";
        assert_eq!(removed(&vm), expected);
        assert_eq!(
            removed(&VmRemoved { dropped_pages: 0, returns: false, ..vm }),
            "a: removed; it held no pages\n"
        );
    }
}
