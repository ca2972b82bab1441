//! How much guest memory the sessions of a VM map together: each region costs a descriptor, a mapping and a place among
//! those that are watched, and each byte a byte of the daemon's address space, of all of which there is only so much for
//! all VMs.

use std::sync::Arc;

use parking_lot::Mutex;

/// Regions that one session may have. QEMU has up to so many with pluggable memory, guests without it a handful.
pub const MEMORY_SLOTS_MAX: u64 = 509;
/// Regions that all sessions of a VM may have: of two, while one is handed over to the other.
pub const VM_REGIONS_MAX: u64 = 2 * MEMORY_SLOTS_MAX;
/// Bytes that these may be together: a tenth of the address space.
pub const VM_BYTES_MAX: u64 = 12 << 40;

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

/// More than a VM may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{regions} regions of guest memory with {bytes} bytes in this and the VM's other connections: {MEMORY_SLOTS_MAX} a \
     connection, {VM_REGIONS_MAX} and {VM_BYTES_MAX} bytes in all"
)]
pub struct TooMuch {
    regions: u64,
    bytes: u64,
}

/// One session's part of it. Dropping it takes that back.
#[derive(Debug)]
pub struct MemoryShare {
    vm: VmExtent,
    own: Extent,
}

impl MemoryShare {
    /// Nothing yet.
    #[must_use]
    pub fn new(vm: VmExtent) -> Self {
        Self { vm, own: Extent::default() }
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
            return Err(TooMuch { regions, bytes });
        }
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
}
