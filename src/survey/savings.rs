//! What keeping a VM's pages saves, net of what it costs: its part of what all VMs share, and what is its own. Pure.
//! The parts of all VMs are what the status has of the whole. A page in the writeback file takes no memory but its part
//! of the tables, so it is saved as well.

use crate::page::PAGE_SIZE_U64;

/// What all VMs share, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Memory of the arena, with what is lost between objects.
    pub arena_bytes: u64,
    /// What all objects in it are charged.
    pub charged_bytes: u64,
    /// Records of the arena's spans.
    pub arena_metadata_bytes: u64,
    /// Memory of the daemon's own that is counted nowhere else: buffers, threads, its heap.
    pub daemon_bytes: u64,
    /// VMs whose pages are in use.
    pub vms: u64,
}

/// What one VM has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// Pages in memory, same-filled ones included.
    pub memory_pages: u64,
    /// Pages in the writeback file.
    pub file_pages: u64,
    /// What its objects are charged.
    pub charged_bytes: u64,
    /// Its page table, with all that is kept beside it.
    pub table_bytes: u64,
}

/// What one VM saves, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Savings {
    /// What its pages in memory would take as they are.
    pub stored_bytes: u64,
    /// What those in the file would.
    pub file_bytes: u64,
    /// Its part of the arena: by what its objects are charged.
    pub arena_bytes: u64,
    /// Its page table, and its part of the arena's records.
    pub metadata_bytes: u64,
    /// Its part of the daemon's own memory: the same for all VMs.
    pub daemon_bytes: u64,
}

impl Savings {
    /// What a VM with these costs saves.
    #[must_use]
    pub fn of(costs: &Costs, shared: &Shared) -> Self {
        let part = |whole| part(whole, costs.charged_bytes, shared.charged_bytes);
        Self {
            stored_bytes: costs.memory_pages.saturating_mul(PAGE_SIZE_U64),
            file_bytes: costs.file_pages.saturating_mul(PAGE_SIZE_U64),
            arena_bytes: part(shared.arena_bytes),
            metadata_bytes: costs.table_bytes.saturating_add(part(shared.arena_metadata_bytes)),
            daemon_bytes: shared.daemon_bytes.checked_div(shared.vms).unwrap_or(0),
        }
    }

    /// What is left of it; less than nothing where keeping pages costs more than they take as they are.
    #[must_use]
    pub fn saved_bytes(&self) -> i64 {
        let cost_bytes =
            self.arena_bytes.saturating_add(self.metadata_bytes).saturating_add(self.daemon_bytes);
        let signed = |bytes| i64::try_from(bytes).unwrap_or(i64::MAX);
        signed(self.stored_bytes.saturating_add(self.file_bytes)) - signed(cost_bytes)
    }
}

/// As much of `whole` as `own` is of `all`; nothing of nothing, and never more than all.
fn part(whole: u64, own: u64, all: u64) -> u64 {
    let part = (u128::from(whole) * u128::from(own)).checked_div(u128::from(all)).unwrap_or(0);
    u64::try_from(part).unwrap_or(u64::MAX).min(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHARED: Shared = Shared {
        arena_bytes: 1200,
        charged_bytes: 1000,
        arena_metadata_bytes: 100,
        daemon_bytes: 3001,
        vms: 3,
    };

    #[test]
    fn what_is_shared_is_divided_and_what_is_own_is_not() {
        let costs = Costs { memory_pages: 2, file_pages: 3, charged_bytes: 250, table_bytes: 40 };
        let savings = Savings::of(&costs, &SHARED);
        let expected = Savings {
            stored_bytes: 8192,
            file_bytes: 12_288,
            arena_bytes: 300,
            metadata_bytes: 65,
            daemon_bytes: 1000,
        };
        assert_eq!((savings, savings.saved_bytes()), (expected, 8192 + 12_288 - 1365));
    }

    #[test]
    fn the_parts_are_the_whole() {
        let parts = [0, 1, 249, 750]
            .map(|charged_bytes| Savings::of(&Costs { charged_bytes, ..Costs::default() }, &SHARED));
        let sum = |of: fn(&Savings) -> u64| parts.iter().map(of).sum::<u64>();
        assert_eq!(
            (sum(|part| part.arena_bytes), sum(|part| part.metadata_bytes)),
            (1199, 99),
            "rounded down"
        );
    }

    #[test]
    fn an_empty_vm_costs_and_saves_nothing() {
        let costs = Costs { table_bytes: 4096, ..Costs::default() };
        assert_eq!(Savings::of(&costs, &SHARED).saved_bytes(), -5096);
        assert_eq!(Savings::of(&Costs::default(), &Shared::default()), Savings::default());
        let all = Costs {
            memory_pages: u64::MAX,
            file_pages: u64::MAX,
            charged_bytes: u64::MAX,
            table_bytes: u64::MAX,
        };
        let savings = Savings::of(&all, &Shared { charged_bytes: 1, ..SHARED });
        assert_eq!((savings.arena_bytes, savings.saved_bytes()), (1200, 0));
    }
}
