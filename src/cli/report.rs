//! `ballast report`: what stored pages are like, as text or JSON, and as a picture.

use std::fs;
use std::path::PathBuf;

use anyhow::Context;
use ballast::control::api::{Reporting, SAMPLE_PAGES, SAMPLE_PAGES_DEFAULT};
use ballast::report::{picture, text};
use clap::Args;

use super::Global;

#[derive(Debug, Args)]
pub struct ReportArgs {
    /// The only VM to look at.
    #[arg(long, value_name = "NAME")]
    vm: Option<String>,
    /// Pages of each VM to try the compressors on, 0 to 8192.
    #[arg(long, value_name = "N", default_value_t = SAMPLE_PAGES_DEFAULT,
        value_parser = clap::value_parser!(u32).range(i64::from(*SAMPLE_PAGES.start())..=i64::from(*SAMPLE_PAGES.end())))]
    sample: u32,
    /// Draw it, too, as an SVG picture of all VMs.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Asks, draws, and shows.
pub fn run(global: &Global, args: ReportArgs) -> anyhow::Result<()> {
    let reporting = Reporting { vm: args.vm, sample_pages: Some(args.sample) };
    let report = global.client()?.report(&reporting)?;
    global.show(&report, || text(&report))?;
    match &args.svg {
        Some(path) => fs::write(path, picture(&report)).with_context(|| {
            format!(
                "the picture can't be written to {}: name a file that can be, in a directory that exists",
                path.display()
            )
        }),
        None => Ok(()),
    }
}
