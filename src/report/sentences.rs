//! What a report says of a VM in sentences, whatever shows them.

use super::words::{pages, percent, rate, time};
use crate::control::api::{CompressorTrial, LimitFit, Report, Survey, VmReport};
use crate::ids::Bytes;

/// The compressor of which the sentence is, where new pages don't go to it already; a level is another thing to weigh.
const SENTENCE_ABOUT: &str = "zstd:1";

/// What there is to say of a VM's pages before the numbers; what is wrong, when nothing else is known.
pub(super) fn about(report: &Report, vm: &VmReport) -> Vec<String> {
    let Some(survey) = &vm.survey else {
        let reason = vm.message.as_ref().map_or_else(String::new, |message| format!(": {message}"));
        return vec![format!("{}{reason}", vm.state.as_str())];
    };
    if survey.guest_pages == 0 {
        return vec!["no pages are stored".to_owned(), traffic(report, survey)];
    }
    let mut sentences = vec![stored(survey), saved(survey)];
    if survey.duplicates > 0 {
        let duplicates = pages(survey.duplicates);
        let zombies = match survey.zombie_pages {
            0 => String::new(),
            zombies => format!("; going by others before, {} of them are dead", pages(zombies)),
        };
        sentences.push(format!(
            "{duplicates} of its pages in memory its guest has read, and may have as well: they save nothing{zombies}"
        ));
    }
    sentences.push(traffic(report, survey));
    sentences
}

fn stored(survey: &Survey) -> String {
    let file = match survey.file_pages {
        0 => String::new(),
        in_file => format!("; {} in the file", pages(in_file)),
    };
    let stored = pages(survey.stored_pages);
    let same = match survey.same_filled_pages {
        0 => String::new(),
        same => format!(", {} of it same-filled", pages(same)),
    };
    format!("{stored} stored in {} of the pool{same}{file}", Bytes(survey.pool_bytes))
}

fn saved(survey: &Survey) -> String {
    let savings = &survey.savings;
    let saved = Bytes(savings.saved_bytes.unsigned_abs());
    let verb = if savings.saved_bytes < 0 { "costs" } else { "saves" };
    format!(
        "{verb} {saved} net: {} of pages, less {} of the arena, {} of tables, {} of the daemon",
        Bytes(savings.stored_bytes),
        Bytes(savings.arena_bytes),
        Bytes(savings.metadata_bytes),
        Bytes(savings.daemon_bytes)
    )
}

fn traffic(report: &Report, survey: &Survey) -> String {
    let per_second = |count| rate(count, report.counted_seconds);
    format!(
        "in the last {}: {} stores a second, {} loads from memory, {} from the file",
        time(report.counted_seconds),
        per_second(survey.stores),
        per_second(survey.loads.saturating_sub(survey.loads_from_file)),
        per_second(survey.loads_from_file)
    )
}

/// What another compressor would do, if any pages were tried.
pub(super) fn compressor(report: &Report, survey: &Survey) -> Option<String> {
    let sample = &survey.sample;
    let others = || sample.compressors.iter().filter(|trial| trial.compressor != report.compressor);
    let about = others().find(|trial| trial.compressor == SENTENCE_ABOUT);
    let trial = about.or_else(|| others().min_by_key(|trial| trial.pool_bytes))?;
    let percent = percent(trial.pool_bytes, sample.pool_bytes)?;
    Some(format!("{} would hold this in {percent} %", short_name(trial)))
}

/// A compressor as people call it: without the level that it has when none is said.
fn short_name(trial: &CompressorTrial) -> &str {
    if trial.compressor == SENTENCE_ABOUT { "zstd" } else { &trial.compressor }
}

/// Of what the numbers about compressors are.
pub(super) fn sample(survey: &Survey) -> String {
    let sample = &survey.sample;
    let equal = match sample.equal_pages {
        0 => String::new(),
        1 => ", 1 of them the same as another".to_owned(),
        equal => format!(", {equal} of them the same as another"),
    };
    let bad = match sample.bad_pages {
        0 => String::new(),
        bad => format!("; {bad} more are bad, see `ballast check`"),
    };
    match sample.pages {
        0 => format!("no compressor was tried on its pages{bad}"),
        pages => format!("{pages} of its pages in the pool were tried{equal}{bad}"),
    }
}

