//! The command line: reads arguments, calls the library, prints what it says. Exit status 0 when that went well, 1 when
//! it failed, 2 when the usage or the configuration is wrong.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use ballast::bench::BenchArgs;
use ballast::config::{
    CONFIG_PATH_DEFAULT, CONTROL_SOCKET_NAME, Config, ConfigError, LIMIT_BYTES, RUNTIME_DIR_DEFAULT, WEIGHT,
};
use ballast::control::api::{CHECK_RATE_BYTES_MIN, CheckOrder, PoolChange, VmChange};
use ballast::control::check;
use ballast::control::client::Client;
use ballast::control::table;
use ballast::control::vm_args::{self, Guest, MEMORY_DEFAULT, Vmm};
use ballast::demo::DemoArgs;
use ballast::ids::{Bytes, ParseBytesError};
use ballast::store::codec::Compressor;
use ballast::top::{Shown, TopArgs};
use clap::{Args, Parser, Subcommand};
use indicatif::ProgressBar;
use tracing_subscriber::EnvFilter;

/// Keeps the swapped-out pages of this host's VMs, compressed, in host memory.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true)]
struct Cli {
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
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon until it is killed; the pages outlive it.
    Serve,
    /// Show what is stored and what that saves.
    Status,
    /// Show what the VMs do, once a second.
    Top(TopArgs),
    /// What concerns one VM.
    #[command(subcommand)]
    Vm(VmCommand),
    /// What concerns the memory that all VMs share.
    #[command(subcommand)]
    Pool(PoolCommand),
    /// Look at every stored page of a running daemon, and say which are bad.
    Check {
        /// The only VM to look at.
        name: Option<String>,
        /// Pages to look at in a second, in bytes; at least 1MiB.
        #[arg(long, value_name = "SIZE", default_value_t = check::RATE_DEFAULT, value_parser = parse_rate)]
        rate: Bytes,
    },
    /// Write to a vhost-user disk, read back, compare, and say how fast it was.
    Bench(BenchArgs),
    /// Boot two guests that swap into one daemon, and watch.
    Demo(DemoArgs),
}

#[derive(Debug, Subcommand)]
enum VmCommand {
    /// Print the arguments that a VMM needs, ready to be pasted into a shell.
    Args(VmArgsArgs),
    /// Change a VM's share of the pool until the daemon starts again, which reads the configuration.
    Set(VmSetArgs),
    /// Drop all pages of a powered-off VM.
    Clear {
        /// The VM.
        name: String,
    },
    /// Let the VMM of a quarantined VM attach again; the VM's pages are still there.
    Release {
        /// The VM.
        name: String,
    },
}

#[derive(Debug, Args)]
struct VmSetArgs {
    /// The VM.
    name: String,
    #[command(flatten)]
    values: VmSetValues,
}

/// At least one of them.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct VmSetValues {
    /// Most pool bytes that it may hold.
    #[arg(long, value_name = "SIZE", value_parser = parse_limit)]
    limit: Option<Bytes>,
    /// Pool bytes that it keeps whatever the others need; at most its limit.
    #[arg(long, value_name = "SIZE")]
    reserve: Option<Bytes>,
    /// Its share of the pool against the other VMs', 1 to 10000.
    #[arg(long, value_name = "N", value_parser = parse_weight)]
    weight: Option<u32>,
    /// Whether its pages may move to the writeback file.
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    writeback: Option<bool>,
}

#[derive(Debug, Subcommand)]
enum PoolCommand {
    /// Change the compressor until the daemon starts again, which reads the configuration.
    Set {
        /// What new pages are compressed with: lz4, zstd or zstd:LEVEL.
        #[arg(long, value_name = "C")]
        compressor: Compressor,
        /// Compress the pages that are there again, too, a few at a time.
        #[arg(long)]
        recompress: bool,
    },
}

#[derive(Debug, Args)]
struct VmArgsArgs {
    /// The VM.
    name: String,
    /// What will run it.
    #[arg(long, value_enum)]
    vmm: Vmm,
    /// The guest's memory.
    #[arg(long, value_name = "SIZE", default_value_t = MEMORY_DEFAULT, value_parser = vm_args::parse_memory)]
    memory: Bytes,
    /// The QEMU is older than 9.2 (Debian 12 has 7.2) and knows no reconnect-ms.
    #[arg(long = "qemu-before-9.2")]
    qemu_before_9_2: bool,
}

fn parse_limit(text: &str) -> Result<Bytes, String> {
    let limit: Bytes = text.parse().map_err(|error: ParseBytesError| error.to_string())?;
    let (least, most) = (Bytes(*LIMIT_BYTES.start()), Bytes(*LIMIT_BYTES.end()));
    if LIMIT_BYTES.contains(&limit.0) { Ok(limit) } else { Err(format!("must be from {least} to {most}")) }
}

