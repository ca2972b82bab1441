//! The commands: clap's subcommands to calls of the library, and what is printed of their answers.

mod balloon;
mod parse;
mod report;
mod vm;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::Context;
use ballast::bench::BenchArgs;
use ballast::config::{CONFIG_PATH_DEFAULT, CONTROL_SOCKET_NAME, Config, ConfigError, RUNTIME_DIR_DEFAULT};
use ballast::control::api::{CheckOrder, PoolChange, Reloading};
use ballast::control::client::Client;
use ballast::control::{check, listing, table};
use ballast::demo::DemoArgs;
use ballast::ids::Bytes;
use ballast::logging::LogArgs;
use ballast::store::codec::Compressor;
use ballast::top::{Shown, TopArgs};
use clap::{Args, CommandFactory, Parser, Subcommand};
use indicatif::ProgressBar;

const AFTER_HELP: &str = "\
Examples:
  ballast vm add web1 --size 8GiB --limit 2GiB
  ballast vm args web1 --vmm qemu
  ballast top
  ballast pool set --compressor zstd:3 --recompress
  ballast status --json

Sizes are numbers with an IEC unit: 512MiB, 1.5GiB.

Exit status: 0 ok, 1 failed, 2 wrong usage or configuration.

Files: /etc/ballast/ballast.toml, the configuration; /run/ballast/control.sock, where the daemon takes orders; \
/run/ballast/VM.sock, where a VM attaches.";

/// Keeps the swapped-out pages of this host's VMs, compressed, in host memory.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = AFTER_HELP)]
pub struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every command takes.
#[derive(Debug, Args)]
struct Global {
    /// The daemon's control socket [default: control.sock in the runtime directory].
    // Its id isn't "socket": `bench SOCKET` is another thing.
    #[arg(id = "control-socket", long = "socket", value_name = "S", global = true)]
    control_socket: Option<PathBuf>,
    /// The configuration [default of serve and vm args: /etc/ballast/ballast.toml].
    #[arg(long, value_name = "F", global = true)]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(flatten)]
    log: LogArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until it is killed; the pages outlive it.
    Serve,
    /// Show what is stored and what that saves.
    Status,
    /// Show what the VMs do, once a second.
    Top(TopArgs),
    /// Show what stored pages are like: how old, how dense by which compressor, and what limit each VM needs.
    Report(report::ReportArgs),
    /// What concerns one VM.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// What concerns the memory that all VMs share.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Have the daemon read its configuration again, as SIGHUP does, and show what that changes.
    Reload {
        /// Only show what it would change.
        #[arg(long)]
        check: bool,
    },
    /// Look at every stored page of a running daemon, and say which are bad.
    Check {
        /// The only VM to look at.
        name: Option<String>,
        /// Pages to look at in a second, in bytes; at least 1MiB.
        #[arg(long, value_name = "SIZE", default_value_t = check::RATE_DEFAULT, value_parser = parse::rate)]
        rate: Bytes,
    },
    /// Write to a vhost-user disk, read back, compare, and say how fast it was.
    Bench(BenchArgs),
    /// Boot two guests that swap into one daemon, and watch.
    Demo(DemoArgs),
    /// Make the decisions of a trace again, and say which would be others.
    Replay {
        /// The trace: balloon.trace in the state directory, or what `simulate --json` printed.
        file: PathBuf,
    },
    /// Run the balloon policy on guests that are not there.
    Simulate {
        /// What happens to them; without it, the stories are listed.
        scenario: Option<String>,
    },
    /// Print what completes commands in a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Write a manual page for each command.
    #[command(hide = true)]
    Man {
        /// Where they go.
        directory: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Change the compressor, which is remembered and goes before the configuration's.
    Set {
        /// What new pages are compressed with: lz4, zstd or zstd:LEVEL.
        #[arg(long, value_name = "C", required_unless_present_any = ["forget", "recompress"], conflicts_with = "forget")]
        compressor: Option<Compressor>,
        /// Compress the pages that are there again, too, a few at a time; by itself, with the compressor that there is.
        #[arg(long)]
        recompress: bool,
        /// Only until the daemon starts again.
        #[arg(long)]
        runtime: bool,
        /// Go back to what the configuration says.
        #[arg(long)]
        forget: bool,
    },
}

/// Does what the command line says.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Serve => Ok(ballast::runtime::serve(global.load_config()?)?),
        Command::Status => status(global),
        Command::Top(args) => top(global, &args),
        Command::Report(args) => report::run(global, args),
        Command::Vm(command) => vm::run(global, command),
        Command::Pool(PoolCommand::Set { compressor, recompress, runtime, forget }) => {
            set_pool(global, PoolChange { compressor, recompress, runtime, forget })
        }
        Command::Reload { check } => reload(global, Reloading { check }),
        Command::Check { name, rate } => check_pages(global, name, rate),
        Command::Bench(args) => Ok(ballast::bench::run(&args, global.named_socket()?.as_deref())?),
        Command::Demo(args) => Ok(ballast::demo::run(args)?),
        Command::Replay { file } => balloon::replay(global, &file),
        Command::Simulate { scenario } => balloon::simulate(global, scenario.as_deref()),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ballast", &mut text);
            print(&String::from_utf8(text)?)
        }
        Command::Man { directory } => {
            clap_mangen::generate_to(Cli::command(), &directory).with_context(|| {
                let directory = directory.display();
                format!("the manual pages can't be written to {directory}: name a directory that exists")
            })
        }
    }
}

