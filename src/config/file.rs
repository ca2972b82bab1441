//! The file as it is written: which keys exist, what each may be, and what holds when one is left out. Keys that
//! don't exist are refused by serde, which lists those that do.

use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use toml::{Table, Value};

use super::keys::NONE;
use super::squeeze::{self, Balloon};
use super::value::{self, Key};
use super::vm::{self, Vm};
use super::writeback::{self, Writeback};
use super::{
    Config, ConfigError, PoolConfig, RUNTIME_DIR_DEFAULT, SOCKET_PATH_BYTES_MAX, STATE_DIR_DEFAULT,
    SqueezeVmm, VMS_FILE_NAME, VmConfig,
};
use crate::page::PAGE_SIZE_U64;
use crate::reclaim::ColdOptions;
use crate::store::codec::Compressor;

const MIB: u64 = 1 << 20;
/// Faster than a round an hour, it would keep a core busy; slower than one a year, it would find nothing.
const SCRUB: RangeInclusive<Duration> = Duration::from_secs(3600)..=Duration::from_secs(365 * 24 * 3600);

/// Pages that are to be compressed anew a moment after they were stored cost more than they save.
const COLD_AFTER: RangeInclusive<Duration> = Duration::from_secs(1)..=Duration::from_secs(30 * 24 * 3600);
const COMPRESSORS: &str = "\"lz4\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22, or one of the last two with \"+dictionary\" behind it";

/// The keys of a file that stand above its sections.
pub(super) const KEYS_WITHOUT_SECTION: [&str; 11] = [
    "state_dir",
    "runtime_dir",
    "workers",
    "poll_us",
    "socket_group",
    "control_group",
    "sandbox",
    "lock_memory",
    "scrub",
    "vms_file",
    "metrics",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    state_dir: Option<Value>,
    runtime_dir: Option<Value>,
    workers: Option<Value>,
    poll_us: Option<Value>,
    socket_group: Option<Value>,
    control_group: Option<Value>,
    sandbox: Option<Value>,
    lock_memory: Option<Value>,
    scrub: Option<Value>,
    vms_file: Option<Value>,
    metrics: Option<Value>,
    #[serde(default)]
    pool: Pool,
    writeback: Option<Writeback>,
    #[serde(default)]
    balloon: Balloon,
    #[serde(default, deserialize_with = "vm::sections")]
    vm: Vec<Vm>,
}

#[derive(Default, Deserialize)]
#[serde(
    deny_unknown_fields,
    expecting = "the section [pool] with its keys: max, compressor, cold_compressor, cold_after, cold_cpu, deduplicate, accept_threshold, store_deadline_ms, pressure"
)]
struct Pool {
    max: Option<Value>,
    compressor: Option<Value>,
    cold_compressor: Option<Value>,
    cold_after: Option<Value>,
    cold_cpu: Option<Value>,
    deduplicate: Option<Value>,
    accept_threshold: Option<Value>,
    store_deadline_ms: Option<Value>,
    pressure: Option<Value>,
}

pub(super) fn parse(text: &str, host_bytes: u64) -> Result<Config, ConfigError> {
    let file: File = toml::from_str(text).map_err(ConfigError::syntax)?;
    let state_dir = Key::new("state_dir", file.state_dir.as_ref()).directory(STATE_DIR_DEFAULT)?;
    let vms_file = Key::new("vms_file", file.vms_file.as_ref()).own_file(state_dir.join(VMS_FILE_NAME))?;
    let workers = Key::new("workers", file.workers.as_ref()).number(workers_default(), 1..=64)?;
    let poll_us = Key::new("poll_us", file.poll_us.as_ref()).number(50, 0..=1000)?;
    let pool = pool(&file.pool, host_bytes)?;
    let config = Config {
        path: None,
        state_dir,
        vms_file,
        runtime_dir: Key::new("runtime_dir", file.runtime_dir.as_ref()).directory(RUNTIME_DIR_DEFAULT)?,
        workers: workers as usize,
        poll: Duration::from_micros(u64::from(poll_us)),
        socket_group: group("socket_group", file.socket_group.as_ref(), "kvm")?,
        control_group: group("control_group", file.control_group.as_ref(), "adm")?,
        sandbox: Key::new("sandbox", file.sandbox.as_ref()).boolean(true)?,
        lock_memory: Key::new("lock_memory", file.lock_memory.as_ref()).boolean(false)?,
        metrics: Key::new("metrics", file.metrics.as_ref()).optional_address()?,
        pool,
        writeback: file.writeback.as_ref().map(writeback::parse).transpose()?,
        balloon_budget_bytes: squeeze::budget(&file.balloon, host_bytes)?,
        balloon_interval: squeeze::interval(&file.balloon)?,
        scrub: Key::new("scrub", file.scrub.as_ref()).optional_duration(SCRUB)?,
        host_bytes,
        vms: vm::parse(&file.vm, pool.max_bytes)?,
        vm_sections: sections(text),
    };
    check_together(&config)?;
    Ok(config)
}