fn parse_rate(text: &str) -> Result<Bytes, String> {
    let rate: Bytes = text.parse().map_err(|error: ParseBytesError| error.to_string())?;
    let least = Bytes(CHECK_RATE_BYTES_MIN);
    if rate >= least { Ok(rate) } else { Err(format!("must be at least {least}")) }
}

fn parse_weight(text: &str) -> Result<u32, String> {
    let weight = text.parse().ok().filter(|weight| WEIGHT.contains(weight));
    weight.ok_or_else(|| format!("must be a whole number from {} to {}", WEIGHT.start(), WEIGHT.end()))
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    log_to_stderr();
    match run(cli) {
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

fn run(cli: Cli) -> anyhow::Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Serve => Ok(ballast::runtime::serve(global.load_config()?)?),
        Command::Status => status(global),
        Command::Top(args) => top(global, &args),
        Command::Vm(VmCommand::Args(args)) => print_vm_args(global, &args),
        Command::Vm(VmCommand::Set(args)) => set_vm(global, &args),
        Command::Vm(VmCommand::Clear { name }) => clear_vm(global, &name),
        Command::Vm(VmCommand::Release { name }) => release_vm(global, &name),
        Command::Pool(PoolCommand::Set { compressor, recompress }) => {
            set_pool(global, PoolChange { compressor, recompress })
        }
        Command::Check { name, rate } => check_pages(global, name, rate),
        Command::Bench(args) => Ok(ballast::bench::run(&args, global.named_socket()?.as_deref())?),
        Command::Demo(args) => Ok(ballast::demo::run(args)?),
    }
}

impl Global {
    /// The configuration for the commands that can't do without.
    fn load_config(&self) -> Result<Config, ConfigError> {
        Config::load(self.config.as_deref().unwrap_or(CONFIG_PATH_DEFAULT.as_ref()))
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
}

fn status(global: &Global) -> anyhow::Result<()> {
    let status = global.client()?.status()?;
    if global.json { print_json(&status) } else { print(&table::render(&status)) }
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

fn set_vm(global: &Global, VmSetArgs { name, values }: &VmSetArgs) -> anyhow::Result<()> {
    let change = VmChange {
        limit_bytes: values.limit.map(|limit| limit.0),
        reserve_bytes: values.reserve.map(|reserve| reserve.0),
        weight: values.weight,
        writeback: values.writeback,
    };
    let vm = global.client()?.set_vm(name, change)?;
    if global.json { print_json(&vm) } else { print(&table::share(&vm)) }
}

fn set_pool(global: &Global, change: PoolChange) -> anyhow::Result<()> {
    let pool = global.client()?.set_pool(change)?;
    if global.json { print_json(&pool) } else { print(&table::pool(&pool)) }
}

fn clear_vm(global: &Global, name: &str) -> anyhow::Result<()> {
    global.client()?.clear_vm(name)?;
    if global.json {
        print_json(&serde_json::json!({ "cleared": name }))
    } else {
        print(&format!("{name}: all pages are dropped\n"))
    }
}

fn release_vm(global: &Global, name: &str) -> anyhow::Result<()> {
    let vm = global.client()?.release_vm(name)?;
    if global.json { print_json(&vm) } else { print(&format!("{name}: its VMM may attach\n")) }
}

fn check_pages(global: &Global, vm: Option<String>, Bytes(rate_bytes): Bytes) -> anyhow::Result<()> {
    // Shows nothing where stderr is no terminal.
    let bar = ProgressBar::new(0);
    let status = check::run(&global.client()?, &CheckOrder { vm, rate_bytes }, |status| {
        bar.set_length(status.expected_pages.max(status.checked_pages()));
        bar.set_position(status.checked_pages());
    })?;
    bar.finish_and_clear();
    if global.json {
        print_json(&status)?
    } else {
        print(&check::summary(&status))?
    }
    check::verdict(&status).map_or(Ok(()), |verdict| Err(anyhow::anyhow!(verdict)))
}

fn print_vm_args(global: &Global, args: &VmArgsArgs) -> anyhow::Result<()> {
    let config = global.load_config()?;
    let vm = config.vm(&args.name)?;
    let guest = Guest { memory: args.memory, qemu_before_9_2: args.qemu_before_9_2 };
    let args = vm_args::vm_args(vm, &config.socket_path(&vm.name), args.vmm, guest);
    if global.json {
        print_json(&serde_json::json!({ "args": args }))
    } else {
        print(&format!("{}\n", vm_args::shell_lines(&args)))
    }
}

fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&format!("{}\n", serde_json::to_string_pretty(value)?))
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
