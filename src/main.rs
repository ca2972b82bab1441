//! The command line: reads arguments, calls the library, prints what it says. Exit status 0 when that went well, 1 when
//! it failed, 2 when the usage or the configuration is wrong.

mod cli;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use ballast::config::ConfigError;
use clap::Parser;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    log_to_stderr();
    match cli::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Printed by hand: when stderr is gone too, there is nothing left to do, and no reason to panic.
            let _ = writeln!(io::stderr(), "ballast: {error:#}");
            ExitCode::from(if error.chain().any(|cause| cause.is::<ConfigError>()) { 2 } else { 1 })
        }
    }
}

fn log_to_stderr() {
    let filter = EnvFilter::try_from_env("BALLAST_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // Colours only where a person looks: a journal or a file would keep their escapes.
    let colours = io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours).with_writer(io::stderr).init();
}
