//! Pools: which compressor new pages go through, and what became of those that were current before. A pool is a
//! number beside each slot and a count per VM; its objects lie in the arena among all others and name only their
//! codec, so they outlive it. One is *current*; one may be *cold*, for pages that nobody has used for a while (zram's
//! secondary algorithm is the idea's origin); older ones *drain* through overwrites, recompression and the shrinker, and end
//! when they hold no object.
//!
//! Every store reads one word here that changes only when an operator changes the compressor: there is no reference
//! count to share between cores. A worker that read the word before a pool ended may publish an object after it: the
//! VM's lock orders the two, and the object is then counted under [`PoolId::EARLIER`].

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::codec::{Coding, Compressor};

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

/// A pool that pages go to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Its number.
    pub id: PoolId,
    /// What it compresses with.
    pub compressor: Compressor,
}

impl Pool {
    fn to_bits(self) -> u32 {
        self.compressor.to_bits() << 4 | self.id.bits()
    }

    fn from_bits(bits: u32) -> Self {
        Self { id: PoolId::from_bits(bits), compressor: Compressor::from_bits(bits >> 4) }
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
    /// Whether pages that nobody has used for a while go to it.
    pub cold: bool,
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
    /// The cold pool in the same way, or [`NONE`].
    cold: AtomicU32,
    /// A bit for every pool that may be given objects.
    open: AtomicU64,
    compressors: Mutex<[Option<Compressor>; POOLS_MAX]>,
}

/// No compressor's number is that large.
const NONE: u32 = u32::MAX;

impl Pools {
    /// One pool, with this compressor, and the place of objects that are there already.
    #[must_use]
    pub fn new(compressor: Compressor) -> Self {
        let first = PoolId(1);
        let mut compressors = [None; POOLS_MAX];
        compressors[first.index()] = Some(compressor);
        Self {
            current: AtomicU32::new(Pool { id: first, compressor }.to_bits()),
            cold: AtomicU32::new(NONE),
            open: AtomicU64::new(0b11),
            compressors: Mutex::new(compressors),
        }
    }

    /// The pool that new pages go to.
    #[must_use]
    pub fn current(&self) -> Pool {
        Pool::from_bits(self.current.load(Ordering::Relaxed))
    }

    /// The pool that pages go to which nobody has used for a while, if there is one.
    #[must_use]
    pub fn cold(&self) -> Option<Pool> {
        let bits = self.cold.load(Ordering::Relaxed);
        (bits != NONE).then(|| Pool::from_bits(bits))
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
        let pool = self.pool_of(&mut compressors, compressor)?;
        self.current.store(pool.to_bits(), Ordering::Relaxed);
        Ok(pool.id)
    }

    /// Makes a pool with this compressor the cold one, or none at all: pages of the one that was drain.
    ///
    /// # Errors
    /// When there are too many that still hold objects.
    pub fn set_cold(&self, compressor: Option<Compressor>) -> Result<(), TooManyPools> {
        let mut compressors = self.compressors.lock();
        let pool = compressor.map(|compressor| self.pool_of(&mut compressors, compressor)).transpose()?;
        self.cold.store(pool.map_or(NONE, Pool::to_bits), Ordering::Relaxed);
        Ok(())
    }

    /// The pool with this compressor: one that there is, or a new one.
    fn pool_of(
        &self,
        compressors: &mut [Option<Compressor>; POOLS_MAX],
        compressor: Compressor,
    ) -> Result<Pool, TooManyPools> {
        let same = compressors.iter().position(|other| *other == Some(compressor));
        let unused = || (1..POOLS_MAX).find(|index| compressors[*index].is_none());
        let index = same.or_else(unused).ok_or(TooManyPools)?;
        compressors[index] = Some(compressor);
        self.open.fetch_or(1 << index, Ordering::Relaxed);
        let id = PoolId(u8::try_from(index).map_err(|_| TooManyPools)?);
        Ok(Pool { id, compressor })
    }