/// What limit a VM needs, why, and what it has.
pub(super) fn limit(vm: &VmReport, survey: &Survey) -> Vec<String> {
    let need = &survey.need;
    let wanted = Bytes(need.limit_bytes);
    let oldest = survey.oldest_seconds.unwrap_or(0);
    let of = match need.within_seconds {
        None => "all its pages, as none can leave for a file".to_owned(),
        Some(within) if oldest < within => {
            format!("all its pages, of which the oldest was used {} ago", time(oldest))
        }
        Some(within) => format!("the pages that were used within {}", time(within)),
    };
    let mut sentences =
        vec![format!("needs a limit of {wanted}: {} for {of}, and an eighth", Bytes(need.used_bytes))];
    if need.rest_pages > 0 {
        sentences.push(format!(
            "the other {} would take {} of the file",
            pages(need.rest_pages),
            Bytes(need.rest_file_bytes)
        ));
    }
    sentences.push(match (need.current_limit_bytes, need.fit) {
        (None, _) => "it has no limit".to_owned(),
        (Some(limit), LimitFit::Fits) => format!("its limit of {} is right", Bytes(limit)),
        (Some(limit), LimitFit::Below) => {
            let then = if need.writeback { "pages that it uses leave" } else { "stores beyond it fail" };
            let limit = Bytes(limit);
            format!(
                "its limit of {limit} is too low, and {then}: `ballast vm set {} --limit {wanted}`",
                vm.name
            )
        }
        (Some(limit), LimitFit::FarAbove) => {
            let times = limit / need.limit_bytes.max(1);
            format!("its limit of {} is {times} times that, and holds it back from nothing", Bytes(limit))
        }
    });
    sentences
}

/// What the ages can't tell.
pub(super) const UNSEEN: &str = "Pages that the guest uses in its own memory are not seen here. Loads of same-filled \
                                pages don't count as a use.";

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use crate::control::api::Need;

    #[test]
    fn the_sentence_is_about_what_would_be_another() {
        let mut report = example();
        let survey = report.vms[0].survey.clone().unwrap();
        let said = |report: &Report| compressor(report, &survey).unwrap();
        assert_eq!(said(&report), "zstd would hold this in 61 %");
        report.compressor = "zstd:1".to_owned();
        assert_eq!(said(&report), "zstd:9 would hold this in 57 %");
        assert_eq!(compressor(&report, &Survey::default()), None);
    }

    #[test]
    fn a_limit_is_said_to_be_too_low_right_or_of_no_effect() {
        const MIB: u64 = 1 << 20;
        let mut report = example();
        let vm = report.vms.remove(0);
        let mut survey = vm.survey.clone().unwrap();
        let need = Need {
            within_seconds: Some(86_400),
            used_bytes: 8 * MIB,
            limit_bytes: 9 * MIB,
            rest_pages: 256,
            rest_file_bytes: 300 << 10,
            current_limit_bytes: Some(8 * MIB),
            fit: LimitFit::Below,
            writeback: true,
        };
        survey.need = need;
        survey.oldest_seconds = Some(2 * 86_400);
        let expected = [
            "needs a limit of 9MiB: 8MiB for the pages that were used within 24 h, and an eighth",
            "the other 1MiB would take 300KiB of the file",
            "its limit of 8MiB is too low, and pages that it uses leave: `ballast vm set web1 --limit 9MiB`",
        ];
        assert_eq!(limit(&vm, &survey), expected);
        survey.need =
            Need { current_limit_bytes: Some(90 * MIB), fit: LimitFit::FarAbove, rest_pages: 0, ..need };
        survey.oldest_seconds = Some(7200);
        let expected = [
            "needs a limit of 9MiB: 8MiB for all its pages, of which the oldest was used 2 h ago, and an eighth",
            "its limit of 90MiB is 10 times that, and holds it back from nothing",
        ];
        assert_eq!(limit(&vm, &survey), expected);
        survey.need = Need {
            within_seconds: None,
            current_limit_bytes: Some(10 * MIB),
            fit: LimitFit::Fits,
            rest_pages: 0,
            writeback: false,
            ..need
        };
        let expected = [
            "needs a limit of 9MiB: 8MiB for all its pages, as none can leave for a file, and an eighth",
            "its limit of 10MiB is right",
        ];
        assert_eq!(limit(&vm, &survey), expected);
    }
}
