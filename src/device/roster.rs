//! A worker's roster: which of its rings are to have a turn, which have stores that wait for room, and how other
//! threads get a ring onto it. Waking a worker costs a system call, so it is woken only when it sleeps.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use event_manager::{RemoteEndpoint, SubscriberId};
use parking_lot::Mutex;

use super::ring::{Peek, Ring};

/// The rings of one worker that want something. Its lock is held for a few instructions, and nothing is taken under
/// it.
pub struct Roster {
    lists: Mutex<Lists>,
    /// The length of [`Lists::waiting`], for whoever made room and has nobody to tell.
    waiting: AtomicUsize,
    /// How often room was made.
    room: AtomicU64,
    /// Whether the worker sleeps, or is about to.
    asleep: AtomicBool,
    endpoint: RemoteEndpoint<Ring>,
}

/// A ring that is to have a turn.
#[derive(Debug)]
pub struct Turn {
    /// Which.
    pub ring: SubscriberId,
    /// What says that it doesn't need it yet.
    pub peek: Option<Peek>,
}

#[derive(Debug)]
struct Active {
    ring: SubscriberId,
    /// Somebody put it on the list since its last turn.
    called: bool,
}

#[derive(Debug, Default)]
struct Lists {
    /// Rings that have work or had some a moment ago.
    active: Vec<Active>,
    /// Rings with stores that wait for room, or that wait otherwise for what nobody tells them of.
    waiting: Vec<SubscriberId>,
}

fn insert(list: &mut Vec<Active>, ring: SubscriberId) {
    match list.iter_mut().find(|active| active.ring == ring) {
        Some(active) => active.called = true,
        None => list.push(Active { ring, called: true }),
    }
}

impl Roster {
    /// An empty one, for the worker at the other end of `endpoint`.
    #[must_use]
    pub fn new(endpoint: RemoteEndpoint<Ring>) -> Self {
        Self {
            lists: Mutex::default(),
            waiting: AtomicUsize::new(0),
            room: AtomicU64::new(0),
            asleep: AtomicBool::new(false),
            endpoint,
        }
    }

    /// Gives a ring a turn. For the worker's own thread.
    pub fn put(&self, ring: SubscriberId) {
        insert(&mut self.lists.lock().active, ring);
    }

    /// Gives a ring a turn. For any thread.
    pub fn call(&self, ring: SubscriberId) {
        self.put(ring);
        self.wake_sleeper();
    }

    /// Takes a ring off the list of those that have turns.
    pub fn remove(&self, ring: SubscriberId) {
        self.lists.lock().active.retain(|active| active.ring != ring);
    }

    /// Forgets a ring that is gone, whatever it waited for.
    pub fn forget(&self, ring: SubscriberId) {
        self.remove(ring);
        self.set_waiting(ring, false);
    }

    /// Makes `round` the rings that are to have a turn. What their last ones left there stays, unless they were called.
    pub fn copy_to(&self, round: &mut Vec<Turn>) {
        let mut lists = self.lists.lock();
        round.truncate(lists.active.len());
        for (index, active) in lists.active.iter_mut().enumerate() {
            let (ring, called) = (active.ring, std::mem::take(&mut active.called));
            match round.get_mut(index) {
                Some(turn) if turn.ring == ring && !called => {}
                Some(turn) => *turn = Turn { ring, peek: None },
                None => round.push(Turn { ring, peek: None }),
            }
        }
    }

    /// Notes whether a ring has stores that wait for room.
    pub fn set_waiting(&self, ring: SubscriberId, waits: bool) {
        let mut lists = self.lists.lock();
        lists.waiting.retain(|other| *other != ring);
        if waits {
            lists.waiting.push(ring);
        }
        self.waiting.store(lists.waiting.len(), Ordering::SeqCst);
    }

    /// Whether any ring has stores that wait for room.
    #[must_use]
    pub fn any_waiting(&self) -> bool {
        self.waiting.load(Ordering::SeqCst) > 0
    }

