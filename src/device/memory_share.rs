//! How much guest memory the sessions of a VM map together: each region costs a descriptor, a mapping and a place among
//! those that are watched, and each byte a byte of the daemon's address space, of all of which there is only so much for
//! all VMs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

/// Regions that one session may have. QEMU has up to so many with pluggable memory, guests without it a handful.
pub const MEMORY_SLOTS_MAX: u64 = 509;
/// Regions that all sessions of a VM may have: of two, while one is handed over to the other.
pub const VM_REGIONS_MAX: u64 = 2 * MEMORY_SLOTS_MAX;
/// Bytes that these may be together: a tenth of the address space.
pub const VM_BYTES_MAX: u64 = 12 << 40;

/// Regions that all VMs may have together: half of the mappings that Linux lets a process have by default
/// (`vm.max_map_count`), as threads and tables need some, too.
pub const ALL_REGIONS_MAX: u64 = 32_765;

/// Counts regions of all VMs.
#[derive(Debug)]
struct Regions {
    count: AtomicU64,
    max: u64,
}

static ALL: Regions = Regions { count: AtomicU64::new(0), max: ALL_REGIONS_MAX };

impl Regions {
    /// Makes `before` of them `after`, unless they would be too many.
    fn change(&self, before: u64, after: u64) -> Result<(), TooMuch> {
        let changed = |count: u64| {
            let count = count.saturating_sub(before).saturating_add(after);
            (after <= before || count <= self.max).then_some(count)
        };
        let result = self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, changed);
        result.map(drop).map_err(|all| TooMuch::All { regions: after, all, max: self.max })
    }
}

/// Regions, and bytes in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// How many regions.
    pub regions: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Extent {
    /// Of regions of so many bytes each.
    pub fn of(bytes: impl IntoIterator<Item = u64>) -> Self {
        let one = |all: Self, bytes| Self {
            regions: all.regions.saturating_add(1),
            bytes: all.bytes.saturating_add(bytes),
        };
        bytes.into_iter().fold(Self::default(), one)
    }

    /// As many regions as either has, and as many bytes.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self { regions: self.regions.max(other.regions), bytes: self.bytes.max(other.bytes) }
    }
}

/// What all sessions of a VM have mapped.
pub type VmExtent = Arc<Mutex<Extent>>;

/// More than a VM may have, or all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TooMuch {
    /// Of this VM.
    #[error(
        "{regions} regions of guest memory with {bytes} bytes in this and the VM's other connections: {MEMORY_SLOTS_MAX} a \
         connection, {VM_REGIONS_MAX} and {VM_BYTES_MAX} bytes in all"
    )]
    Vm {
        /// Regions that it would have.
        regions: u64,
        /// Their bytes.
        bytes: u64,
    },
    /// Of all VMs.
    #[error(
        "{regions} regions of guest memory beside {all} of all VMs: there may be {max}; give guests their memory in fewer pieces"
    )]
    All {
        /// Regions that the connection would have.
        regions: u64,
        /// Those that there are.
        all: u64,
        /// The most.
        max: u64,
    },
}

/// One session's part of it. Dropping it takes that back.
#[derive(Debug)]
pub struct MemoryShare {
    vm: VmExtent,
    all: &'static Regions,
    own: Extent,
}

impl MemoryShare {
    /// Nothing yet.
    #[must_use]
    pub fn new(vm: VmExtent) -> Self {
        Self { vm, all: &ALL, own: Extent::default() }
    }

    /// What the session has.
    #[must_use]
    pub fn own(&self) -> Extent {
        self.own
    }

    /// Makes it so much.
    ///
    /// # Errors
    /// When that is more than a session, or all of them, may have; it is as it was then.
    pub fn set(&mut self, own: Extent) -> Result<(), TooMuch> {
        let mut all = self.vm.lock();
        let regions = all.regions.saturating_sub(self.own.regions).saturating_add(own.regions);
        let bytes = all.bytes.saturating_sub(self.own.bytes).saturating_add(own.bytes);
        // What gets less never fails.
        let grows = own.regions > self.own.regions || own.bytes > self.own.bytes;
        let too_much = own.regions > MEMORY_SLOTS_MAX || regions > VM_REGIONS_MAX || bytes > VM_BYTES_MAX;
        if grows && too_much {
            return Err(TooMuch::Vm { regions, bytes });
        }
        self.all.change(self.own.regions, own.regions)?;
        *all = Extent { regions, bytes };
        drop(all);
        self.own = own;
        Ok(())
    }
}

impl Drop for MemoryShare {
    fn drop(&mut self) {
        // Less is never refused.
        let _ = self.set(Extent::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_share_what_their_vm_may_have() {
        let vm = VmExtent::default();
        let some = |regions, bytes| Extent { regions, bytes };
        let (mut one, mut other) = (MemoryShare::new(Arc::clone(&vm)), MemoryShare::new(Arc::clone(&vm)));
        let mut third = MemoryShare::new(Arc::clone(&vm));
        assert!(one.set(some(MEMORY_SLOTS_MAX + 1, 0)).is_err());
        one.set(some(MEMORY_SLOTS_MAX, VM_BYTES_MAX - 1)).unwrap();
        assert!(other.set(some(1, 2)).is_err());
        other.set(some(MEMORY_SLOTS_MAX, 1)).unwrap();
        assert!(third.set(some(1, 0)).is_err());
        other.set(some(MEMORY_SLOTS_MAX - 1, 0)).unwrap();
        third.set(some(1, 1)).unwrap();
        assert!(third.set(Extent::of([u64::MAX, 1])).is_err());
        assert_eq!(*vm.lock(), some(VM_REGIONS_MAX, VM_BYTES_MAX));
        drop((one, other, third));
        assert_eq!(*vm.lock(), Extent::default());
    }

    #[test]
    fn all_vms_share_what_a_process_may_have() {
        static FEW: Regions = Regions { count: AtomicU64::new(0), max: 10 };
        let of_another = || MemoryShare { vm: VmExtent::default(), all: &FEW, own: Extent::default() };
        let some = |regions| Extent { regions, bytes: 1 };
        let (mut one, mut other) = (of_another(), of_another());
        one.set(some(7)).unwrap();
        let refused = other.set(some(4)).unwrap_err();
        assert_eq!(refused, TooMuch::All { regions: 4, all: 7, max: 10 });
        assert_eq!(other.own(), Extent::default());
        other.set(some(3)).unwrap();
        one.set(some(5)).unwrap();
        other.set(some(5)).unwrap();
        drop((one, other));
        assert_eq!(FEW.count.load(Ordering::Relaxed), 0);
    }
}
