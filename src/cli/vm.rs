//! What concerns one VM.

use std::path::PathBuf;

use anyhow::Context;
use ballast::config::VmConfig;
use ballast::control::api::{
    Clearing, MigrationName, NewVm, Removal, Squeeze, SqueezeMode, VmChange, VmDetails, VmState,
};
use ballast::control::client::ClientError;
use ballast::control::vm_args::{self, Format, Guest, MEMORY_DEFAULT, Vmm, Wanted};
use ballast::control::{listing, table};
use ballast::ids::Bytes;
use clap::builder::PossibleValue;
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Subcommand, ValueEnum};

use super::{Global, parse};

#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Add a VM: its socket is there at once, and the others notice nothing.
    Add(AddArgs),
    /// Remove a VM, with its socket and its pages.
    Remove {
        /// The VM.
        name: String,
        /// Also one that is connected, whose VMM is hung up on, or that holds pages, which are dropped.
        #[arg(long)]
        force: bool,
        /// Only until the daemon starts again; a VM of the configuration is also back with the next reload.
        #[arg(long)]
        runtime: bool,
    },
    /// Show all VMs.
    List,
    /// Show one VM, and where each of its values comes from.
    Show {
        /// The VM.
        name: String,
    },
    /// Print what a VMM needs, ready to be pasted: arguments, JSON or XML, with what it can't do as comments.
    Args(VmArgsArgs),
    /// Say who decides how much memory the guest has; the rest of its squeeze stays.
    Squeeze(SqueezeArgs),
    /// Change a VM, which is remembered and goes before the configuration's values.
    Set(SetArgs),
    /// Drop all pages of a powered-off VM.
    Clear {
        /// The VM.
        name: String,
        /// Also one that is connected: its VMM is hung up on.
        #[arg(long)]
        force: bool,
    },
    /// Let the VMM of a quarantined VM attach again; the VM's pages are still there.
    Release {
        /// The VM.
        name: String,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Example, a VM that may push out 8 GiB, takes at most 2 GiB of the pool for them, and keeps a quarter whatever the others need:
  ballast vm add web1 --size 8GiB --limit 2GiB --reserve 512MiB")]
pub struct AddArgs {
    /// The VM: 1 to 64 letters, digits, dots, underscores and dashes.
    name: String,
    /// The disk that the guest sees.
    #[arg(long, value_name = "SIZE")]
    size: Bytes,
    #[command(flatten)]
    share: Share,
    /// Virtqueues; a VM has no use for more than it has vCPUs.
    #[arg(long, value_name = "N")]
    queues: Option<u16>,
    /// Where its guest may move to while it runs.
    #[arg(long, value_name = "none|same-host", value_enum, hide_possible_values = true)]
    migration: Option<MigrationName>,
    /// What the guest's fstab calls the disk.
    #[arg(long)]
    label: Option<String>,
    /// The disk's UUID.
    #[arg(long)]
    uuid: Option<String>,
    /// Forget the VM when the daemon starts again; its pages are kept then.
    #[arg(long)]
    runtime: bool,
}

/// What can be changed while the VM is served.
#[derive(Debug, Args)]
struct Share {
    /// Most pool bytes that it may hold.
    #[arg(long, value_name = "SIZE", value_parser = parse::limit)]
    limit: Option<Bytes>,
    /// Pool bytes that it keeps whatever the others need; at most its limit.
    #[arg(long, value_name = "SIZE")]
    reserve: Option<Bytes>,
    /// Its share of the pool against the other VMs', 1 to 10000.
    #[arg(long, value_name = "N", value_parser = parse::weight)]
    weight: Option<u32>,
    /// Whether its pages may move to the writeback file.
    #[arg(long, value_name = "true|false", hide_possible_values = true)]
    writeback: Option<bool>,
    /// Drop its pages so long after a VMM was connected last, for example 30d; or never.
    #[arg(long, value_name = "TIME", value_parser = parse::seconds)]
    clear_after: Option<u64>,
    /// How its guest is made to give up memory: none, or vmm=qemu|cloud-hypervisor|vhost-user,socket=PATH,min=SIZE and
    /// mode=, to=, max=, promotion_rate= as in the configuration.
    #[arg(long, value_name = "KEY=VALUE,...", value_parser = parse::squeeze)]
    squeeze: Option<Squeeze>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("changes").required(true).multiple(true)
    .args(["limit", "reserve", "weight", "writeback", "clear_after", "squeeze", "forget"]))]
