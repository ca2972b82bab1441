//! The report as text: for each VM what its pages are, a table of ages beside the curve of its working set, a table of
//! compressors, and what limit it needs. At most 100 columns.

use super::{sentences, words};
use crate::control::api::{Report, Survey, VmReport};
use crate::ids::Bytes;

/// Columns of the whole.
const COLUMNS: usize = 100;
/// Columns of a bar.
const BAR: u32 = 14;
/// What is before each line below a VM's name.
const INDENT: &str = "  ";

/// The whole report, with a newline at its end.
#[must_use]
pub fn text(report: &Report) -> String {
    if report.vms.is_empty() {
        return "no VM is configured\n".to_owned();
    }
    let vms: Vec<_> = report.vms.iter().map(|vm| vm_text(report, vm)).collect();
    let mut text = vms.join("\n");
    text.push_str(&total(report));
    text
}

fn vm_text(report: &Report, vm: &VmReport) -> String {
    let mut lines = vec![vm.name.clone()];
    lines.extend(lines_of(&sentences::about(report, vm)));
    if let Some(survey) = vm.survey.as_ref().filter(|survey| survey.guest_pages > 0) {
        lines.push(String::new());
        lines.extend(ages(survey));
        lines.extend(lines_of(&[sentences::UNSEEN.to_owned()]));
        lines.push(String::new());
        lines.extend(compressors(report, survey));
        let said = sentences::compressor(report, survey).into_iter();
        lines.extend(lines_of(&said.chain([sentences::sample(report, survey)]).collect::<Vec<_>>()));
        lines.push(String::new());
        lines.extend(lines_of(&sentences::limit(vm, survey)));
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// Each from the beginning of a line, and further lines of it a little behind.
fn lines_of(sentences: &[String]) -> Vec<String> {
    let mut lines = Vec::new();
    for sentence in sentences {
        let wrapped = words::wrapped(sentence, COLUMNS - 2 * INDENT.len());
        let indents = std::iter::once(INDENT.to_owned()).chain(std::iter::repeat(INDENT.repeat(2)));
        lines.extend(indents.zip(wrapped).map(|(indent, line)| indent + &line));
    }
    lines
}

fn ages(survey: &Survey) -> Vec<String> {
    let most = survey.ages.iter().map(|bucket| bucket.stored_pages.saturating_add(bucket.file_pages)).max();
    let all_bytes = survey.working_set.last().map_or(0, |all| all.used_bytes);
    let mut lines = vec![format!(
        "{INDENT}{:<11}{:>11}{:>11}{:>11}  {:<14}  {:<7}{:>11}",
        "LAST USED", "IN MEMORY", "IN FILE", "POOL", "", "WITHIN", "USED"
    )];
    let from = std::iter::once(None).chain(survey.ages.iter().map(|bucket| bucket.below_seconds));
    for ((from, bucket), within) in from.zip(&survey.ages).zip(&survey.working_set) {
        lines.push(format!(
            "{INDENT}{:<11}{:>11}{:>11}{:>11}  {:<14}  {:<7}{:>11}  {}",
            words::ages(from, bucket.below_seconds),
            words::pages(bucket.stored_pages),
            words::pages(bucket.file_pages),
            Bytes(bucket.pool_bytes),
            bar(bucket.stored_pages.saturating_add(bucket.file_pages), most.unwrap_or(0)),
            within.within_seconds.map_or_else(|| "ever".to_owned(), words::time),
            Bytes(within.used_bytes),
            bar(within.used_bytes, all_bytes),
        ));
    }
    lines
}

fn compressors(report: &Report, survey: &Survey) -> Vec<String> {
    let sample = &survey.sample;
    if sample.compressors.is_empty() {
        return Vec::new();
    }
    let most =
        sample.compressors.iter().map(|trial| trial.pool_bytes).max().unwrap_or(0).max(sample.pool_bytes);
    let longest = sample.compressors.iter().map(|trial| trial.compressor.len() + 1).max().unwrap_or(0);
    let names = longest.max(11);
    let row = |name: &str, bytes: Bytes, sampled_bytes: u64| {
        let percent = words::percent(sampled_bytes, sample.pool_bytes).unwrap_or(0);
        format!("{INDENT}{name:<names$}{bytes:>11}{percent:>6} %  {:<14}", bar(sampled_bytes, most))
    };
    let heading = format!(
        "{INDENT}{:<names$}{:>11}{:>24}{:>14}{:>14}",
        "COMPRESSOR", "POOL", "", "TO STORE", "TO LOAD"
    );
    let now = row("as it is", Bytes(survey.pool_bytes), sample.pool_bytes);
    let trials = sample.compressors.iter().map(|trial| {
        let taken = sentences::taken_by(report, trial).map_or_else(String::new, |pages| format!("  {pages}"));
        format!(
            "{}{:>14}{:>14}{taken}",
            row(&trial.compressor, Bytes(trial.estimated_pool_bytes), trial.pool_bytes),
            words::microseconds(trial.compress_ns_p50),
            words::microseconds(trial.decompress_ns_p50),
        )
    });
    [heading, now].into_iter().chain(trials).collect()
}

/// What all of several VMs come to.
fn total(report: &Report) -> String {
    let surveys: Vec<_> = report.vms.iter().filter_map(|vm| vm.survey.as_ref()).collect();
    if surveys.len() < 2 {
        return String::new();
    }
    let sum = |of: fn(&Survey) -> u64| surveys.iter().map(|survey| of(survey)).fold(0, u64::saturating_add);
    let saved = surveys.iter().map(|survey| survey.savings.saved_bytes).fold(0, i64::saturating_add);
    format!(
        "\nall: {} stored in {} of memory{}, {} net\n",
        Bytes(sum(|survey| survey.savings.stored_bytes)),
        Bytes(sum(|survey| {
            let parts = &survey.savings;
            parts.arena_bytes.saturating_add(parts.metadata_bytes).saturating_add(parts.daemon_bytes)
        })),
        match sum(|survey| survey.savings.file_bytes) {
            0 => String::new(),
            in_file => format!(", {} in the file", Bytes(in_file)),
        },
        if saved < 0 {
            format!("{} lost", Bytes(saved.unsigned_abs()))
        } else {
            format!("{} saved", Bytes(saved.unsigned_abs()))
        },
    )
}

/// A bar of eighths of a column. What there is a little of has one eighth.
fn bar(part: u64, whole: u64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = words::scaled(part, whole, 8 * BAR).max(u32::from(part > 0));
    let rest = EIGHTHS[(eighths % 8) as usize];
    format!("{}{rest}", "█".repeat((eighths / 8) as usize))
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn a_report_looks_like_this() {
        let expected = include_str!("tests/example.txt");
        let text = text(&example());
        assert_eq!(text, expected, "\n{text}");
    }

    #[test]
    fn no_line_is_longer_than_a_screen_is_wide() {
        let mut report = example();
        let vm = &mut report.vms[0];
        vm.name = "n".repeat(64);
        let survey = vm.survey.as_mut().unwrap();
        survey.need.fit = crate::control::api::LimitFit::Below;
        for number in [0, 1, (1 << 40) - 1] {
            for bucket in &mut survey.ages {
                (bucket.stored_pages, bucket.file_pages, bucket.pool_bytes) = (number, number, number);
            }
            survey.working_set.iter_mut().for_each(|point| point.used_bytes = number);
            (survey.stored_pages, survey.file_pages, survey.guest_pages) = (number, number, 1);
            (survey.stores, survey.loads, survey.loads_from_file) = (number, number, number);
            survey.savings.saved_bytes = -1;
            survey.need.used_bytes = number;
            (survey.sample.pool_bytes, survey.sample.equal_pages, survey.sample.bad_pages) = (number, 1, 1);
            let report = crate::control::api::Report {
                vms: vec![crate::control::api::VmReport {
                    name: "n".repeat(64),
                    survey: Some(survey.clone()),
                    ..Default::default()
                }],
                ..Default::default()
            };
            let text = text(&report);
            for line in text.lines() {
                assert!(line.chars().count() <= COLUMNS, "{number}: {line}");
            }
            assert!(text.contains("costs 1B net"), "{text}");
        }
    }

    #[test]
    fn nothing_is_divided_by_nothing() {
        let vm =
            VmReport { survey: Some(Survey { guest_pages: 1, ..Survey::default() }), ..VmReport::default() };
        let report = Report { vms: vec![vm], ..Report::default() };
        assert!(text(&report).contains("no compressor was tried"), "{}", text(&report));
        assert_eq!(text(&Report::default()), "no VM is configured\n");
    }

    #[test]
    fn bars_are_as_long_as_what_they_stand_for() {
        let bars = [(0, 8), (1, 1000), (1, 14), (3, 28), (14, 14), (99, 14), (0, 0)];
        let expected = ["", "▏", "█", "█▌", "██████████████", "██████████████", ""];
        assert_eq!(bars.map(|(part, whole)| bar(part, whole)), expected);
    }
}
