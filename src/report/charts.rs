//! The three charts of a VM: its pages by age, the curve of its working set, and what compressors make of its pages. Each
//! draws itself into a box.

use super::canvas::{Anchor, Canvas, FILE, HEADING, INK, MEMORY, OTHER, PALE, SMALL};
use super::{sentences, words};
use crate::control::api::{Report, Survey};
use crate::ids::Bytes;

/// Where a chart is, in pixels: the area of its bars or its curve. What is written stands around it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Area {
    pub x: u32,
    pub y: u32,
    pub width: u32,
    pub height: u32,
}

impl Area {
    fn bottom(self) -> u32 {
        self.y + self.height
    }

    fn right(self) -> u32 {
        self.x + self.width
    }

    /// Where the n-th of some equal parts begins.
    fn part(self, n: usize, parts: usize) -> u32 {
        self.x + words::scaled(n as u64, parts.max(1) as u64, self.width)
    }

    /// The pixels from the bottom that stand for a value.
    fn height_of(self, value: u64, most: u64) -> u32 {
        words::scaled(value, most, self.height)
    }
}

/// Heading, and lines with numbers for the whole and for the half.
fn frame(canvas: &mut Canvas, place: Area, heading: &str, most: Bytes) {
    canvas.text((place.x, place.y - 14), Anchor::Start, HEADING, heading);
    for (bytes, y) in [(most, place.y), (Bytes(most.0 / 2), place.y + place.height / 2)] {
        canvas.line((place.x, y), (place.right(), y), PALE);
        canvas.text((place.x - 5, y + 4), Anchor::End, SMALL, &bytes.to_string());
    }
}

fn ground(canvas: &mut Canvas, place: Area) {
    canvas.line((place.x, place.bottom()), (place.right(), place.bottom()), INK);
}

/// Pages by how long they have not been used, with the bounds between them.
pub(super) fn ages(canvas: &mut Canvas, place: Area, survey: &Survey) {
    let pages = |n: u64| words::pages(n).0;
    let all = survey.ages.iter().map(|bucket| bucket.stored_pages.saturating_add(bucket.file_pages));
    let most = pages(all.max().unwrap_or(0));
    frame(canvas, place, "Pages by last use", Bytes(most));
    let buckets = survey.ages.len();
    for (n, bucket) in survey.ages.iter().enumerate() {
        let (x, end) = (place.part(n, buckets), place.part(n + 1, buckets));
        let width = end.saturating_sub(x).saturating_sub(3);
        let in_memory = place.height_of(pages(bucket.stored_pages), most);
        let in_file = place.height_of(pages(bucket.file_pages), most).min(place.height - in_memory);
        canvas.rect((x + 1, place.bottom() - in_memory), (width, in_memory), MEMORY);
        canvas.rect((x + 1, place.bottom() - in_memory - in_file), (width, in_file), FILE);
        if let Some(below) = bucket.below_seconds {
            canvas.text((end, place.bottom() + 14), Anchor::Middle, SMALL, &words::short_time(below));
        }
    }
    ground(canvas, place);
    let key = place.bottom() + 34;
    for (x, fill, name) in [(place.x, MEMORY, "in memory"), (place.x + 90, FILE, "in the file")] {
        canvas.rect((x, key - 9), (10, 10), fill);
        canvas.text((x + 15, key), Anchor::Start, SMALL, name);
    }
}

/// How much was used within each time.
pub(super) fn working_set(canvas: &mut Canvas, place: Area, survey: &Survey) {
    let most = survey.working_set.last().map_or(0, |all| all.used_bytes);
    frame(canvas, place, "Used within a time", Bytes(most));
    let points = survey.working_set.len();
    let mut curve = vec![(place.x, place.bottom())];
    for (n, point) in survey.working_set.iter().enumerate() {
        let at = place.part(n + 1, points);
        curve.push((at, place.bottom() - place.height_of(point.used_bytes, most)));
        let name = point.within_seconds.map_or_else(|| "ever".to_owned(), words::short_time);
        canvas.text((at, place.bottom() + 14), Anchor::Middle, SMALL, &name);
    }
    canvas.curve(&curve, MEMORY);
    ground(canvas, place);
}

/// What the sample takes now, and would with each compressor.
pub(super) fn compressors(canvas: &mut Canvas, place: Area, report: &Report, survey: &Survey) {
    const ROW: u32 = 24;
    /// What is written behind the longest bar.
    const BEHIND: u32 = 100;
    canvas.text((place.x - 70, place.y - 14), Anchor::Start, HEADING, "Bytes by compressor");
    let sample = &survey.sample;
    let trials = sample.compressors.iter().map(|trial| {
        let taken = sentences::taken_by(report, trial);
        let note = taken.map_or_else(String::new, |pages| format!(", {pages}"));
        let fill = if taken.is_some() { MEMORY } else { OTHER };
        // There is little room before the bars.
        (trial.compressor.replace("+dictionary", "+dict"), trial.pool_bytes, fill, note)
    });
    let now = ("as it is".to_owned(), sample.pool_bytes, INK, String::new());
    let rows: Vec<_> = std::iter::once(now).filter(|_| sample.pages > 0).chain(trials).collect();
    let most = rows.iter().map(|(_, bytes, ..)| *bytes).max().unwrap_or(0);
    for (y, (name, bytes, fill, note)) in (place.y..).step_by(ROW as usize).zip(&rows) {
        let width = words::scaled(*bytes, most, place.width.saturating_sub(BEHIND));
        let percent = words::percent(*bytes, sample.pool_bytes).unwrap_or(0);
        canvas.text((place.x - 6, y + 12), Anchor::End, SMALL, name);
        canvas.rect((place.x, y), (width, ROW - 8), fill);
        canvas.text((place.x + width + 6, y + 12), Anchor::Start, SMALL, &format!("{percent} %{note}"));
    }
    if rows.is_empty() {
        canvas.text((place.x - 70, place.y + 12), Anchor::Start, SMALL, "no pages were tried");
    }
}