pub struct SetArgs {
    /// The VM.
    name: String,
    #[command(flatten)]
    share: Share,
    /// Only until the daemon starts again.
    #[arg(long)]
    runtime: bool,
    /// Go back to the configuration first, or to what the VM was added with.
    #[arg(long)]
    forget: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("mode").required(true).args(["to", "auto", "observe", "off"]), after_help = "\
Its balloon must be known: squeeze = { ... } in the configuration, or ballast vm set NAME --squeeze KEY=VALUE,...

After --off the guest keeps what it has at that moment; --to gives it a size.")]
pub struct SqueezeArgs {
    /// The VM.
    name: String,
    /// The guest is to have this much, whatever it thinks of that.
    #[arg(long, value_name = "SIZE")]
    to: Option<Bytes>,
    /// The policy decides: as little as nobody misses.
    #[arg(long)]
    auto: bool,
    /// Show what the policy would do, and do nothing.
    #[arg(long)]
    observe: bool,
    /// Leave the balloon alone.
    #[arg(long)]
    off: bool,
    /// Only until the daemon starts again.
    #[arg(long)]
    runtime: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ballast vm args web1 --vmm qemu --memory 4GiB --whole >web1.sh
  ballast vm args web1 --vmm libvirt --memory 4GiB --whole >web1.xml && virsh define web1.xml
  ballast vm args web1 --vmm cloud-hypervisor --format json")]
pub struct VmArgsArgs {
    /// The VM.
    name: String,
    /// What will run it.
    #[arg(long, value_enum)]
    vmm: Vmm,
    /// How it is told [default: its usual way; cloud-hypervisor has cli and json].
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Something that starts a VM: a script, a domain, a configuration, as in vmm-configs.
    #[arg(long)]
    whole: bool,
    /// The guest's memory.
    #[arg(long, value_name = "SIZE", default_value_t = MEMORY_DEFAULT, value_parser = vm_args::parse_memory)]
    memory: Bytes,
    /// The QEMU is older than 9.2 (Debian 12 has 7.2) and knows no reconnect-ms.
    #[arg(long = "qemu-before-9.2")]
    qemu_before_9_2: bool,
}

/// Does what the command says.
pub fn run(global: &Global, command: VmCommand) -> anyhow::Result<()> {
    match command {
        VmCommand::Add(args) => add(global, args),
        VmCommand::Remove { name, force, runtime } => remove(global, &name, Removal { force, runtime }),
        VmCommand::List => {
            let list = global.client()?.vms()?;
            global.show(&list, || table::vms(&list.vms))
        }
        VmCommand::Show { name } => {
            let vm = global.client()?.vm(&name)?;
            global.show(&vm, || listing::details(&vm))
        }
        VmCommand::Args(args) => print_args(global, &args),
        VmCommand::Squeeze(args) => squeeze(global, &args),
        VmCommand::Set(args) => set(global, &args),
        VmCommand::Clear { name, force } => clear(global, &name, Clearing { force }),
        VmCommand::Release { name } => {
            let client = global.client()?;
            // It is no failure to ask for what is so already, but it is nothing that was done either.
            let was_quarantined = client.vm(&name)?.status.state == VmState::Quarantined;
            let vm = client.release_vm(&name)?;
            global.show(&vm, || listing::released(&name, was_quarantined))
        }
    }
}

fn add(global: &Global, args: AddArgs) -> anyhow::Result<()> {
    let vm = NewVm {
        size_bytes: args.size.0,
        limit_bytes: args.share.limit.map(|limit| limit.0),
        reserve_bytes: args.share.reserve.map(|reserve| reserve.0),
        weight: args.share.weight,
        writeback: args.share.writeback,
        queues: args.queues,
        migration: args.migration,
        label: args.label,
        uuid: args.uuid,
        clear_after_seconds: args.share.clear_after,
        squeeze: args.share.squeeze,
        runtime: args.runtime,
    };
    let vm = global.client()?.add_vm(&args.name, &vm)?;
    global.show(&vm, || listing::added(&vm))
}

fn remove(global: &Global, name: &str, removal: Removal) -> anyhow::Result<()> {
    let removed = global.client()?.remove_vm(name, removal)?;
    global.show(&removed, || listing::removed(&removed))
}

fn set(global: &Global, SetArgs { name, share, runtime, forget }: &SetArgs) -> anyhow::Result<()> {
    let change = VmChange {
        limit_bytes: share.limit.map(|limit| limit.0),
        reserve_bytes: share.reserve.map(|reserve| reserve.0),
        weight: share.weight,
        writeback: share.writeback,
        clear_after_seconds: share.clear_after,
        squeeze: share.squeeze.clone(),
        squeeze_mode: None,
        runtime: *runtime,
        forget: *forget,
    };
    // What the status doesn't have.
    let mut keys =
        Vec::from([("clear_after", share.clear_after.is_some()), ("squeeze", share.squeeze.is_some())]);
    keys.retain(|(_, was_given)| *was_given);
    let client = global.client()?;
    let vm = client.set_vm(name, change)?;
    let details = if keys.is_empty() { VmDetails::default() } else { client.vm(name)? };
    global.show(&vm, || {
        let lines = keys.iter().filter_map(|(key, _)| listing::setting(&details, key));
        table::share(&vm) + &lines.collect::<String>()
    })
}

fn clear(global: &Global, name: &str, clearing: Clearing) -> anyhow::Result<()> {
    global.client()?.clear_vm(name, clearing)?;
    let answer = serde_json::json!({ "cleared": name });
    global.show(&answer, || format!("{name}: all pages are dropped\n"))
}

/// A VM as the daemon serves it; as the files have it, where no daemon answers.
fn vm_and_socket(global: &Global, name: &str) -> anyhow::Result<(VmConfig, PathBuf)> {
    match global.client()?.vm(name) {
        Ok(details) => {
            let socket = details
                .socket
                .clone()
                .context("the VM is not served, and so has no socket: see `ballast vm show`")?;
            return Ok((details.config()?, socket.into()));
        }
        Err(ClientError::NotRunning { .. }) => {}
        // A daemon that can't be asked may serve it otherwise than the files say.
        Err(error) => return Err(error.into()),
    }
    anyhow::ensure!(
        !global.names_only_a_socket(),
        "no daemon answers on the socket that --socket names: start it, or name its configuration with --config"
    );
    let config = global.load_config()?.with_remembered()?;
    let vm = config.vm(name)?.clone();
    let socket = config.socket_path(name);
    Ok((vm, socket))
}

fn print_args(global: &Global, args: &VmArgsArgs) -> anyhow::Result<()> {
    let format = args_format(args);
    let (vm, socket) = vm_and_socket(global, &args.name)?;
    let guest = Guest { memory: args.memory, qemu_before_9_2: args.qemu_before_9_2 };
    let wanted = Wanted { vmm: args.vmm, format, whole: args.whole, guest };
    let answer = vm_args::vm_args(&vm, &socket, wanted);
    global.show(&answer.json(), || answer.text())
}

/// The format that was asked for, or the VMM's usual one. Another one is wrong usage.
fn args_format(args: &VmArgsArgs) -> Format {
    let formats = args.vmm.formats();
    let format = args.format.unwrap_or(formats[0]);
    if !formats.contains(&format) {
        let name =
            |value: Option<PossibleValue>| value.map_or_else(String::new, |it| it.get_name().to_owned());
        let vmm = name(args.vmm.to_possible_value());
        let names: Vec<_> = formats.iter().map(|format| name(format.to_possible_value())).collect();
        let message = format!("--format: {vmm} takes only {}", names.join(" or "));
        super::Cli::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
    format
}

fn squeeze(global: &Global, args: &SqueezeArgs) -> anyhow::Result<()> {
    let mode = match args {
        SqueezeArgs { to: Some(Bytes(bytes)), .. } => SqueezeMode::Fixed(*bytes),
        SqueezeArgs { auto: true, .. } => SqueezeMode::Auto,
        SqueezeArgs { observe: true, .. } => SqueezeMode::Observe,
        _ => SqueezeMode::Off,
    };
    let client = global.client()?;
    let change = VmChange { squeeze_mode: Some(mode), runtime: args.runtime, ..VmChange::default() };
    client.set_vm(&args.name, change)?;
    let vm = client.vm(&args.name)?;
    global.show(&vm, || listing::details(&vm))
}
