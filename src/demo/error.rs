//! Why a demo, or a guest of the tests, came to nothing; always with what the reader can do or look at next.

use std::path::PathBuf;
use std::process::ExitStatus;

/// Why it failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something that must be there before a guest can boot isn't.
    #[error(
        "{what} is missing: `images/demo` and `tests/run`, in Ballast's source tree, install and build it"
    )]
    Missing {
        /// The program or file.
        what: String,
    },
    /// The kernel refused something.
    #[error("can't {action}")]
    Io {
        /// What was tried.
        action: String,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// QEMU's version decides how it reconnects.
    #[error("can't tell QEMU's version from {given:?}")]
    QemuVersion {
        /// What it printed.
        given: String,
    },
    /// The daemon ended, or never got ready.
    #[error("the daemon {what}; it last said:\n{log}")]
    Daemon {
        /// What it did.
        what: String,
        /// The end of its log.
        log: String,
    },
    /// A client command failed.
    #[error("`ballast {command}` ended with {status}: {stderr}")]
    Command {
        /// The command.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// `ballast status` printed something else than a status.
    #[error("the status has no number at {pointer}")]
    StatusField {
        /// Where it was looked for, as a JSON pointer.
        pointer: String,
    },
    /// `ballast status` printed no JSON.
    #[error("the status is not JSON")]
    StatusSyntax(#[source] serde_json::Error),
    /// Guests found wrong pages, or did not get that far.
    #[error("{}", .guests.join("\n"))]
    Guests {
        /// A paragraph for each guest that failed.
        guests: Vec<String>,
    },
    /// Everything looked right to the guests, but not to the daemon.
    #[error("the daemon counted {errors} failed requests")]
    FailedRequests {
        /// Requests that were answered with an error.
        errors: u64,
    },
    /// It took so long that it can only hang.
    #[error("still not done after {seconds} s; the guests last said:\n{consoles}")]
    Stuck {
        /// The limit.
        seconds: u64,
        /// The ends of their consoles.
        consoles: String,
    },
    /// Ctrl-C, or another signal that asks to end.
    #[error("interrupted")]
    Interrupted,
    /// The report could not be printed.
    #[error("can't print the report")]
    Print(#[source] serde_json::Error),
}

impl Error {
    /// An I/O error, with what was tried.
    pub(super) fn io(action: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let action = action.into();
        move |source| Self::Io { action, source }
    }

    /// A file that an earlier step would have made.
    pub(super) fn missing(path: PathBuf) -> Self {
        Self::Missing { what: path.display().to_string() }
    }
}