impl Cli {
    /// What the log tells, and how.
    pub fn logging(&self) -> LogArgs {
        self.global.log
    }
}

impl Global {
    /// The configuration for the commands that can't do without.
    fn load_config(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref().unwrap_or(CONFIG_PATH_DEFAULT.as_ref()))
    }

    /// Whether the options name a daemon and no configuration.
    fn names_only_a_socket(&self) -> bool {
        self.control_socket.is_some() && self.config.is_none()
    }

    /// The control socket that the options name.
    fn named_socket(&self) -> Result<Option<PathBuf>, ConfigError> {
        match (&self.control_socket, &self.config) {
            (Some(socket), _) => Ok(Some(socket.clone())),
            (None, Some(config)) => Ok(Some(Config::load(config)?.control_socket())),
            (None, None) => Ok(None),
        }
    }

    /// A client of the daemon that the options name, or of the usual one.
    fn client(&self) -> anyhow::Result<Client> {
        let default = || PathBuf::from(RUNTIME_DIR_DEFAULT).join(CONTROL_SOCKET_NAME);
        let socket = self.named_socket()?.unwrap_or_else(default);
        Client::new(socket).context("the client's event loop can't be made")
    }

    /// Prints an answer as it is, or what a person is to read of it.
    fn show(&self, answer: &impl serde::Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            print(&format!("{}\n", serde_json::to_string_pretty(answer)?))
        } else {
            print(&text())
        }
    }
}

fn status(global: &Global) -> anyhow::Result<()> {
    let status = global.client()?.status()?;
    global.show(&status, || table::render(&status))
}

fn top(global: &Global, args: &TopArgs) -> anyhow::Result<()> {
    // See no-color.org.
    let colours = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let shown = match (global.json, io::stdout().is_terminal()) {
        (true, _) => Shown::Json,
        (false, true) => Shown::Screen { colours },
        (false, false) => Shown::Lines,
    };
    Ok(ballast::top::run(args, global.client()?, shown)?)
}

fn set_pool(global: &Global, change: PoolChange) -> anyhow::Result<()> {
    let pool = global.client()?.set_pool(change)?;
    global.show(&pool, || table::pool(&pool))
}

fn reload(global: &Global, reloading: Reloading) -> anyhow::Result<()> {
    let report = global.client()?.reload(reloading)?;
    global.show(&report, || listing::reload(&report))?;
    listing::failures(&report).map_or(Ok(()), |failures| Err(anyhow::anyhow!(failures)))
}

fn check_pages(global: &Global, vm: Option<String>, Bytes(rate_bytes): Bytes) -> anyhow::Result<()> {
    // Shows nothing where stderr is no terminal.
    let bar = ProgressBar::new(0);
    let status = check::run(&global.client()?, &CheckOrder { vm, rate_bytes }, |status| {
        bar.set_length(status.expected_pages.max(status.checked_pages()));
        bar.set_position(status.checked_pages());
    })?;
    bar.finish_and_clear();
    global.show(&status, || check::summary(&status))?;
    check::verdict(&status).map_or(Ok(()), |verdict| Err(anyhow::anyhow!(verdict)))
}

/// Writes to stdout. A reader that has seen enough (`ballast status | head -1`) is no failure.
fn print(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("stdout can't be written")
        }
        _ => Ok(()),
    }
}
