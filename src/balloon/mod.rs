//! The balloon side: guests give up memory that they don't use, before anybody is short of it. A pure policy turns what
//! is known of a VM and of the host into a target for its balloon, and a client of its VMM carries that out. The guest's
//! own LRU then pushes its coldest pages to the VM's disk, where they are compressed. The idea is that of Senpai (squeeze
//! until it begins to hurt, back off at once) with the promotion rate of far memory as the measure of pain.

mod bounds;
mod decision;
mod elsewhere;
mod given;
mod mode;
mod pace;
mod policy;
mod room;
mod share;
mod signals;
pub mod simulate;
mod snapshot;
mod state;
pub mod trace;
pub mod vmm;
mod wish;
mod word;

pub use self::decision::{Decision, Distress, Hold, Reason};
pub use self::given::{Change, Given};
pub use self::mode::Mode;
pub use self::share::decide_all;
pub use self::signals::Look;
pub use self::snapshot::{Counters, Held, Host, Pressure, Silence, Snapshot, Vmm};
pub use self::state::State;
pub use self::word::Word;
