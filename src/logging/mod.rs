//! Where the log goes and how it looks: for a person on a terminal, the same without colours into a pipe, JSON lines when
//! asked for, and with fields of its own into systemd's journal. A line that concerns one VM has the field `vm`.

mod journal;

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;

use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt};

use journal::Journal;

/// What the log tells, and how.
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct LogArgs {
    /// Log more; twice: everything. The environment's BALLAST_LOG, a filter such as "debug" or "ballast::device=trace",
    /// goes before.
    #[arg(short, long, action = clap::ArgAction::Count, global = true, conflicts_with = "quiet")]
    pub verbose: u8,
    /// Log only warnings; twice: only errors.
    #[arg(short, long, action = clap::ArgAction::Count, global = true)]
    pub quiet: u8,
    /// Log JSON, a line each, instead of text or the journal's fields.
    #[arg(long, global = true)]
    pub log_json: bool,
}

/// Logs to stderr from now on, or to the journal when that is what stderr is.
pub fn start(args: LogArgs) {
    let asked = EnvFilter::try_from_env("BALLAST_LOG");
    let misspelt =
        asked.as_ref().err().filter(|_| std::env::var_os("BALLAST_LOG").is_some()).map(ToString::to_string);
    let filter = asked.unwrap_or_else(|_| EnvFilter::new(filter(args)));
    let output: Box<dyn Layer<Registry> + Send + Sync> = if args.log_json {
        Box::new(fmt::layer().json().flatten_event(true).with_writer(io::stderr))
    } else if let Some(journal) = journal_of_stderr() {
        Box::new(journal)
    } else {
        // Colours only where a person looks: a file would keep their escapes.
        Box::new(fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr))
    };
    tracing_subscriber::registry().with(output.with_filter(filter)).init();
    if let Some(err) = misspelt {
        tracing::warn!(
            err,
            "BALLAST_LOG is not understood and ignored: for example \"debug\", or \"ballast::device=trace,info\""
        );
    }
}

/// What is told where the environment says nothing. Other people's libraries tell a level less.
fn filter(args: LogArgs) -> &'static str {
    match (args.verbose, args.quiet) {
        (0, 0) => "info",
        (1, _) => "info,ballast=debug",
        (2.., _) => "debug,ballast=trace",
        (0, 1) => "warn",
        (0, 2..) => "error",
    }
}

/// The journal, if stderr leads there. When it can't be spoken to, stderr still leads there.
fn journal_of_stderr() -> Option<Journal> {
    let named = std::env::var("JOURNAL_STREAM").ok()?;
    let stderr = io::stderr();
    let found = rustix::fs::fstat(stderr.as_fd()).ok()?;
    is_stream(&named, found.st_dev, found.st_ino)
        .then(|| Journal::connect(journal::SOCKET.as_ref()).ok())
        .flatten()
}

/// Whether systemd's JOURNAL_STREAM ("device:inode") names this file: a child whose stderr was led elsewhere has the
/// variable, too.
fn is_stream(named: &str, device: u64, inode: u64) -> bool {
    named == format!("{device}:{inode}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_tells_more_and_other_libraries_tell_less() {
        let args = |verbose, quiet| LogArgs { verbose, quiet, log_json: false };
        assert_eq!(filter(LogArgs::default()), "info");
        assert_eq!(filter(args(1, 0)), "info,ballast=debug");
        assert_eq!(filter(args(9, 0)), "debug,ballast=trace");
        assert_eq!((filter(args(0, 1)), filter(args(0, 2))), ("warn", "error"));
    }

    #[test]
    fn only_the_stream_that_systemd_named_is_the_journal() {
        assert!(is_stream("8:123", 8, 123));
        for other in ["8:124", "9:123", "", "8", "8:123:1", "x:y"] {
            assert!(!is_stream(other, 8, 123), "{other}");
        }
    }
}
