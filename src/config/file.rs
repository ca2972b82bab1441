//! The file as it is written: which keys exist, what each may be, and what holds when one is left out. Keys that
//! don't exist are refused by serde, which lists those that do.

use std::collections::HashSet;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use toml::Value;

use super::value::{self, Key};
use super::{
    Config, ConfigError, PoolConfig, RUNTIME_DIR_DEFAULT, SOCKET_PATH_BYTES_MAX, STATE_DIR_DEFAULT, VmConfig,
    uuid,
};
use crate::page::PAGE_SIZE_U64;
use crate::store::codec::Compressor;

const MIB: u64 = 1 << 20;
/// A slot's index is a u32, and an 8 TiB disk is already a thousand times what anybody swaps to.
const SIZE_BYTES_MAX: u64 = 8 << 40;
/// Virtqueues are told apart by the bits of a u64.
const QUEUES_MAX: u32 = 64;
/// Each VM costs a listening socket and a thread; this many would be thousands of guests on one host.
const VMS_MAX: usize = 4096;
const LABEL_DEFAULT: &str = "ballast";
/// The width of a swap header's label.
const LABEL_BYTES_MAX: usize = 16;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    state_dir: Option<Value>,
    runtime_dir: Option<Value>,
    workers: Option<Value>,
    poll_us: Option<Value>,
    #[serde(default)]
    pool: Pool,
    writeback: Option<Value>,
    #[serde(default)]
    vm: Vec<Vm>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pool {
    max: Option<Value>,
    compressor: Option<Value>,
    accept_threshold: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    name: Option<Value>,
    size: Option<Value>,
    limit: Option<Value>,
    queues: Option<Value>,
    label: Option<Value>,
    uuid: Option<Value>,
}

pub(super) fn parse(text: &str, host_bytes: u64) -> Result<Config, ConfigError> {
    let file: File = toml::from_str(text).map_err(|error| ConfigError::Syntax(Box::new(error)))?;
    if file.writeback.is_some() {
        return Err(ConfigError::NoWriteback);
    }
    let workers = Key::new("workers", file.workers.as_ref()).number(workers_default(), 1..=64)?;
    let poll_us = Key::new("poll_us", file.poll_us.as_ref()).number(50, 0..=1000)?;
    let config = Config {
        state_dir: Key::new("state_dir", file.state_dir.as_ref()).directory(STATE_DIR_DEFAULT)?,
        runtime_dir: Key::new("runtime_dir", file.runtime_dir.as_ref()).directory(RUNTIME_DIR_DEFAULT)?,
        workers: workers as usize,
        poll: Duration::from_micros(u64::from(poll_us)),
        pool: pool(&file.pool, host_bytes)?,
        host_bytes,
        vms: vms(&file.vm)?,
    };
    check_socket_paths(&config)?;
    Ok(config)
}

/// Half of the cores: the guests want the others. More than four serve no more pages than the VMs can ask for.
fn workers_default() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    u32::try_from(cores / 2).unwrap_or(u32::MAX).clamp(1, 4)
}

fn pool(pool: &Pool, host_bytes: u64) -> Result<PoolConfig, ConfigError> {
    let max = Key::new("pool.max", pool.max.as_ref());
    let allowed = format!(
        "must be a share of the host's memory from \"1%\" to \"90%\", or a size from 1MiB to that memory ({})",
        crate::ids::Bytes(host_bytes)
    );
    let of_host = |percent: u64| host_bytes / 100 * percent;
    let max_bytes = max.or(of_host(25), &allowed, |value| {
        match value.as_str().and_then(|text| text.strip_suffix('%')) {
            Some(percent) => percent.trim().parse().ok().filter(|p| (1..=90).contains(p)).map(of_host),
            None => value::bytes(value).filter(|bytes| (MIB..=host_bytes).contains(bytes)),
        }
    })?;
    let compressor = Key::new("pool.compressor", pool.compressor.as_ref()).or(
        Compressor::default(),
        "must be \"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22",
        |value| value.as_str()?.parse().ok(),
    )?;
    let threshold = Key::new("pool.accept_threshold", pool.accept_threshold.as_ref());
    Ok(PoolConfig {
        max_bytes: max_bytes / PAGE_SIZE_U64 * PAGE_SIZE_U64,
        compressor,
        accept_threshold_percent: threshold.number(90, 1..=100)?,
    })
}

