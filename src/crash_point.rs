//! Numbered points at which the daemon may be made to die: one after every change of a file that outlives it, whether a
//! store into a mapped file, a write, or a name that appears or goes. Tests start it with `BALLAST_CRASH_AFTER=N`, and it
//! kills itself with SIGKILL when the N-th point is passed, so that no two changes are too close to be torn apart. Only
//! builds with debug assertions have them; in others nothing of this is left.

#![cfg_attr(debug_assertions, allow(unsafe_code))]

/// The environment variable that says how many points are passed before the process dies.
pub const CRASH_AFTER: &str = "BALLAST_CRASH_AFTER";

/// The environment variable that makes the daemon crash by its own doing at a store: `VM:SLOT:HOW`, where `HOW` is
/// `abort`, `panic` or `overflow` (of the stack); or `forbidden`, which has the worker try what it may not do, and crash if
/// it may.
pub const CRASH_STORING: &str = "BALLAST_CRASH_STORING";

/// The environment variable that makes the daemon crash when a VMM says how long a queue is: `VM:HOW`, as above.
pub const CRASH_HEARING: &str = "BALLAST_CRASH_HEARING";

/// Something that outlives the process was changed just now.
#[inline]
pub fn passed() {
    #[cfg(debug_assertions)]
    armed::passed();
}

/// Passes a point when `result` says that something was changed.
///
/// # Errors
/// The one it was given.
#[inline]
pub fn after<T, E>(result: Result<T, E>) -> Result<T, E> {
    result.inspect(|_| passed())
}

/// Pages are about to be stored in these slots of a VM's.
#[inline]
pub fn storing(vm: &str, slots: std::ops::Range<u64>) {
    #[cfg(debug_assertions)]
    armed::storing(vm, &slots);
    let _ = (vm, slots);
}

/// A VM's VMM has said something.
#[inline]
pub fn hearing(vm: &str) {
    #[cfg(debug_assertions)]
    armed::hearing(vm);
    let _ = vm;
}

#[cfg(debug_assertions)]
mod armed {
    use std::hint::black_box;
    use std::ops::Range;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static PASSED: AtomicU64 = AtomicU64::new(0);
    static LAST: OnceLock<u64> = OnceLock::new();

    fn last() -> u64 {
        let Ok(text) = std::env::var(super::CRASH_AFTER) else { return u64::MAX };
        text.parse().unwrap_or_else(|err| panic!("{}={text}: {err}", super::CRASH_AFTER))
    }

    pub(super) fn passed() {
        let last = *LAST.get_or_init(last);
        let count = PASSED.fetch_add(1, Ordering::Relaxed) + 1;
        if count >= last {
            // Not `kill`, which workers may not call. Other threads get no further than the kernel lets them, as when
            // somebody else kills the process.
            // SAFETY: raising a signal at oneself touches no memory; it does not come back.
            unsafe { libc::raise(libc::SIGKILL) };
        }
    }
    /// A VM, one of its slots, and how to crash there.
    type Told = (String, u64, String);

    static TOLD: OnceLock<Option<Told>> = OnceLock::new();

    fn told() -> Option<Told> {
        let text = std::env::var(super::CRASH_STORING).ok()?;
        let parts: Vec<&str> = text.split(':').collect();
        let parsed = match parts[..] {
            [vm, slot, how] => slot.parse().ok().map(|slot| (vm.to_owned(), slot, how.to_owned())),
            _ => None,
        };
        Some(parsed.unwrap_or_else(|| panic!("{}={text}: VM:SLOT:HOW", super::CRASH_STORING)))
    }

    pub(super) fn storing(vm: &str, slots: &Range<u64>) {
        let Some((told_vm, slot, how)) = TOLD.get_or_init(told) else { return };
        if told_vm == vm && slots.contains(slot) {
            crash(how);
        }
    }

    pub(super) fn hearing(vm: &str) {
        let Ok(text) = std::env::var(super::CRASH_HEARING) else { return };
        let (told_vm, how) = text.split_once(':').unwrap_or_else(|| panic!("{text}: VM:HOW"));
        if told_vm == vm {
            crash(how);
        }
    }

    fn crash(how: &str) {
        match how {
            "panic" => panic!("told to"),
            "forbidden" => try_what_is_forbidden(),
            "overflow" => drop(black_box(overflow([7; 64]))),
            _ => std::process::abort(),
        }
    }

    fn try_what_is_forbidden() {
        let tried = [
            ("socket", std::net::TcpListener::bind("127.0.0.1:0").map(drop)),
            ("file", std::fs::File::open("/etc/passwd").map(drop)),
            ("program", std::process::Command::new("/bin/true").status().map(drop)),
        ];
        for (what, result) in tried {
            let refused = result.is_err_and(|err| err.kind() == std::io::ErrorKind::PermissionDenied);
            assert!(refused, "a worker gets a {what}");
        }
        tracing::warn!("a worker tried what is forbidden, and was refused");
    }

    #[allow(unconditional_recursion, reason = "that is how a stack overflows")]
    fn overflow(mut frame: [u64; 64]) -> [u64; 64] {
        frame[0] = frame[0].wrapping_add(1);
        let mut deeper = overflow(black_box(frame));
        deeper[1] = deeper[1].wrapping_add(frame[0]);
        deeper
    }
}
