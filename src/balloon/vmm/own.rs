//! A VM whose balloon is the daemon's own device: no VMM is asked anything. What the device sees is what there is to see,
//! and a new size is said to the guest's driver through the channel that its VMM has handed over.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{GuestMemory, GuestStats, Unreachable, VmmClient};
use crate::device::balloon::{Balloon, Stats, Told};

/// What a change is called where it is refused.
const RESIZING: &str = "another size of the balloon";

/// A client of one balloon of ours.
pub struct Own {
    balloon: Arc<Balloon>,
    /// What gives a VM of cloud-hypervisor this balloon.
    argument: String,
    /// Whether the guest that has it was told a size.
    told: bool,
}

impl Own {
    /// Looks at this balloon, which is to be attached at `socket`, and changes it.
    #[must_use]
    pub fn new(balloon: Arc<Balloon>, socket: &Path) -> Self {
        let argument =
            format!("--generic-vhost-user socket={},device_type=5,queue_sizes=[128,128]", socket.display());
        Self { balloon, argument, told: false }
    }

    fn missing(&self) -> Unreachable {
        Unreachable::NoBalloon { add: self.argument.clone().into() }
    }
}

impl VmmClient for Own {
    /// The guest is asked for statistics as well, which are in a later look.
    fn look(&mut self, _now: Instant) -> Result<GuestMemory, Unreachable> {
        let seen = self.balloon.look();
        if !seen.attached {
            return Err(self.missing());
        }
        if self.told && seen.target_bytes.is_none() {
            // What was said holds no more, and whoever said it is to know.
            self.told = false;
            return Err(Unreachable::Late { waited_for: "another guest, which has just booted" });
        }
        self.balloon.ask_stats();
        let (configured_bytes, said) = (seen.configured_bytes, seen.actual_bytes);
        let balloon_bytes =
            said.ok_or(Unreachable::Late { waited_for: "the guest's word on its balloon" })?;
        match configured_bytes.checked_sub(balloon_bytes).filter(|left| *left > 0) {
            Some(actual_bytes) => {
                let guest =
                    seen.stats.map(|(stats, age)| said_of_itself(stats, age, seen.numbers.statistics));
                Ok(GuestMemory { configured_bytes, actual_bytes, guest })
            }
            None => {
                let what = format!("that has given up {balloon_bytes}");
                Err(Unreachable::Impossible { configured_bytes, what })
            }
        }
    }

    fn set_target(&mut self, bytes: u64, _now: Instant) -> Result<(), Unreachable> {
        let seen = self.balloon.look();
        if !seen.attached {
            return Err(self.missing());
        }
        let refused = |why: String| Unreachable::Refused { request: RESIZING, why };
        match self.balloon.set_target(seen.configured_bytes.saturating_sub(bytes)) {
            Ok(Told::Now) => {
                self.told = true;
                Ok(())
            }
            // It went away between the two.
            Ok(Told::Later) => Err(self.missing()),
            Ok(Told::Unasked) => Err(refused(
                "its VMM has handed over no channel by which its guest could be told (VHOST_USER_SET_BACKEND_REQ_FD)"
                    .to_owned(),
            )),
            Err(too_large) => Err(refused(too_large.to_string())),
        }
    }
}

fn said_of_itself(stats: Stats, age: Duration, update: u64) -> GuestStats {
    GuestStats {
        age,
        update: Some(update),
        available_bytes: stats.available_bytes,
        free_bytes: stats.free_bytes,
        total_bytes: stats.total_bytes,
        major_faults: stats.major_faults,
        swap_in_bytes: stats.swap_in_bytes,
        swap_out_bytes: stats.swap_out_bytes,
        oom_kills: stats.oom_kills,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::balloon::Word;
    use crate::device::vm::DeviceVm;

    #[test]
    fn a_vm_whose_balloon_nobody_has_attached_says_how_it_is_given_one() {
        let vm = Arc::new(DeviceVm::new("web1", 1, false, None));
        let mut own = Own::new(Arc::new(Balloon::new(vm)), Path::new("/run/b/balloon/web1.sock"));
        let now = Instant::now();
        let looked = own.look(now).unwrap_err();
        assert_eq!(own.set_target(1 << 30, now), Err(looked.clone()));
        assert_eq!(looked.word(), Word::NoBalloon);
        assert!(looked.to_string().contains("socket=/run/b/balloon/web1.sock,device_type=5"), "{looked}");
    }
}
