//! How much of each pool there was when new pages ceased to go to it: what its draining is measured against. Knows pools by
//! their numbers; what is left of them the store counts.

use parking_lot::Mutex;

use crate::store::Store;
use crate::store::pool::{POOLS_MAX, PoolId};

/// The objects of each pool at that time.
#[derive(Debug)]
pub(super) struct Draining(Mutex<[u64; POOLS_MAX]>);

impl Draining {
    /// Of a daemon that starts: whatever was made before it drains.
    pub(super) fn of(store: &Store) -> Self {
        let draining = Self(Mutex::default());
        draining.begin(PoolId::EARLIER, store);
        draining
    }

    /// New pages go to this pool no more. Gives how many objects it holds.
    pub(super) fn begin(&self, pool: PoolId, store: &Store) -> u64 {
        let index = pool.index();
        let objects = store.in_use().iter().map(|vm| vm.accounting().held.objects_by_pool[index]).sum();
        self.0.lock()[index] = objects;
        objects
    }

    /// What a pool held then, when it holds so many now: what was on its way to it has come meanwhile.
    pub(super) fn at_first(&self, pool: PoolId, objects: u64) -> u64 {
        self.0.lock()[pool.index()].max(objects)
    }
}
