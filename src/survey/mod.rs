//! Surveying a VM's stored pages, to say what they are like: how long they have not been used, what each compressor
//! would make of them, what keeping them saves, and what limit the VM needs. Only looks: no age changes, no load is
//! counted, nothing moves. What it costs is bounded by the slots that were ever used, which are walked once without any
//! lock, and by the pages of a sample.
//!
//! Pages come, go and move meanwhile, and what is counted is of no one moment: of a VM that is in use its sums are near
//! those of its numbers, of one that rests they are the same.

mod ages;
mod limit;
mod reservoir;
mod sample;
mod savings;
mod walk;

pub use ages::{Ages, BOUNDS_SECONDS, Pages};
pub use limit::{Fit, Need};
pub use sample::{BadSampled, Sample, Trial, compressors, sample};
pub use savings::{Costs, Savings, Shared};
pub use walk::{Walked, walk};