    /// Gives all rings with waiting stores a turn. For the worker's own thread.
    pub fn put_waiting(&self) {
        let mut lists = self.lists.lock();
        let Lists { active, waiting } = &mut *lists;
        waiting.iter().for_each(|ring| insert(active, *ring));
    }

    /// There is room: stores that wait may try again at once. For any thread; costs one read when nobody waits.
    pub fn room_made(&self) {
        if self.any_waiting() {
            self.room.fetch_add(1, Ordering::SeqCst);
            self.put_waiting();
            self.wake_sleeper();
        }
    }

    /// How often room was made so far.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.room.load(Ordering::SeqCst)
    }

    /// The worker is about to sleep. False when it must not, because a ring is to have a turn.
    pub fn fall_asleep(&self) -> bool {
        // In this order: whoever puts a ring on the list after the look below finds the worker asleep.
        self.asleep.store(true, Ordering::SeqCst);
        let may = self.lists.lock().active.is_empty();
        if !may {
            self.awake();
        }
        may
    }

    /// The worker has slept.
    pub fn awake(&self) {
        self.asleep.store(false, Ordering::SeqCst);
    }

    /// Wakes the worker, asleep or not.
    pub fn wake(&self) {
        if let Err(err) = self.endpoint.kick() {
            tracing::error!(?err, "a worker can't be woken");
        }
    }

    fn wake_sleeper(&self) {
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use event_manager::{EventManager, SubscriberOps};
    use vhost_user_backend::VringT;

    use super::*;
    use crate::device::guest_memory::Memory;
    use crate::device::ring::{GuestMemory, Owner, Vring};
    use crate::device::vm::DeviceVm;

    /// A roster with three rings that are to have a turn.
    fn three() -> (EventManager<Ring>, Arc<Roster>, [SubscriberId; 3]) {
        let mut manager = EventManager::<Ring>::new().unwrap();
        let roster = Arc::new(Roster::new(manager.remote_endpoint()));
        let memory = GuestMemory::new(Memory::new());
        let rings = [(); 3].map(|()| {
            let owner = Owner { vm: Arc::new(DeviceVm::new("web1", 1, false, None)), session: 1 };
            let vring = Vring::new(memory.clone(), 16).unwrap();
            manager.add_subscriber(Ring::new(
                owner,
                vring,
                memory.clone(),
                None,
                Duration::ZERO,
                Arc::clone(&roster),
            ))
        });
        rings.iter().for_each(|ring| roster.put(*ring));
        (manager, roster, rings)
    }

    /// As after turns that found nothing more to do.
    fn leave_peeks(round: &mut [Turn]) {
        let memory = GuestMemory::new(Memory::new());
        let vring = Vring::new(memory.clone(), 16).unwrap();
        for turn in round {
            turn.peek = Some(Peek::at(vring.get_ref().get_queue(), memory.clone()));
        }
    }

    fn look(round: &[Turn]) -> Vec<(SubscriberId, bool)> {
        round.iter().map(|turn| (turn.ring, turn.peek.is_some())).collect()
    }

    #[test]
    fn what_a_turn_left_stays_until_the_ring_is_called() {
        let (_manager, roster, [a, b, c]) = three();
        let mut round = Vec::new();
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, false), (b, false), (c, false)]);
        leave_peeks(&mut round);
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, true), (b, true), (c, true)]);
        roster.call(b);
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, true), (b, false), (c, true)], "a ring that is called has a turn");
        roster.set_waiting(a, true);
        roster.room_made();
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, false), (b, false), (c, true)], "and one that room was made for");
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, false), (b, false), (c, true)]);
    }

    #[test]
    fn what_one_ring_left_is_never_taken_for_anothers() {
        let (_manager, roster, [a, b, c]) = three();
        let mut round = Vec::new();
        roster.copy_to(&mut round);
        leave_peeks(&mut round);
        roster.remove(b);
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(a, true), (c, false)]);
        roster.remove(a);
        roster.put(a);
        roster.copy_to(&mut round);
        assert_eq!(look(&round), [(c, false), (a, false)]);
        [a, c].iter().for_each(|ring| roster.remove(*ring));
        roster.copy_to(&mut round);
        assert!(round.is_empty());
    }
}