    /// The pool that an object which comes back from the file is of, by how it was made: the current one, unless only the
    /// cold one makes such objects.
    #[must_use]
    pub fn maker_of(&self, coding: Coding) -> PoolId {
        let made_by = |pool: &Pool| {
            let learns = pool.compressor.dictionary_level().is_some();
            pool.compressor.codec() == coding.codec && (learns || coding.dictionary.is_none())
        };
        let current = self.current();
        let cold = self.cold().filter(|cold| made_by(cold) && !made_by(&current));
        cold.map_or(current.id, |cold| cold.id)
    }

    fn is_needed(&self, id: PoolId) -> bool {
        id == self.current().id || self.cold().is_some_and(|cold| cold.id == id)
    }

    /// Ends the draining pools that hold nothing. `objects_of` counts the objects of a pool, taking every VM's lock
    /// once; what is published after that sees that the pool has ended.
    pub fn end_drained(&self, mut objects_of: impl FnMut(PoolId) -> u64) {
        let mut ended = Vec::new();
        let mut compressors = self.compressors.lock();
        for index in 1..POOLS_MAX {
            let id = PoolId::from_bits(u32::try_from(index).unwrap_or(0));
            if self.is_needed(id) || compressors[index].is_none() {
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
        let (current, cold) = (self.current().id, self.cold().map(|pool| pool.id));
        let mut all: Vec<_> = compressors
            .iter()
            .zip((0..).map(PoolId))
            .filter(|(compressor, id)| compressor.is_some() || *id == PoolId::EARLIER)
            .map(|(&compressor, id)| PoolInfo {
                id,
                compressor,
                current: id == current,
                cold: Some(id) == cold,
            })
            .collect();
        all.sort_by_key(|pool| (!pool.current, pool.id));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::codec::{CodecId, DictionaryNumber};

    #[test]
    fn an_old_pool_is_revived_and_a_drained_one_ends() {
        let pools = Pools::new(Compressor::Lz4);
        let first = pools.current().id;
        let second = pools.set_current(Compressor::Zstd(3)).unwrap();
        assert_ne!(first, second);
        assert_eq!(pools.current(), Pool { id: second, compressor: Compressor::Zstd(3) });
        assert_eq!(pools.set_current(Compressor::Lz4), Ok(first));
        pools.end_drained(|id| u64::from(id != second));
        assert_eq!(pools.counted_under(second), PoolId::EARLIER);
        assert_eq!(pools.counted_under(first), first);
        assert_eq!(pools.list().len(), 2);
    }

    #[test]
    fn the_cold_pool_stays_while_it_is_wanted() {
        let pools = Pools::new(Compressor::Lz4);
        assert_eq!(pools.cold(), None);
        pools.set_cold(Some(Compressor::ZstdWithDictionary(9))).unwrap();
        let cold = pools.cold().unwrap();
        assert_eq!(cold.compressor, Compressor::ZstdWithDictionary(9));
        pools.end_drained(|_| 0);
        assert_eq!(pools.counted_under(cold.id), cold.id);
        let dictionary = DictionaryNumber::new(3);
        assert_eq!(pools.maker_of(Coding { codec: CodecId::Zstd, dictionary }), cold.id);
        assert_eq!(pools.maker_of(CodecId::Zstd.into()), cold.id, "it may have had no dictionary yet");
        for codec in [CodecId::Lz4, CodecId::Raw] {
            assert_eq!(pools.maker_of(codec.into()), pools.current().id);
        }
        assert!(pools.list().iter().any(|pool| pool.cold && !pool.current && pool.id == cold.id));
        assert_eq!(pools.set_current(Compressor::ZstdWithDictionary(9)), Ok(cold.id), "it may be both");
        pools.set_cold(None).unwrap();
        assert_eq!(pools.set_current(Compressor::Lz4).map(PoolId::index), Ok(1));
        pools.end_drained(|_| 0);
        assert_eq!((pools.cold(), pools.counted_under(cold.id)), (None, PoolId::EARLIER));
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
