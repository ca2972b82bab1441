//! When a VMM that is gone, hangs or talks nonsense is tried again, and when one that refuses is told again: not at each look,
//! so that hundreds of them cost the others nothing. Has no clock, it is told the time.

use std::time::{Duration, Instant};

use super::Unreachable;

const WAIT_MIN: Duration = Duration::from_secs(1);
/// Who starts a VM again finds it squeezed within this.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// What the last attempts came to.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    waiting: Option<Waiting>,
}

#[derive(Debug)]
struct Waiting {
    why: Unreachable,
    wait: Duration,
    until: Instant,
}

impl Backoff {
    /// Whether an attempt is due.
    ///
    /// # Errors
    /// What the last one came to, if it isn't.
    pub(crate) fn check(&self, now: Instant) -> Result<(), Unreachable> {
        match &self.waiting {
            Some(waiting) if now < waiting.until => Err(waiting.why.clone()),
            _ => Ok(()),
        }
    }

    /// Takes note of what an attempt came to.
    pub(super) fn note<T>(&mut self, result: &Result<T, Unreachable>, now: Instant) {
        match result {
            Err(why) if why.ends_connection() => self.put_off(why.clone(), now),
            _ => self.waiting = None,
        }
    }

    /// Whether the last attempt came to something, or there was none.
    pub(crate) fn is_well(&self) -> bool {
        self.waiting.is_none()
    }

    /// The next attempt is put off, whatever this one came to; twice as long each time.
    pub(crate) fn put_off(&mut self, why: Unreachable, now: Instant) {
        let wait = self.waiting.as_ref().map_or(WAIT_MIN, |last| WAIT_MAX.min(last.wait * 2));
        self.waiting = Some(Waiting { why, wait, until: now + wait });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_failure_doubles_the_wait_up_to_half_a_minute() {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        let late: Result<(), _> = Err(Unreachable::Late { waited_for: "a test" });
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            assert_eq!(backoff.check(now), Ok(()));
            backoff.note(&late, now);
            now += Duration::from_secs(seconds);
            assert_eq!(backoff.check(now - Duration::from_millis(1)), late, "before {seconds} s");
        }
        backoff.note(&Ok(()), now);
        assert_eq!(backoff.check(now), Ok(()));
        backoff.note(&late, now);
        assert_eq!(backoff.check(now + WAIT_MIN), Ok(()), "an answer ends it all");
    }

    #[test]
    fn what_a_vmm_answers_is_not_waited_out() {
        let mut backoff = Backoff::default();
        let now = Instant::now();
        for answer in [Unreachable::Migrating, Unreachable::Paused { state: "paused".to_owned() }] {
            backoff.note::<()>(&Err(answer), now);
            assert_eq!(backoff.check(now), Ok(()));
        }
    }

    #[test]
    fn what_is_put_off_is_so_whatever_the_answer_was() {
        let mut backoff = Backoff::default();
        let mut now = Instant::now();
        for seconds in [1, 2, 4] {
            backoff.put_off(Unreachable::Migrating, now);
            now += Duration::from_secs(seconds);
            assert_eq!(backoff.check(now - Duration::from_millis(1)), Err(Unreachable::Migrating));
            assert_eq!(backoff.check(now), Ok(()));
        }
    }
}
