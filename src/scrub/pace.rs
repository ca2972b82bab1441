//! The pace of a walk: so many pages a second, in steps that are small for the sake of those who load meanwhile.

use std::time::{Duration, Instant};

/// Pages of one step.
const STEP_PAGES_MAX: u32 = 32;
/// Steps a second, as long as they are not larger than that.
const STEPS_PER_SECOND: f64 = 20.0;
/// So much may be caught up with after a step that took long.
const BEHIND_MAX: Duration = Duration::from_millis(50);
/// The longest that a step may cost: a pace changes, with the number of pages that there are.
const COST_MAX: Duration = Duration::from_secs(3600);

/// When the next step is due.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    due: Instant,
}

impl Pace {
    /// The first step is due at once.
    pub fn new(now: Instant) -> Self {
        Self { due: now }
    }

    /// How long after `now` the next step is due.
    pub fn wait(&self, now: Instant) -> Duration {
        self.due.saturating_duration_since(now)
    }

    /// Notes that `pages` were looked at, of which there may be `pages_per_second`.
    pub fn spent(&mut self, pages: u32, pages_per_second: f64, now: Instant) {
        let cost = Duration::try_from_secs_f64(f64::from(pages) / pages_per_second).unwrap_or(COST_MAX);
        let from = self.due.max(now.checked_sub(BEHIND_MAX).unwrap_or(now));
        self.due = from + cost.min(COST_MAX);
    }
}

/// Pages of a step at this pace.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float is cut to the range")]
pub(super) fn step_pages(pages_per_second: f64) -> u32 {
    ((pages_per_second / STEPS_PER_SECOND) as u32).clamp(1, STEP_PAGES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_small_and_never_nothing() {
        assert_eq!([0.0, 1.0, 100.0, 1e6, f64::INFINITY].map(step_pages), [1, 1, 5, 32, 32]);
    }

    #[test]
    fn steps_are_due_at_the_rate_and_little_is_caught_up_with() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut pace = Pace::new(start);
        assert_eq!(pace.wait(start), Duration::ZERO);
        for step in 1..=10 {
            pace.spent(10, 1000.0, start);
            assert_eq!(pace.wait(start), Duration::from_millis(10 * step));
        }
        // Two seconds late.
        pace.spent(10, 1000.0, at(2100));
        assert_eq!(pace.wait(at(2050)), Duration::from_millis(10));
        pace.spent(1, 0.0, at(2100));
        assert!(pace.wait(at(2100)) <= COST_MAX);
    }
}
