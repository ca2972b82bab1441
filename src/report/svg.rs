//! The report as one picture: a panel for each VM with its charts, and the same sentences as in the text.

use super::canvas::{Anchor, Canvas, NORMAL, PALE, TITLE};
use super::charts::{self, Area};
use super::{sentences, words};
use crate::control::api::{Report, VmReport};

/// Pixels of the whole.
const WIDTH: u32 = 1000;
/// Pixels around everything.
const MARGIN: u32 = 24;
/// Pixels from one line of text to the next.
const LINE: u32 = 19;
/// Characters that surely fit a line.
const LINE_CHARACTERS: usize = 125;
/// Pixels of a chart's bars or curve.
const CHART_HEIGHT: u32 = 150;
/// Pixels around a chart: the heading above it, what is written below.
const ABOVE_CHART: u32 = 44;
const BELOW_CHART: u32 = 62;

/// The picture of a report, as SVG.
#[must_use]
pub fn picture(report: &Report) -> String {
    let mut canvas = Canvas::default();
    let mut y = MARGIN;
    for (n, vm) in report.vms.iter().enumerate() {
        if n > 0 {
            canvas.line((MARGIN, y), (WIDTH - MARGIN, y), PALE);
            y += MARGIN;
        }
        y = panel(&mut canvas, y, report, vm);
    }
    if report.vms.is_empty() {
        canvas.text((MARGIN, y + LINE), Anchor::Start, NORMAL, "no VM is configured");
        y += LINE + MARGIN;
    }
    canvas.picture(WIDTH, y, "Ballast: stored pages by VM")
}

/// Draws a VM from `y` on, and says where that ends.
fn panel(canvas: &mut Canvas, y: u32, report: &Report, vm: &VmReport) -> u32 {
    canvas.text((MARGIN, y + LINE), Anchor::Start, TITLE, &vm.name);
    let mut y = lines(canvas, y + LINE + 8, &sentences::about(report, vm));
    if let Some(survey) = vm.survey.as_ref().filter(|survey| survey.guest_pages > 0) {
        y += ABOVE_CHART;
        let at = |x, width| Area { x, y, width, height: CHART_HEIGHT };
        charts::ages(canvas, at(90, 245), survey);
        charts::working_set(canvas, at(430, 230), survey);
        charts::compressors(canvas, at(780, 190), report, survey);
        y += CHART_HEIGHT + BELOW_CHART;
        let compressor = sentences::compressor(report, survey)
            .map(|said| format!("{said}: {}", sentences::sample(report, survey)));
        let said: Vec<_> = compressor.into_iter().chain(sentences::limit(vm, survey)).collect();
        y = lines(canvas, y - LINE, &said);
        y = lines(canvas, y, &[sentences::UNSEEN.to_owned()]);
    }
    y + MARGIN
}

/// Writes sentences below each other, and says where they end.
fn lines(canvas: &mut Canvas, mut y: u32, sentences: &[String]) -> u32 {
    for line in sentences.iter().flat_map(|sentence| words::wrapped(sentence, LINE_CHARACTERS)) {
        y += LINE;
        canvas.text((MARGIN, y), Anchor::Start, NORMAL, &line);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    /// The values of an attribute of all elements of a kind, in order.
    fn numbers(picture: &str, element: &str, attribute: &str) -> Vec<u32> {
        let start = format!("<{element} ");
        let elements = picture.split(&start).skip(1);
        let value = |element: &str| {
            let (_, rest) = element.split('>').next()?.split_once(&format!("{attribute}=\""))?;
            rest.split('"').next()?.parse().ok()
        };
        elements.filter_map(value).collect()
    }

    #[test]
    fn every_vm_has_a_panel_and_those_with_pages_have_charts() {
        let report = example();
        let picture = picture(&report);
        for vm in &report.vms {
            assert!(picture.contains(&format!(">{}</text>", vm.name)), "{}", vm.name);
        }
        assert_eq!(picture.matches("<polyline").count(), 1);
        for text in
            ["Pages by last use", "Used within a time", "Bytes by compressor", "61 %", "its page table is"]
        {
            assert!(picture.contains(text), "{text}");
        }
        let survey = report.vms[0].survey.as_ref().unwrap();
        let (memory, file) =
            (picture.matches(super::super::canvas::MEMORY), picture.matches(super::super::canvas::FILE));
        // The curve, the key, the current compressor's bar, and a bar for each bucket with pages.
        let in_memory = survey.ages.iter().filter(|bucket| bucket.stored_pages > 0).count();
        let in_file = survey.ages.iter().filter(|bucket| bucket.file_pages > 0).count();
        assert_eq!((memory.count(), file.count()), (in_memory + 3, in_file + 1));
    }

    #[test]
    fn nothing_is_drawn_beside_the_picture() {
        let mut report = example();
        report.vms[0].name = "W".repeat(64);
        let picture = picture(&report);
        let height = numbers(&picture, "svg", " height")[0];
        for (element, attribute, most) in [
            ("text", "x", WIDTH),
            ("text", "y", height - 4),
            ("rect", "x", WIDTH),
            ("rect", "y", height),
            ("line", "x2", WIDTH),
        ] {
            let found = numbers(&picture, element, attribute);
            assert!(!found.is_empty() && found.iter().all(|number| *number <= most), "{element} {attribute}");
        }
        // Charts end below what is written above them.
        assert!(numbers(&picture, "line", "y1").iter().all(|y| *y > MARGIN));
    }

    #[test]
    fn a_picture_of_nothing_says_so() {
        assert!(picture(&Report::default()).contains("no VM is configured"));
    }
}
