//! The engine: keeps requests in flight until a plan is through, and counts. What a request is and what to do
//! with its answer is the caller's; nothing here allocates per request.

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::lanes::Lanes;
use crate::frontend::{Completion, Error, Queue, Status};
use crate::page::PAGE_SIZE_U64;

/// The longest latency that is told apart from longer ones.
const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// Completions between two looks at the progress bar, which costs a clock reading and more.
const PROGRESS_INTERVAL: u64 = 1024;

/// What one phase measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figures {
    /// Requests answered.
    pub requests: u64,
    /// Pages moved by them.
    pub pages: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Throughput.
    pub pages_per_second: f64,
    /// Throughput.
    pub mib_per_second: f64,
    /// Half of all requests took at most this long.
    pub latency_us_p50: f64,
    /// 90 %.
    pub latency_us_p90: f64,
    /// 99 %.
    pub latency_us_p99: f64,
    /// 99.9 %.
    pub latency_us_p999: f64,
    /// The slowest.
    pub latency_us_max: f64,
    /// How much of the time the front end had nothing to do but wait for answers. Near to none, it is the front end that
    /// limits the throughput.
    pub front_end_idle_percent: f64,
}

impl Figures {
    fn new(latency: &Histogram<u64>, pages: u64, elapsed: Duration, idle: Duration) -> Self {
        let seconds = elapsed.as_secs_f64();
        let at = |quantile| latency.value_at_quantile(quantile) as f64 / 1000.0;
        Self {
            requests: latency.len(),
            pages,
            seconds,
            pages_per_second: pages as f64 / seconds,
            mib_per_second: (pages * PAGE_SIZE_U64) as f64 / f64::from(1 << 20) / seconds,
            latency_us_p50: at(0.5),
            latency_us_p90: at(0.9),
            latency_us_p99: at(0.99),
            latency_us_p999: at(0.999),
            latency_us_max: latency.max() as f64 / 1000.0,
            front_end_idle_percent: 100.0 * idle.as_secs_f64() / seconds,
        }
    }
}

/// How to run a plan.
pub(crate) struct Plan<'a> {
    pub(crate) name: &'a str,
    /// Number of requests.
    pub(crate) requests: u64,
    /// Pages in each.
    pub(crate) pages_per_request: u64,
    /// Requests in flight.
    pub(crate) depth: u16,
}

/// The two ends of a request. `key` is whatever `stage` needs to be told back: a block.
pub(crate) trait Work {
    /// Stages this lane's next request under this tag and returns its key; `None` when it has no more.
    fn stage(&mut self, lane: usize, queue: &mut Queue, tag: u16) -> Result<Option<u64>, Error>;
    /// Looks at what came back, with status OK.
    fn finish(&mut self, queue: &Queue, tag: u16, key: u64) -> Result<(), Error>;
}

/// Runs the plan; returns its figures and the number of requests that failed.
pub(crate) fn drive(
    lanes: &mut Lanes,
    plan: &Plan<'_>,
    work: &mut impl Work,
) -> Result<(Figures, u64), Error> {
    let mut latency = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)
        .map_err(|_| Error::Usage("the latency histogram has impossible bounds"))?;
    // Publishing in parts keeps the back end busy while the rest of a batch is compared.
    let batch = (plan.depth / 4).max(1);
    let mut keys = Keys::new(lanes);
    let (mut done, mut failed) = (0_u64, 0);
    let mut idle = Duration::ZERO;
    let progress = progress(plan);
    let start = Instant::now();
    for _ in 0..plan.depth {
        if !keys.stage(lanes, work)? {
            break;
        }
    }
    lanes.publish()?;
    while lanes.busy() {
        let mut staged = 0;
        let (back, waited) = lanes.wait()?;
        idle += waited;
        let mut next = Some(back);
        while let Some((lane, Completion { tag, status, latency: took, .. })) = next {
            let took_ns = u64::try_from(took.as_nanos()).unwrap_or(LATENCY_NS_MAX);
            latency.saturating_record(took_ns);
            if status == Status::Ok {
                work.finish(lanes.queue(lane), tag, keys.get(lane, tag))?;
            } else {
                failed += 1;
            }
            staged += u16::from(keys.stage(lanes, work)?);
            if staged >= batch {
                lanes.publish()?;
                staged = 0;
            }
            done += 1;
            if done.is_multiple_of(PROGRESS_INTERVAL) {
                progress.set_position(done);
            }
            next = lanes.poll()?;
        }
        lanes.publish()?;
    }
    let figures = Figures::new(&latency, done * plan.pages_per_request, start.elapsed(), idle);
    progress.finish_and_clear();
    Ok((figures, failed))
}

/// What each lane's tags are in flight for.
struct Keys {
    keys: Vec<u64>,
    tags: usize,
}

impl Keys {
    fn new(lanes: &mut Lanes) -> Self {
        let tags = usize::from(lanes.queue(0).depth());
        Self { keys: vec![0; lanes.count() * tags], tags }
    }

    fn get(&self, lane: usize, tag: u16) -> u64 {
        self.keys[lane * self.tags + usize::from(tag)]
    }

    /// Stages the next request, if there is one.
    fn stage(&mut self, lanes: &mut Lanes, work: &mut impl Work) -> Result<bool, Error> {
        lanes.stage(|lane, queue, tag| {
            let key = work.stage(lane, queue, tag)?;
            if let Some(key) = key {
                self.keys[lane * self.tags + usize::from(tag)] = key;
            }
            Ok(key.is_some())
        })
    }
}

/// A bar on a terminal; indicatif shows nothing elsewhere.
fn progress(plan: &Plan<'_>) -> ProgressBar {
    let bar = ProgressBar::new(plan.requests);
    let style = "{msg:>16} {wide_bar} {percent:>3} % {per_sec:>16}";
    bar.set_style(ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(plan.name.to_owned());
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_in_the_units_of_their_names() {
        let mut latency = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).unwrap();
        for us in 1..=1000u64 {
            latency.saturating_record(us * 1000);
        }
        let figures = Figures::new(&latency, 512, Duration::from_millis(500), Duration::from_millis(50));
        assert!((figures.front_end_idle_percent - 10.0).abs() < 1e-9);
        assert_eq!((figures.requests, figures.pages), (1000, 512));
        assert!((figures.pages_per_second - 1024.0).abs() < 1e-9);
        assert!((figures.mib_per_second - 4.0).abs() < 1e-9);
        assert!((figures.latency_us_p50 - 500.0).abs() < 1.0, "{}", figures.latency_us_p50);
        assert!((figures.latency_us_max - 1000.0).abs() < 1.0);
    }
}
