//! Asking many VMMs at a time. One that hangs costs its own thread as long as a call may take, and whoever is well goes past
//! it. Of those that were slow last time only a few are asked at a tick, each in its turn, so that there is always a thread
//! for the others: however many hang, a tick takes no longer than one call, but for the first at which they do.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Guest;
use crate::balloon::vmm::{GuestMemory, TIME_OUT, Unreachable};
use crate::threads::{self, Role};

/// VMMs that are asked at the same time.
const ASKED_MAX: usize = 32;
/// Of these, those that may be slow again.
const SLOW_MAX: usize = 16;
/// A look that took as long was slow: no VMM that is well takes a tenth of it.
const SLOW: Duration = TIME_OUT.checked_div(2).expect("two is not zero");

/// How a VMM has answered, and whether it is to be asked.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// What the last look came to, if it was slow whatever it said, and when that was.
    slow: Option<(Result<GuestMemory, Unreachable>, Instant)>,
    is_put_off: bool,
}

impl Turn {
    /// Looks, or says what the last look came to if this is not its turn.
    pub(super) fn take(
        &mut self,
        look: impl FnOnce() -> Result<GuestMemory, Unreachable>,
    ) -> Result<GuestMemory, Unreachable> {
        if let Some((seen, _)) = self.slow.as_ref().filter(|_| self.is_put_off) {
            return seen.clone();
        }
        let began = Instant::now();
        let seen = look();
        let was_slow = began.elapsed() >= SLOW;
        // One that is not tried again yet is as slow as it was, and has had its turn.
        let is_put_off = |(before, _): &(Result<_, _>, Instant)| seen.is_err() && *before == seen;
        let is_slow = was_slow || self.slow.as_ref().is_some_and(is_put_off);
        self.slow = is_slow.then(|| (seen.clone(), Instant::now()));
        seen
    }

    fn slow_since(&self) -> Option<Instant> {
        self.slow.as_ref().map(|(_, at)| *at)
    }
}

/// Chooses who is not asked at this tick: those that were slow, but for the few that were asked longest ago.
pub(super) fn put_off(guests: &mut [Guest]) {
    choose(guests.iter_mut().map(|guest| &mut guest.turn).collect());
}

fn choose(mut turns: Vec<&mut Turn>) {
    turns.sort_by_key(|turn| turn.slow_since());
    let mut slow = 0;
    for turn in turns {
        slow += usize::from(turn.slow.is_some());
        turn.is_put_off = slow > SLOW_MAX;
    }
}

/// Does the same with each guest, many at a time; in the guests' order.
pub(super) fn side_by_side<G: Send, T: Send>(guests: &mut [G], act: impl Fn(&mut G) -> T + Sync) -> Vec<T> {
    by_threads(ASKED_MAX, guests, act)
}

/// The same with so many threads at most.
fn by_threads<G: Send, T: Send>(
    threads_max: usize,
    guests: &mut [G],
    act: impl Fn(&mut G) -> T + Sync,
) -> Vec<T> {
    let threads = guests.len().min(threads_max);
    let next = Mutex::new(guests.iter_mut().enumerate());
    let work = || {
        let mut done = Vec::new();
        loop {
            // The lock is for taking one, not for asking it.
            let Some((index, guest)) = next.lock().next() else { return done };
            done.push((index, act(guest)));
        }
    };
    let confined = || {
        threads::take_on(Role::Asking);
        work()
    };
    let mut done: Vec<(usize, T)> = std::thread::scope(|scope| {
        let spawn =
            |_| std::thread::Builder::new().name("asking".to_owned()).spawn_scoped(scope, confined).ok();
        let threads: Vec<_> = (0..threads).filter_map(spawn).collect();
        // Where there can be no more threads, this one does what is left.
        let own = if threads.is_empty() { work() } else { Vec::new() };
        let joined = threads.into_iter().map(|thread| thread.join());
        let joined = joined.flat_map(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        own.into_iter().chain(joined).collect()
    });
    done.sort_by_key(|(index, _)| *index);
    done.into_iter().map(|(_, result)| result).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn late() -> Unreachable {
        Unreachable::Late { waited_for: "a test" }
    }

    #[test]
    fn those_that_hang_keep_nobody_waiting() {
        // Half of the threads hang until all others were asked.
        let mut guests: Vec<usize> = (0..200).collect();
        let (tell, told) = mpsc::channel();
        let told = Mutex::new(told);
        let tell = Mutex::new(tell);
        let others = 200 - SLOW_MAX;
        let done = side_by_side(&mut guests, |guest| {
            if *guest == 0 {
                let told = told.lock();
                (0..others).for_each(|_| told.recv().expect("they are asked"));
            } else if *guest < SLOW_MAX {
                drop(told.lock());
            } else {
                tell.lock().send(()).expect("somebody waits");
            }
            *guest
        });
        assert_eq!(done, (0..200).collect::<Vec<_>>());
        assert_eq!(side_by_side(&mut [0; 0], |_| 0), [0; 0]);
    }

    #[test]
    fn where_there_are_no_threads_all_are_asked_all_the_same() {
        let mut guests: Vec<usize> = (0..50).collect();
        for threads_max in [0, 1] {
            let done = by_threads(threads_max, &mut guests, |guest| {
                *guest += 1;
                *guest
            });
            assert_eq!(done, guests, "each once, and in order");
        }
        assert_eq!(guests, (2..52).collect::<Vec<_>>());
    }

    #[test]
    fn of_those_that_were_slow_a_few_are_asked_in_turn() {
        let start = Instant::now();
        let slow =
            |n: u64| Turn { slow: Some((Err(late()), start + Duration::from_secs(n))), is_put_off: false };
        let mut turns: Vec<Turn> = (0..40).map(slow).chain([Turn::default(), Turn::default()]).collect();
        let mut asked = vec![0; turns.len()];
        for tick in 0..5 {
            choose(turns.iter_mut().collect());
            for (turn, asked) in turns.iter_mut().zip(&mut asked).filter(|(turn, _)| !turn.is_put_off) {
                *asked += 1;
                if let Some((_, at)) = &mut turn.slow {
                    *at = start + Duration::from_secs(100 + tick);
                }
            }
        }
        assert!(asked[..40].iter().all(|times| (1..=3).contains(times)), "{asked:?}");
        assert_eq!(asked[..40].iter().sum::<u64>(), 5 * SLOW_MAX as u64);
        assert_eq!(asked[40..], [5, 5], "whoever is well is always asked");
    }

    #[test]
    fn a_turn_that_is_put_off_says_what_the_last_came_to() {
        let before = Instant::now();
        let mut turn = Turn { slow: Some((Err(late()), before)), is_put_off: true };
        let never = || -> Result<GuestMemory, Unreachable> { unreachable!("it is not its turn") };
        assert_eq!(turn.take(never), Err(late()));
        turn.is_put_off = false;
        assert_eq!(turn.take(|| Err(late())), Err(late()));
        assert!(
            turn.slow_since() > Some(before),
            "an attempt that was put off tells nothing, and was its turn"
        );
        let memory = GuestMemory { configured_bytes: 2, actual_bytes: 1, guest: None };
        assert_eq!(turn.take(|| Ok(memory)), Ok(memory));
        assert!(turn.slow.is_none());
        let late_but_well = || {
            std::thread::sleep(SLOW);
            Ok(memory)
        };
        assert_eq!(turn.take(late_but_well), Ok(memory));
        assert!(turn.slow.is_some(), "whatever it says");
    }
}
