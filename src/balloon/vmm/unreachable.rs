//! The states in which a VMM tells or does nothing. What the controller makes of each is its own business; here stands
//! what an operator reads, so each says what to do where there is something to be done.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use crate::balloon::word::Word;

/// Characters of a VMM's own words that are passed on.
const QUOTED_CHARS_MAX: usize = 200;

/// Why a VMM told nothing, or did nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreachable {
    /// Nobody listens, or who did has hung up.
    #[error("the VMM is gone: {}: {why}", socket.display())]
    Gone {
        /// The socket that was tried.
        socket: PathBuf,
        /// How that shows.
        why: String,
    },
    /// Somebody listens, and the system doesn't let us connect.
    #[error(
        "{} may not be connected to ({why}): the daemon's user must be allowed to write to it and to search its directories",
        socket.display()
    )]
    Forbidden {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        why: String,
    },
    /// It is connected, or as good as, and says nothing.
    #[error("the VMM is busy or hangs: it let us wait for {waited_for}")]
    Late {
        /// What didn't come in time.
        waited_for: &'static str,
    },
    /// The guest doesn't run, and so can't give or take memory.
    #[error("the guest doesn't run: its VMM says {state:?}")]
    Paused {
        /// The VMM's word for it.
        state: String,
    },
    /// The guest is on its way from or to another VMM, and is left alone meanwhile.
    #[error("the guest is migrating")]
    Migrating,
    /// Nothing could be squeezed.
    #[error("the VM has no balloon: start its VMM with `{add}`")]
    NoBalloon {
        /// The argument that gives it one.
        add: Cow<'static, str>,
    },
    /// It answered that it can't or won't.
    #[error("the VMM refused {request}: {why}")]
    Refused {
        /// What was asked for.
        request: &'static str,
        /// Its words.
        why: String,
    },
    /// It answered what is no answer, and nothing that comes after it can be trusted to be one.
    #[error("the VMM's answer makes no sense: {what}")]
    Nonsense {
        /// What it said.
        what: String,
    },
    /// It answered, and gave its guest a size that can't be. A guest that lies to its balloon's device makes its VMM say so,
    /// and so do two answers between which memory was unplugged: the next look may find it well.
    #[error("the VMM's answer makes no sense: a guest of {configured_bytes} bytes {what}")]
    Impossible {
        /// Bytes that the guest was booted with.
        configured_bytes: u64,
        /// What is said of them.
        what: String,
    },
}

impl Unreachable {
    /// A word for it, for a status or a metric.
    #[must_use]
    pub fn word(&self) -> Word {
        match self {
            Self::Gone { .. } => Word::VmmGone,
            Self::Forbidden { .. } => Word::VmmForbidden,
            Self::Late { .. } => Word::VmmLate,
            Self::Paused { .. } => Word::Paused,
            Self::Migrating => Word::Migrating,
            Self::NoBalloon { .. } => Word::NoBalloon,
            Self::Refused { .. } => Word::VmmRefused,
            Self::Nonsense { .. } | Self::Impossible { .. } => Word::VmmNonsense,
        }
    }

    /// Whether the connection is of no more use, and the next one is put off.
    pub(super) fn ends_connection(&self) -> bool {
        matches!(self, Self::Gone { .. } | Self::Forbidden { .. } | Self::Late { .. } | Self::Nonsense { .. })
    }

    pub(super) fn hung_up(socket: &Path) -> Self {
        Self::Gone { socket: socket.to_owned(), why: "it hung up".to_owned() }
    }

    /// The memory that a guest has of what it was booted with.
    pub(super) fn check_size(configured_bytes: u64, actual_bytes: u64) -> Result<(), Self> {
        if actual_bytes > 0 && actual_bytes <= configured_bytes {
            return Ok(());
        }
        Err(Self::Impossible { configured_bytes, what: format!("that has {actual_bytes}") })
    }

    /// An answer that is none; its own words within it go through [`quoted`].
    pub(super) fn nonsense(what: impl Into<String>) -> Self {
        Self::Nonsense { what: what.into() }
    }
}

/// A VMM's own words, cut to what fits a line of a log, and without what could forge one.
pub(super) fn quoted(words: &str) -> String {
    let mut quoted: String = words.chars().take(QUOTED_CHARS_MAX).flat_map(char::escape_debug).collect();
    if words.chars().nth(QUOTED_CHARS_MAX).is_some() {
        quoted.push('…');
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmms_words_stay_on_one_line_and_are_cut() {
        assert_eq!(quoted("a\nb\u{1b}[2J"), "a\\nb\\u{1b}[2J");
        let long = quoted(&"é".repeat(300));
        assert_eq!(long.chars().count(), QUOTED_CHARS_MAX + 1);
        assert!(long.ends_with("é…"), "{long}");
    }

    #[test]
    fn a_state_says_what_to_do() {
        let add = "-device virtio-balloon-pci";
        let text = Unreachable::NoBalloon { add: add.into() }.to_string();
        assert_eq!(text, "the VM has no balloon: start its VMM with `-device virtio-balloon-pci`");
        let gone = Unreachable::hung_up(Path::new("/run/qmp.sock"));
        assert_eq!(gone.to_string(), "the VMM is gone: /run/qmp.sock: it hung up");
    }
}
