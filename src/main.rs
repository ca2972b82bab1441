//! The command line: reads arguments, calls the library, prints what it says. Exit status 0 when that went well, 1 when
//! it failed, 2 when the usage or the configuration is wrong.

mod cli;

use std::io::{self, Write};
use std::process::ExitCode;

use ballast::config::ConfigError;
use clap::Parser;

fn main() -> ExitCode {
    end_at_panics();
    let cli = cli::Cli::parse();
    ballast::logging::start(cli.logging());
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Printed by hand: when stderr is gone too, there is nothing left to do, and no reason to panic.
            let _ = writeln!(io::stderr(), "ballast: {error:#}");
            ExitCode::from(if error.chain().any(|cause| cause.is::<ConfigError>()) { 2 } else { 1 })
        }
    }
}

/// A broken invariant of ours ends the process, however it was built: recovery is the one path back (crash-only).
fn end_at_panics() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}