fn group(key: &str, value: Option<&Value>, example: &str) -> Result<Option<String>, ConfigError> {
    let allowed = format!("must be the name of a group, such as \"{example}\"");
    Key::new(key, value).or(None, &allowed, |value| {
        value.as_str().filter(|name| !name.is_empty()).map(|name| Some(name.to_owned()))
    })
}

/// The `[[vm]]` sections of a text that was found to be right, as they are written.
fn sections(text: &str) -> Vec<Table> {
    let vms = text.parse().ok().and_then(|mut file: Table| file.remove("vm"));
    vms.and_then(|vms| vms.try_into().ok()).unwrap_or_default()
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
    let max_bytes = max.size_or(of_host(25), &allowed, |value| {
        match value.as_str().and_then(|text| text.strip_suffix('%')) {
            Some(percent) => percent.trim().parse().ok().filter(|p| (1..=90).contains(p)).map(of_host),
            None => value::bytes(value).filter(|bytes| (MIB..=host_bytes).contains(bytes)),
        }
    })?;
    let compressor = Key::new("pool.compressor", pool.compressor.as_ref()).or(
        Compressor::default(),
        &format!("must be {COMPRESSORS}"),
        |value| value.as_str()?.parse().ok(),
    )?;
    let cold_compressor = Key::new("pool.cold_compressor", pool.cold_compressor.as_ref()).or(
        Some(Compressor::ZstdWithDictionary(9)),
        "must be \"none\", \"zstd\" or \"zstd:LEVEL\" with a level from -7 to 22, and may have \"+dictionary\" behind it",
        |value| match value.as_str()? {
            NONE => Some(None),
            // It is there to make pages smaller.
            text => text.parse().ok().filter(|it| *it != Compressor::Lz4).map(Some),
        },
    )?;
    let cold_after = Key::new("pool.cold_after", pool.cold_after.as_ref()).optional_duration(COLD_AFTER)?;
    let cold_cpu = Key::new("pool.cold_cpu", pool.cold_cpu.as_ref());
    let usual = ColdOptions::default();
    let cold = ColdOptions {
        after: cold_after.unwrap_or(usual.after),
        cpu_percent: cold_cpu.or(
            usual.cpu_percent,
            "must be a share of a core from \"1%\" to \"100%\"",
            |value| {
                let percent = value.as_str()?.strip_suffix('%')?.trim().parse().ok()?;
                (1..=100).contains(&percent).then_some(percent)
            },
        )?,
        ..usual
    };
    let deduplicate = Key::new("pool.deduplicate", pool.deduplicate.as_ref());
    let threshold = Key::new("pool.accept_threshold", pool.accept_threshold.as_ref());
    let deadline = Key::new("pool.store_deadline_ms", pool.store_deadline_ms.as_ref());
    let pressure = Key::new("pool.pressure", pool.pressure.as_ref());
    Ok(PoolConfig {
        max_bytes: max_bytes / PAGE_SIZE_U64 * PAGE_SIZE_U64,
        compressor,
        cold_compressor,
        cold,
        deduplicate: deduplicate.boolean(true)?,
        accept_threshold_percent: threshold.number(90, 1..=100)?,
        store_deadline: Duration::from_millis(deadline.number(5000, 0..=60_000)?.into()),
        pressure: pressure.boolean(true)?,
    })
}

/// What can only be seen of all VMs together.
pub(super) fn check_together(config: &Config) -> Result<(), ConfigError> {
    check_socket_paths(config)?;
    squeeze::check(config)
}

fn check_socket_paths(config: &Config) -> Result<(), ConfigError> {
    let sockets = config.vms.iter().map(|vm| config.socket_path(&vm.name));
    let is_ours = |vm: &&VmConfig| vm.squeeze.as_ref().is_some_and(|it| it.vmm == SqueezeVmm::VhostUser);
    let balloons = config.vms.iter().filter(is_ours).map(|vm| config.balloon_socket_path(&vm.name));
    let longest =
        sockets.chain(balloons).chain([config.control_socket()]).max_by_key(|path| path.as_os_str().len());
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