fn vms(vms: &[Vm]) -> Result<Vec<VmConfig>, ConfigError> {
    if vms.len() > VMS_MAX {
        return Err(ConfigError::Value {
            key: "number of [[vm]] sections".to_owned(),
            given: vms.len().to_string(),
            allowed: format!("must be at most {VMS_MAX}"),
        });
    }
    let mut names = HashSet::new();
    vms.iter().enumerate().map(|(index, vm)| self::vm(index, vm, &mut names)).collect()
}

fn vm(index: usize, vm: &Vm, names: &mut HashSet<String>) -> Result<VmConfig, ConfigError> {
    let name = vm_name(&Key::new(format!("[[vm]] number {}: name", index + 1), vm.name.as_ref()), vm, names)?;
    let of_vm = |key: &str| format!("[[vm]] {name:?}: {key}");
    let size_bytes =
        Key::new(of_vm("size"), vm.size.as_ref()).size(None, MIB..=SIZE_BYTES_MAX, PAGE_SIZE_U64)?;
    // A full disk of pages that don't shrink fits: each takes a page and the header of its object.
    let limit_default = size_bytes + size_bytes / 64;
    let limit =
        Key::new(of_vm("limit"), vm.limit.as_ref()).size(Some(limit_default), MIB..=2 * SIZE_BYTES_MAX, 1)?;
    let queues = Key::new(of_vm("queues"), vm.queues.as_ref()).number(4, 1..=QUEUES_MAX)?;
    let label = Key::new(of_vm("label"), vm.label.as_ref()).or(
        LABEL_DEFAULT.to_owned(),
        "must be a text of 1 to 16 bytes without control characters",
        |value| {
            let label = value.as_str()?;
            let fits = (1..=LABEL_BYTES_MAX).contains(&label.len()) && !label.contains(char::is_control);
            fits.then(|| label.to_owned())
        },
    )?;
    let uuid = Key::new(of_vm("uuid"), vm.uuid.as_ref()).or(
        uuid::of_name(&name),
        "must be a UUID such as \"6d1b4a52-93c7-4c0e-8f0a-2b7d5c1e9a34\"",
        |value| uuid::parse(value.as_str()?),
    )?;
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    Ok(VmConfig { name, size_bytes, limit_bytes: limit, queues, label, uuid })
}

fn vm_name(key: &Key<'_>, vm: &Vm, names: &mut HashSet<String>) -> Result<String, ConfigError> {
    let name = vm.name.as_ref().and_then(Value::as_str).filter(|name| is_vm_name(name));
    let name = name.ok_or_else(|| {
        key.error("must be 1 to 64 letters (A-Z, a-z), digits, dots, underscores and dashes, the first a letter or a digit")
    })?;
    if name == "control" {
        return Err(key.error("must be another name: control.sock is the daemon's own socket"));
    }
    if !names.insert(name.to_owned()) {
        return Err(key.error("must be unique, and an earlier [[vm]] has this name"));
    }
    Ok(name.to_owned())
}

/// Names become file names and socket names, so what a shell or a path would read otherwise stays out.
fn is_vm_name(name: &str) -> bool {
    (1..=64).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

fn check_socket_paths(config: &Config) -> Result<(), ConfigError> {
    let sockets = config.vms.iter().map(|vm| config.socket_path(&vm.name));
    let longest = sockets.chain([config.control_socket()]).max_by_key(|path| path.as_os_str().len());
    match longest.as_deref().map(Path::as_os_str) {
        Some(path) if path.len() > SOCKET_PATH_BYTES_MAX => Err(ConfigError::Value {
            key: "runtime_dir".to_owned(),
            given: format!("{:?}", config.runtime_dir),
            allowed: format!(
                "must be shorter: the socket {} would have {} bytes, and a Unix socket's path at most {SOCKET_PATH_BYTES_MAX}",
                path.display(),
                path.len()
            ),
        }),
        _ => Ok(()),
    }
}
