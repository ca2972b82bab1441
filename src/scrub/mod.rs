//! Scrubbing: looking at stored pages before their guests do, at a bounded rate. Somebody asks for a check of one VM or
//! all, or the configuration asks for a round in so many days; one thread does both, a few pages at a time, each copied
//! out under its VM's lock as a load does. It only reads: a bad page is counted, told once, and left as it is.
//!
//! A check goes on when its client is gone, and ends by itself or by the next one's beginning.

mod pace;
mod progress;
mod scrubber;
mod walk;

pub use progress::{BAD_SHOWN_MAX, BadPage, Order, Progress, State};
pub use scrubber::{Handle, Scrubber, UnknownVm};
