//! What those who want something of a balloon and the sessions that it has know in common: how large it is to be, how
//! large it is, and whose rings run. Held for moments, and nothing is sent or written under it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use super::channel::Channel;
use super::config_space::{self, Fields};
use super::numbers::Numbers;
use super::stats::Stats;

/// A guest is asked for statistics so often at most: to answer costs it a walk over its processors' counters.
pub const STATS_EVERY: Duration = Duration::from_secs(1);

/// What wakes a session's thread.
pub type Waker = Arc<EventFd>;

/// The guest whose rings run, as its session tells of it.
#[derive(Debug)]
pub struct Guest {
    /// The session's number.
    pub session: u64,
    /// What wakes it.
    pub waker: Waker,
    /// The way to its VMM, if that has given one.
    pub channel: Option<Arc<Channel>>,
    /// What its driver has agreed to.
    pub features: u64,
    /// All of its memory.
    pub configured_bytes: u64,
    /// Pages that it has given up and not taken back.
    pub given_pages: u64,
    /// What it said last of its memory, and when.
    pub stats: Option<(Stats, Instant)>,
    /// When it was asked for that.
    pub asked: Option<Instant>,
    /// Whether it is to be asked.
    pub wish: bool,
}

/// A balloon.
#[derive(Debug, Default)]
pub struct State {
    /// How large it is to be; `None` while nobody has said so since a driver began.
    pub target_pages: Option<u32>,
    /// How large it is, as the driver says; `None` until it does.
    pub actual_pages: Option<u32>,
    /// The guest whose rings run.
    pub guest: Option<Guest>,
    /// Sessions whose rings run when those of another have stopped.
    waiting: Vec<Waker>,
    /// What was counted.
    pub numbers: Numbers,
}

impl State {
    /// Makes this the guest whose rings run, unless another's do. That one's end wakes the session.
    pub fn claim(&mut self, guest: impl FnOnce() -> Guest, session: u64, waker: &Waker) -> bool {
        if let Some(other) = self.guest.as_ref().filter(|guest| guest.session != session) {
            debug_assert_ne!(other.session, session);
            if !self.waiting.iter().any(|other| Arc::ptr_eq(other, waker)) {
                self.waiting.push(Arc::clone(waker));
            }
            return false;
        }
        self.guest.get_or_insert_with(guest);
        true
    }

    /// None of this session's rings runs. Returns whom to wake.
    #[must_use]
    pub fn release(&mut self, session: u64, waker: &Waker) -> Vec<Waker> {
        self.waiting.retain(|other| !Arc::ptr_eq(other, waker));
        if self.guest.as_ref().is_none_or(|guest| guest.session != session) {
            return Vec::new();
        }
        self.guest = None;
        std::mem::take(&mut self.waiting)
    }

    /// The guest, if it is this session's.
    pub fn guest_of(&mut self, session: u64) -> Option<&mut Guest> {
        self.guest.as_mut().filter(|guest| guest.session == session)
    }

    /// A driver has begun from nothing. It has its whole memory until somebody who knows of it says otherwise: what was
    /// wanted of the one before it may be more than it can spare while it boots.
    pub fn begin_driver(&mut self) {
        (self.target_pages, self.actual_pages) = (None, Some(0));
    }

    /// What a driver reads. While nobody has said how large the balloon is to be, it is to stay as it is.
    #[must_use]
    pub fn fields(&self, poison_val: u32) -> Fields {
        let actual = self.actual_pages.unwrap_or(0);
        Fields { num_pages: self.target_pages.unwrap_or(actual), actual, poison_val }
    }

    /// Notes that the guest is to be asked for statistics, if it is time. False when it never says any; else whom to
    /// wake.
    pub fn ask_stats(&mut self, now: Instant) -> (bool, Option<Waker>) {
        let Some(guest) = &mut self.guest else { return (false, None) };
        if !config_space::has(guest.features, config_space::STATS_VQ) {
            return (false, None);
        }
        let asked = guest.asked.is_some_and(|asked| now.saturating_duration_since(asked) < STATS_EVERY);
        if guest.wish || asked {
            return (true, None);
        }
        guest.wish = true;
        (true, Some(Arc::clone(&guest.waker)))
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn waker() -> Waker {
        Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())
    }

    fn guest(session: u64, waker: &Waker, features: u64) -> Guest {
        Guest {
            session,
            waker: Arc::clone(waker),
            channel: None,
            features,
            configured_bytes: 0,
            given_pages: 0,
            stats: None,
            asked: None,
            wish: false,
        }
    }

    #[test]
    fn one_guest_at_a_time_and_the_next_is_woken() {
        let (mut state, one, other) = (State::default(), waker(), waker());
        assert!(state.claim(|| guest(1, &one, 0), 1, &one));
        assert!(!state.claim(|| guest(2, &other, 0), 2, &other));
        assert!(!state.claim(|| guest(2, &other, 0), 2, &other));
        assert!(state.release(3, &waker()).is_empty());
        assert!(state.claim(|| guest(1, &one, 0), 1, &one));
        let woken = state.release(1, &one);
        assert!(woken.len() == 1 && Arc::ptr_eq(&woken[0], &other));
        assert!(state.claim(|| guest(2, &other, 0), 2, &other));
        assert!(state.guest_of(2).is_some() && state.guest_of(1).is_none());
    }

    #[test]
    fn one_that_gives_up_waiting_is_not_woken() {
        let (mut state, one, other) = (State::default(), waker(), waker());
        assert!(state.claim(|| guest(1, &one, 0), 1, &one));
        assert!(!state.claim(|| guest(2, &other, 0), 2, &other));
        assert!(state.release(2, &other).is_empty());
        assert!(state.release(1, &one).is_empty());
    }

    #[test]
    fn a_balloon_stays_as_it_is_until_somebody_says_otherwise() {
        let mut state = State::default();
        assert_eq!(state.fields(9), Fields { num_pages: 0, actual: 0, poison_val: 9 });
        state.actual_pages = Some(5);
        assert_eq!(state.fields(0).num_pages, 5);
        state.target_pages = Some(7);
        assert_eq!(state.fields(0), Fields { num_pages: 7, actual: 5, poison_val: 0 });
        state.begin_driver();
        assert_eq!(state.fields(0), Fields::default());
    }

    #[test]
    fn statistics_are_asked_for_once_a_second() {
        let (mut state, one, now) = (State::default(), waker(), Instant::now());
        assert!(matches!(state.ask_stats(now), (false, None)));
        state.guest = Some(guest(1, &one, 0));
        assert!(matches!(state.ask_stats(now), (false, None)));
        state.guest = Some(guest(1, &one, 1 << config_space::STATS_VQ));
        assert!(matches!(state.ask_stats(now), (true, Some(_))));
        assert!(matches!(state.ask_stats(now), (true, None)), "it was not asked yet");
        let guest = state.guest_of(1).unwrap();
        (guest.wish, guest.asked) = (false, Some(now));
        assert!(matches!(state.ask_stats(now + STATS_EVERY / 2), (true, None)));
        assert!(matches!(state.ask_stats(now + STATS_EVERY), (true, Some(_))));
    }
}
