//! Numbered points at which the daemon may be made to die: one after every change of a file that outlives it, whether a
//! store into a mapped file, a write, or a name that appears or goes. Tests start it with `BALLAST_CRASH_AFTER=N`, and it
//! kills itself with SIGKILL when the N-th point is passed, so that no two changes are too close to be torn apart. Only
//! builds with debug assertions have them; in others nothing of this is left.

#![cfg_attr(debug_assertions, allow(unsafe_code))]

/// The environment variable that says how many points are passed before the process dies.
pub const CRASH_AFTER: &str = "BALLAST_CRASH_AFTER";

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

#[cfg(debug_assertions)]
mod armed {
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
}
