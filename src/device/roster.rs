//! A worker's roster: which of its rings are to have a turn, which have stores that wait for room, and how other
//! threads get a ring onto it. Waking a worker costs a system call, so it is woken only when it sleeps.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use event_manager::{RemoteEndpoint, SubscriberId};
use parking_lot::Mutex;

use super::ring::Ring;

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

#[derive(Debug, Default)]
struct Lists {
    /// Rings that have work or had some a moment ago.
    active: Vec<SubscriberId>,
    /// Rings with stores that wait for room, or that wait otherwise for what nobody tells them of.
    waiting: Vec<SubscriberId>,
}

fn insert(list: &mut Vec<SubscriberId>, ring: SubscriberId) {
    if !list.contains(&ring) {
        list.push(ring);
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
        self.lists.lock().active.retain(|other| *other != ring);
    }

    /// Forgets a ring that is gone, whatever it waited for.
    pub fn forget(&self, ring: SubscriberId) {
        self.remove(ring);
        self.set_waiting(ring, false);
    }

    /// Makes `round` the rings that are to have a turn.
    pub fn copy_to(&self, round: &mut Vec<SubscriberId>) {
        round.clear();
        round.extend_from_slice(&self.lists.lock().active);
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
