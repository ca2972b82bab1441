//! The demo while it runs: one daemon, its guests, and what is shown of them. Whatever ends it, a signal included,
//! ends guests, daemon and directory in that order, which is the order of the fields.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::console::Verdict;
use super::daemon::{Daemon, DaemonSpec};
use super::error::Error;
use super::guest::{Guest, GuestSpec};
use super::process::TICK;
use super::qemu::{Accelerator, Images, Qemu};
use super::scratch::Scratch;
use super::status::Status;
use super::{DemoArgs, interrupt, show};

const NAMES: [&str; 2] = ["web1", "web2"];

/// A demo takes one or two minutes under TCG; this long means that it hangs.
const PATIENCE: Duration = Duration::from_secs(900);

/// How often a terminal is redrawn, and how often a log gets a line.
const REDRAW: Duration = Duration::from_secs(1);
const LOG: Duration = Duration::from_secs(5);

pub(super) struct Scene {
    guests: Vec<Guest>,
    daemon: Daemon,
    _scratch: Scratch,
    screen: Screen,
    peak: Status,
    last: Status,
}

/// What the demo found out.
pub(super) struct Outcome {
    pub(super) verdicts: Vec<(String, Verdict)>,
    pub(super) peak: Status,
    pub(super) last: Status,
}

impl Scene {
    /// Starts the daemon and boots the guests.
    pub(super) fn set(args: &DemoArgs) -> Result<Self, Error> {
        let images = Images::find(&args.images)?;
        let qemu = Qemu::find()?;
        let screen = Screen::new(args.json);
        let accelerator = qemu.accelerator(args.accel, &images)?;
        let scratch = Scratch::new("ballast-demo")?;
        let spec = DaemonSpec {
            executable: std::env::current_exe().map_err(Error::io("find the ballast executable"))?,
            directory: scratch.path().to_owned(),
            vms: NAMES.map(str::to_owned).to_vec(),
            vm_keys: String::new(),
            // Never full: what the guest's memory could hold is left free.
            vm_mib: args.mib + 212,
            compressor: args.compressor.clone(),
            pool_max: None,
            file: None,
        };
        let daemon = Daemon::start(spec.clone())?;
        screen.say(&format!(
            "Two guests of 128MiB ({}) work through {}MiB each; their swap is Ballast.",
            accelerated_by(args.accel, accelerator),
            args.mib
        ));
        let boot = |(seed, name): (usize, &&str)| {
            let parameters = vec![
                ("mib", args.mib.to_string()),
                ("rounds", args.rounds.to_string()),
                ("seed", (seed + 1).to_string()),
                ("serial", format!("ballast-{name}")),
            ];
            let socket = Some(spec.socket(name));
            let of = GuestSpec::new(name, images.clone(), scratch.path());
            Guest::boot(qemu, &GuestSpec { socket, accelerator, parameters, ..of })
        };
        let guests = NAMES.iter().enumerate().map(boot).collect::<Result<_, _>>()?;
        let (peak, last) = (Status::default(), Status::default());
        Ok(Self { guests, daemon, _scratch: scratch, screen, peak, last })
    }

    /// Shows the guests until all have ended.
    pub(super) fn play(mut self) -> Result<Outcome, Error> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            // Asked before the status, so that the last status is one after the last request.
            let ended = self.guests.iter_mut().all(Guest::ended);
            self.look()?;
            if ended {
                break;
            }
            if Instant::now() > deadline {
                return Err(self.stuck());
            }
            self.pause()?;
        }
        let verdicts = self.guests.iter().map(|guest| (guest.name().to_owned(), guest.verdict())).collect();
        self.daemon.stop();
        Ok(Outcome { verdicts, peak: self.peak, last: self.last })
    }

    fn look(&mut self) -> Result<(), Error> {
        self.last = self.daemon.status_or_end()?;
        if self.last.sum().stored_pages > self.peak.sum().stored_pages {
            self.peak = self.last.clone();
        }
        let phrases: Vec<_> =
            self.guests.iter().map(|guest| (guest.name().to_owned(), guest.report().phrase())).collect();
        self.screen.show(&self.last, &phrases);
        Ok(())
    }

    /// Until it is time to look again, or a signal comes.
    fn pause(&self) -> Result<(), Error> {
        let until = Instant::now() + REDRAW;
        while Instant::now() < until {
            interrupt::check()?;
            std::thread::sleep(TICK);
        }
        Ok(())
    }

    fn stuck(&self) -> Error {
        let consoles: Vec<String> = self.guests.iter().map(Guest::last_words).collect();
        Error::Stuck { seconds: PATIENCE.as_secs(), consoles: consoles.join("\n") }
    }
}

fn accelerated_by(wanted: Accelerator, settled: Accelerator) -> &'static str {
    match (wanted, settled) {
        (_, Accelerator::Kvm) => "KVM",
        (Accelerator::Auto, _) => "TCG, because KVM boots no Linux here",
        _ => "TCG",
    }
}

/// Where the demo is watched: redrawn in place on a terminal, a line now and then elsewhere, nothing with `--json`.
struct Screen {
    quiet: bool,
    terminal: bool,
    drawn_lines: usize,
    next_line: Instant,
}

impl Screen {
    fn new(quiet: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        Self { quiet, terminal, drawn_lines: 0, next_line: Instant::now() }
    }

    fn say(&self, text: &str) {
        if !self.quiet {
            println!("{text}");
        }
    }

    fn show(&mut self, status: &Status, phrases: &[(String, String)]) {
        if self.quiet {
        } else if self.terminal {
            let lines = show::table(status, phrases);
            println!("{}{}", show::rewind(self.drawn_lines), lines.join("\n"));
            self.drawn_lines = lines.len();
        } else if Instant::now() >= self.next_line {
            self.next_line = Instant::now() + LOG;
            println!("{}", show::line(status, phrases));
        }
        // A reader that is gone doesn't change what the guests find.
        let _ = std::io::stdout().flush();
    }
}
