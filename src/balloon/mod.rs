//! The balloon side: guests give up memory that they don't use, before anybody is short of it. A pure policy turns what
//! is known of a VM and of the host into a target for its balloon, and a client of its VMM carries that out. The guest's
//! own LRU then pushes its coldest pages to the VM's disk, where they are compressed. The idea is that of Senpai (squeeze
//! until it begins to hurt, back off at once) with the promotion rate of far memory as the measure of pain.

mod mode;
pub mod vmm;

pub use self::mode::Mode;
