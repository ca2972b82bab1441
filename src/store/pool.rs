//! Pools: which compressor new pages go through, and what became of those that were current before. A pool is a
//! number beside each slot and a count per VM; its objects lie in the arena among all others and name only their
//! codec, so they outlive it. The first is *current*; older ones *drain* through overwrites, recompression and the
//! shrinker, and end when they hold no object.
//!
//! Every store reads one word here that changes only when an operator changes the compressor: there is no reference
//! count to share between cores. A worker that read the word before a pool ended may publish an object after it: the
//! VM's lock orders the two, and the object is then counted under [`PoolId::EARLIER`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::codec::Compressor;

/// Pools at a time, draining ones included; their number has four bits beside each slot.
pub const POOLS_MAX: usize = 16;

/// The number of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(u8);

impl PoolId {
    /// Objects whose pool is not known: those that were there when the daemon started.
    pub const EARLIER: Self = Self(0);

    /// The number in the lowest four bits.
    #[must_use]
    pub fn from_bits(bits: u32) -> Self {
        Self((bits & 15) as u8)
    }

    /// The number as four bits.
    #[must_use]
    pub fn bits(self) -> u32 {
        u32::from(self.0)
    }

    /// The number as an index.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// A pool as `status` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolInfo {
    /// Its number.
    pub id: PoolId,
    /// What it compresses with; `None` for objects from before this daemon started.
    pub compressor: Option<Compressor>,
    /// Whether new pages go to it.
    pub current: bool,
}

/// Sixteen pools that still hold objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} earlier pools still hold pages: wait until one has drained, or use --recompress to move their pages over",
    POOLS_MAX - 2
)]
pub struct TooManyPools;

/// All pools of the host.
#[derive(Debug)]
pub struct Pools {
    /// The current pool: its number in bits 0–3, its compressor in the rest.
    current: AtomicU32,
    /// A bit for every pool that may be given objects.
    open: AtomicU64,
    compressors: Mutex<[Option<Compressor>; POOLS_MAX]>,
}

fn pack(id: PoolId, compressor: Compressor) -> u32 {
    compressor.to_bits() << 4 | id.bits()
}

impl Pools {
    /// One pool, with this compressor, and the place of objects that are there already.
    #[must_use]
    pub fn new(compressor: Compressor) -> Self {
        let first = PoolId(1);
        let mut compressors = [None; POOLS_MAX];
        compressors[first.index()] = Some(compressor);
        Self {
            current: AtomicU32::new(pack(first, compressor)),
            open: AtomicU64::new(0b11),
            compressors: Mutex::new(compressors),
        }
    }

    /// The pool that new pages go to, and what it compresses with.
    #[must_use]
    pub fn current(&self) -> (PoolId, Compressor) {
        let word = self.current.load(Ordering::Relaxed);
        (PoolId::from_bits(word), Compressor::from_bits(word >> 4))
    }

    /// The pool under which an object made for `id` is counted. To be asked under the lock of the VM that it is for.
    #[must_use]
    pub fn counted_under(&self, id: PoolId) -> PoolId {
        if self.open.load(Ordering::Relaxed) >> id.bits() & 1 == 1 { id } else { PoolId::EARLIER }
    }

    /// Makes a pool with this compressor the current one: a new one, or an old one with the same parameters.
    ///
    /// # Errors
    /// When there are too many that still hold objects.
    pub fn set_current(&self, compressor: Compressor) -> Result<PoolId, TooManyPools> {
        let mut compressors = self.compressors.lock();
        let same = compressors.iter().position(|other| *other == Some(compressor));
        let unused = || (1..POOLS_MAX).find(|index| compressors[*index].is_none());
        let index = same.or_else(unused).ok_or(TooManyPools)?;
        compressors[index] = Some(compressor);
        let id = PoolId(u8::try_from(index).map_err(|_| TooManyPools)?);
        self.open.fetch_or(1 << index, Ordering::Relaxed);
        self.current.store(pack(id, compressor), Ordering::Relaxed);
        Ok(id)
    }

    /// Ends the draining pools that hold nothing. `objects_of` counts the objects of a pool, taking every VM's lock
    /// once; what is published after that sees that the pool has ended.
    pub fn end_drained(&self, mut objects_of: impl FnMut(PoolId) -> u64) {
        let mut ended = Vec::new();
        let mut compressors = self.compressors.lock();
        let (current, _) = self.current();
        for index in 1..POOLS_MAX {
            let id = PoolId::from_bits(u32::try_from(index).unwrap_or(0));
            if id == current || compressors[index].is_none() {
                continue;
            }
            self.open.fetch_and(!(1 << index), Ordering::Relaxed);
            if objects_of(id) == 0 {
                ended.extend(compressors[index].take());
            } else {
                self.open.fetch_or(1 << index, Ordering::Relaxed);
            }
        }
        drop(compressors);
        for compressor in ended {
            tracing::info!(%compressor, "a pool holds nothing any more and has ended");
        }
    }

    /// The current pool, then the others.
    #[must_use]
    pub fn list(&self) -> Vec<PoolInfo> {
        let compressors = *self.compressors.lock();
        let (current, compressor) = self.current();
        let others = compressors.iter().zip(0..).filter_map(|(compressor, index)| {
            let id = PoolId(index);
            (id != current && (compressor.is_some() || id == PoolId::EARLIER)).then_some(PoolInfo {
                id,
                compressor: *compressor,
                current: false,
            })
        });
        std::iter::once(PoolInfo { id: current, compressor: Some(compressor), current: true })
            .chain(others)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_pool_is_revived_and_a_drained_one_ends() {
        let pools = Pools::new(Compressor::Lz4);
        let (first, _) = pools.current();
        let second = pools.set_current(Compressor::Zstd(3)).unwrap();
        assert_ne!(first, second);
        assert_eq!(pools.current(), (second, Compressor::Zstd(3)));
        assert_eq!(pools.set_current(Compressor::Lz4), Ok(first));
        pools.end_drained(|id| u64::from(id != second));
        assert_eq!(pools.counted_under(second), PoolId::EARLIER);
        assert_eq!(pools.counted_under(first), first);
        assert_eq!(pools.list().len(), 2);
    }

    #[test]
    fn there_is_an_end_to_pools_that_hold_objects() {
        let pools = Pools::new(Compressor::Lz4);
        for level in 1..=14 {
            pools.set_current(Compressor::Zstd(level)).unwrap();
            pools.end_drained(|_| 1);
        }
        assert_eq!(pools.set_current(Compressor::Zstd(15)), Err(TooManyPools));
        pools.end_drained(|id| u64::from(id != PoolId(3)));
        assert_eq!(pools.set_current(Compressor::Zstd(15)), Ok(PoolId(3)));
    }
}
