//! Compaction: moving objects of sparse spans together. Not there yet.

use super::arena::{Allocation, Arena};
use crate::ids::Owner;

/// Moves objects together; returns how many.
pub fn compact(_: &Arena, _: usize, _: impl FnMut(Owner, u64, &Allocation) -> bool) -> u64 {
    0
}
