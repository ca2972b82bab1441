//! What leaves the pool, when and why.

pub mod pressure;
