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
    let in_file = match savings.file_bytes {
        0 => String::new(),
        in_file => format!(" in memory and {} in the file", Bytes(in_file)),
    };
    format!(
        "{verb} {saved} net: {} of pages{in_file}, less {} of the arena, {} of tables, {} of the daemon",
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

/// What another compressor would do, if any pages were tried: one that pages don't go to already, now or when they get
/// cold.
pub(super) fn compressor(report: &Report, survey: &Survey) -> Option<String> {
    let sample = &survey.sample;
    let used = |trial: &CompressorTrial| {
        trial.compressor == report.compressor || report.cold_compressor.as_ref() == Some(&trial.compressor)
    };
    let others = || sample.compressors.iter().filter(|trial| !used(trial));
    let smaller = |trial: &&CompressorTrial| {
        percent(trial.pool_bytes, sample.pool_bytes).is_some_and(|percent| percent < 100)
    };
    let about = others().find(|trial| trial.compressor == SENTENCE_ABOUT).filter(smaller);
    let best = others().min_by_key(|trial| trial.pool_bytes)?;
    let trial = about.unwrap_or(best);
    let percent = percent(trial.pool_bytes, sample.pool_bytes)?;
    if percent >= 100 {
        return Some("no other compressor would hold this in less".to_owned());
    }
    Some(format!("{} would hold this in {percent} %", short_name(trial)))
}

/// Which of its pages go to what a compressor makes, if they do.
pub(super) fn taken_by(report: &Report, trial: &CompressorTrial) -> Option<&'static str> {
    if trial.compressor == report.compressor {
        return Some("new pages");
    }
    (report.cold_compressor.as_ref() == Some(&trial.compressor)).then_some("cold pages")
}

/// A compressor as people call it: without the level that it has when none is said.
fn short_name(trial: &CompressorTrial) -> &str {
    if trial.compressor == SENTENCE_ABOUT { "zstd" } else { &trial.compressor }
}

/// Of what the numbers about compressors are, and what was not tried.
pub(super) fn sample(report: &Report, survey: &Survey) -> String {
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
        pages => {
            let untried = untried(report, survey);
            format!("{pages} of its pages in the pool were tried{equal}{bad}{untried}")
        }
    }
}

/// A compressor that is in use and is not tried is one that learns from a VM's pages, before it has learned from them.
fn untried(report: &Report, survey: &Survey) -> String {
    let in_use = report.cold_compressor.iter().chain([&report.compressor]);
    let is_tried = |name: &String| survey.sample.compressors.iter().any(|trial| trial.compressor == *name);
    match in_use.filter(|name| !is_tried(name)).max() {
        None => String::new(),
        Some(name) => format!("; {name} was not: the VM has no dictionary yet"),
    }
}

/// What limit a VM needs, why, and what it has.
pub(super) fn limit(vm: &VmReport, survey: &Survey) -> Vec<String> {
    let need = &survey.need;
    // To the byte: what is rounded down is too low again.
    let wanted = Bytes(need.limit_bytes).exact();
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
        report.cold_compressor = Some("zstd:9".to_owned());
        assert_eq!(said(&report), "zstd:3 would hold this in 60 %", "cold pages go there already");
        assert_eq!(compressor(&report, &Survey::default()), None);
    }

    #[test]
    fn what_is_denser_than_every_other_compressor_makes_it_is_told_as_that() {
        let report = example();
        let mut survey = report.vms[0].survey.clone().unwrap();
        // As pages are that were compressed anew when they got cold.
        survey.sample.pool_bytes = 360_000;
        assert_eq!(compressor(&report, &survey).unwrap(), "zstd:9 would hold this in 96 %");
        survey.sample.pool_bytes = 345_000;
        assert_eq!(compressor(&report, &survey).unwrap(), "no other compressor would hold this in less");
    }

    #[test]
    fn a_compressor_that_could_not_be_tried_is_named() {
        let mut report = example();
        let survey = report.vms[0].survey.clone().unwrap();
        let all = "512 of its pages in the pool were tried, 13 of them the same as another";
        assert_eq!(sample(&report, &survey), all);
        report.cold_compressor = Some("zstd:9+dictionary".to_owned());
        let expected = format!("{all}; zstd:9+dictionary was not: the VM has no dictionary yet");
        assert_eq!(sample(&report, &survey), expected);
        assert_eq!(sample(&report, &Survey::default()), "no compressor was tried on its pages");
    }

    proptest::proptest! {
        #[test]
        fn the_limit_that_is_advised_is_what_is_needed(mib in 1..(1_u64 << 34), used_bytes: u64) {
            let need = Need { limit_bytes: mib << 20, used_bytes, fit: LimitFit::Below, current_limit_bytes: Some(1), ..Need::default() };
            let vm = VmReport { name: "web1".to_owned(), ..VmReport::default() };
            let said = limit(&vm, &Survey { need, ..Survey::default() });
            let command = said.iter().find_map(|said| said.split_once(" --limit ")).unwrap().1;
            let advised: Bytes = command.trim_end_matches('`').parse().unwrap();
            proptest::prop_assert_eq!(advised.0, need.limit_bytes);
            let first = format!("needs a limit of {}: ", advised.exact());
            proptest::prop_assert!(said[0].starts_with(&first), "{}", said[0]);
        }
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
