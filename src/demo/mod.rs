//! The demo: two guests with far more work than memory swap into one daemon, and judge every page themselves. It
//! starts the executable it is part of, in a directory of its own, and leaves nothing behind. Its parts, which the
//! tests that boot guests share: a [`scratch`] directory, a [`daemon`], [`qemu`] and a [`guest`], with the pure
//! [`console`], [`status`] and [`show`] to read and print. It knows the daemon only through its commands.

pub mod console;
pub mod daemon;
mod error;
pub mod guest;
mod interrupt;
pub mod process;
pub mod qemu;
mod scene;
pub mod scratch;
pub mod show;
pub mod status;

use std::path::PathBuf;

use serde_json::json;

pub use error::Error;

use console::Verdict;
use qemu::Accelerator;
use scene::{Outcome, Scene};

/// What to show.
#[derive(Clone, Debug, clap::Args)]
pub struct DemoArgs {
    /// Directory with the guest's vmlinuz and initramfs, as images/make-guest builds them
    #[arg(long, value_name = "DIR", default_value = "images/build")]
    pub images: PathBuf,
    /// Memory that each guest works through, in MiB; it has 128
    #[arg(long, value_name = "MIB", default_value_t = 300, value_parser = clap::value_parser!(u32).range(150..=16384))]
    pub mib: u32,
    /// Times that each guest overwrites some of its pages and checks all
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// The pool's compressor: lz4, zstd or zstd:LEVEL
    #[arg(long, value_name = "CODEC", default_value = "lz4")]
    pub compressor: String,
    /// What executes the guests
    #[arg(long, value_enum, default_value_t = Accelerator::Auto)]
    pub accel: Accelerator,
    /// Print nothing but a report at the end, as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the demo.
///
/// # Errors
/// When something is missing, a guest or the daemon fails, or a signal asks to end.
pub fn run(args: DemoArgs) -> Result<(), Error> {
    interrupt::watch()?;
    let outcome = Scene::set(&args)?.play()?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report(&outcome)).map_err(Error::Print)?);
    } else {
        println!();
        for (name, verdict) in &outcome.verdicts {
            match verdict {
                Verdict::Pass(counts) => println!("{name}: PASS {counts}"),
                Verdict::Fail(why) => println!("{name}: FAIL {}", why.lines().next().unwrap_or_default()),
            }
        }
        println!("{}", show::summary(&outcome.peak, &outcome.last));
    }
    judge(&outcome)
}

/// Both sides must be content: the guests with their pages, the daemon with their requests.
fn judge(outcome: &Outcome) -> Result<(), Error> {
    let failed = |(name, verdict): &(String, Verdict)| match verdict {
        Verdict::Pass(_) => None,
        Verdict::Fail(why) => Some(format!("{name} failed: {why}")),
    };
    let guests: Vec<String> = outcome.verdicts.iter().filter_map(failed).collect();
    if !guests.is_empty() {
        return Err(Error::Guests { guests });
    }
    match outcome.last.sum().errors {
        0 => Ok(()),
        errors => Err(Error::FailedRequests { errors }),
    }
}

fn report(outcome: &Outcome) -> serde_json::Value {
    let vms = outcome.verdicts.iter().map(|(name, verdict)| {
        let peak = outcome.peak.vm(name).cloned().unwrap_or_default();
        let last = outcome.last.vm(name).cloned().unwrap_or_default();
        let (passed, said) = match verdict {
            Verdict::Pass(counts) => (true, counts),
            Verdict::Fail(why) => (false, why),
        };
        json!({
            "name": name, "passed": passed, "said": said,
            "peak": {
                "stored_pages": peak.stored_pages, "same_filled_pages": peak.same_filled_pages,
                "pool_bytes": peak.pool_bytes, "saved_bytes": peak.saved_bytes(),
            },
            "stores": last.stores, "loads": last.loads, "invalidates": last.invalidates, "errors": last.errors,
        })
    });
    json!({ "passed": judge(outcome).is_ok(), "vms": vms.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use status::{Status, VmStatus};

    fn outcome(verdict: Verdict, errors: u64) -> Outcome {
        let vm = VmStatus { name: "web1".to_owned(), errors, ..VmStatus::default() };
        let last = Status { vms: vec![vm], ..Status::default() };
        Outcome { verdicts: vec![("web1".to_owned(), verdict)], peak: Status::default(), last }
    }

    #[test]
    fn the_demo_passes_only_if_guests_and_daemon_are_content() {
        let pass = Verdict::Pass("bad=0".to_owned());
        assert!(judge(&outcome(pass.clone(), 0)).is_ok());
        assert!(matches!(judge(&outcome(pass, 3)), Err(Error::FailedRequests { errors: 3 })));
        let error = judge(&outcome(Verdict::Fail("bad=1".to_owned()), 0)).expect_err("wrong pages");
        assert_eq!(error.to_string(), "web1 failed: bad=1");
    }

    #[test]
    fn the_report_says_what_the_exit_status_says() {
        let report = report(&outcome(Verdict::Pass("bad=0".to_owned()), 1));
        assert_eq!(report["passed"], false);
        assert_eq!(report["vms"][0]["passed"], true);
        assert_eq!(report["vms"][0]["errors"], 1);
    }
}
