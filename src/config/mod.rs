//! TOML to a validated configuration. What comes out of here needs no further check: every number is in its range,
//! every size is resolved to bytes, every name is fit to be a file name. A message names the key, what was given and
//! what is allowed. What a running daemon was told besides lies over that in [`Layers`], and is kept in a file
//! ([`Remembered`]). Knows the codecs by name and the size of a page, and nothing else of the daemon.

mod error;
mod file;
mod keys;
mod layers;
mod nearest;
mod remembered;
mod squeeze;
mod uuid;
mod value;
mod vm;
mod writeback;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use self::error::ConfigError;
pub use self::keys::{KeyValue, VM_KEYS, duration, migration, size};
pub use self::layers::{Layers, Runtime, Source};
pub use self::nearest::{nearest, to_unknown_key};
pub use self::remembered::Remembered;
pub use self::squeeze::{NONE as NOT_SQUEEZED, SqueezeConfig, SqueezeVmm};
pub use self::value::duration as parse_duration;
pub use self::vm::{LIMIT_BYTES, WEIGHT, parse_one as parse_vm, reserves_max_bytes};
use crate::page::PAGE_SIZE_U64;
use crate::reclaim::ColdOptions;
use crate::store::codec::Compressor;

/// Where `ballast serve` and `ballast vm args` look when no `--config` is given.
pub const CONFIG_PATH_DEFAULT: &str = "/etc/ballast/ballast.toml";
/// Where the pages live unless `state_dir` says otherwise: a tmpfs that outlives the daemon, not the host.
pub const STATE_DIR_DEFAULT: &str = "/dev/shm/ballast";
/// Where the sockets live unless `runtime_dir` says otherwise.
pub const RUNTIME_DIR_DEFAULT: &str = "/run/ballast";
/// The name, in the state directory, of the file that remembers VMs unless `vms_file` says otherwise.
const VMS_FILE_NAME: &str = "vms.toml";
/// The control socket's name in the runtime directory.
pub const CONTROL_SOCKET_NAME: &str = "control.sock";
/// The name, in the runtime directory, of the directory with the sockets of our own balloon devices.
pub const BALLOON_DIR_NAME: &str = "balloon";
/// Length of the longest path that fits a Unix socket's address (`sockaddr_un` without its final zero).
pub const SOCKET_PATH_BYTES_MAX: usize = 107;

/// What the daemon was told, checked and complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// The file that it was read from, if it was one.
    pub path: Option<PathBuf>,
    /// Arena and page tables; must be in a tmpfs, which is checked where it is opened.
    pub state_dir: PathBuf,
    /// The sockets: one per VM, and the control socket.
    pub runtime_dir: PathBuf,
    /// Threads that serve all virtqueues, 1 to 64.
    pub workers: usize,
    /// How long an idle worker keeps looking for work before it sleeps.
    pub poll: Duration,
    /// The group that may connect to the VMs' sockets; without one it is that of the daemon's process.
    pub socket_group: Option<String>,
    /// The group that may give orders at the control socket; without one nobody but root and the daemon's own user may.
    pub control_group: Option<String>,
    /// Whether the daemon gives up what it does not need: other files, programs, networks, capabilities.
    pub sandbox: bool,
    /// Whether the host may not swap out the pages that it holds in memory.
    pub lock_memory: bool,
    /// Where Prometheus may ask for the metrics, beside the control socket.
    pub metrics: Option<SocketAddr>,
    /// The memory that all VMs share.
    pub pool: PoolConfig,
    /// Where cold pages move to; without it they stay.
    pub writeback: Option<WritebackConfig>,
    /// Most bytes of memory that all guests that are squeezed may have together; `None` for any number.
    pub balloon_budget_bytes: Option<u64>,
    /// From one look at those guests to the next, 1 s to a minute.
    pub balloon_interval: Duration,
    /// The time in which every stored page is looked at once; `None` for never.
    pub scrub: Option<Duration>,
    /// The host's memory when the file was read; what a percentage is a percentage of.
    pub host_bytes: u64,
    /// The file in which the daemon remembers what it was told while it ran.
    pub vms_file: PathBuf,
    /// The VMs, in the file's order; their names are unique.
    pub vms: Vec<VmConfig>,
    /// The sections that say so, with the keys that are written there and no others.
    vm_sections: Vec<toml::Table>,
}

/// The memory that all VMs share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Most bytes that the arena may take; a multiple of the page size.
    pub max_bytes: u64,
    /// What new pages are compressed with.
    pub compressor: Compressor,
    /// What pages are compressed with that nobody has used for a while; `None` leaves them as they are.
    pub cold_compressor: Option<Compressor>,
    /// When a page is one of those, and how much of a core it takes.
    pub cold: ColdOptions,
    /// Whether those of a VM that are the same as another of it are kept once.
    pub deduplicate: bool,
    /// The share of `max_bytes` below which a pool that was full counts as not full again.
    pub accept_threshold_percent: u32,
    /// How long a store may wait for room before it fails; at most a minute.
    pub store_deadline: Duration,
    /// Whether pages leave when the host runs short of memory.
    pub pressure: bool,
}

/// Where cold pages move to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WritebackConfig {
    /// A file, made when it isn't there, or a block device.
    pub path: PathBuf,
    /// How much of it is used, at least 64 MiB; `None` for the whole of a block device.
    pub size_bytes: Option<u64>,
    /// Most bytes that are written to it in a day.
    pub daily_limit_bytes: Option<u64>,
    /// Pages stored longer ago than this leave before anybody needs their room, while the disk is idle; at least a
    /// second.
    pub idle: Option<Duration>,
}

/// Where a running guest may move to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Migration {
    /// Nowhere.
    #[default]
    None,
    /// To another VMM on this host, which attaches to the same daemon. Its memory could move to another host, its
    /// stored pages could not.
    SameHost,
}

/// One VM and its disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// 1 to 64 of `[A-Za-z0-9._-]`, the first a letter or a digit: also a file name.
    pub name: String,
    /// What the guest sees; a multiple of the page size, below 2^32 pages.
    pub size_bytes: u64,
    /// Most pool bytes that the VM may hold.
    pub limit_bytes: u64,
    /// Pool bytes that the VM keeps whatever the others need; at most its limit. All reserves fit into the pool.
    pub reserve_bytes: u64,
    /// Its share of the pool against the other VMs', 1 to 10000.
    pub weight: u32,
    /// Whether its pages may move to the writeback file.
    pub writeback: bool,
    /// Virtqueues that the device offers, 1 to 64.
    pub queues: u16,
    /// Where its guest may move to while it runs.
    pub migration: Migration,
    /// The swap header's label, at most 16 bytes.
    pub label: String,
    /// The swap header's UUID.
    pub uuid: [u8; 16],
    /// How long after a VMM was connected last its pages are dropped; `None` for never.
    pub clear_after: Option<Duration>,
    /// How its guest is made to give up memory; `None` for not at all.
    pub squeeze: Option<SqueezeConfig>,
}

impl VmConfig {
    /// The number of slots on the VM's device.
    #[must_use]
    pub fn slots(&self) -> u32 {
        // The range of `size` keeps this below 2^32; a hand-made value that doesn't is cut, not wrapped.
        u32::try_from(self.size_bytes / PAGE_SIZE_U64).unwrap_or(u32::MAX)
    }
}

impl Config {
    /// Reads and checks the file at `path`; a percentage is taken of this host's memory.
    ///
    /// # Errors
    /// When the file can't be read, or says something that isn't allowed; also when the writeback file is no block device
    /// and has no size.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let checked = Self::parse(&text, host_bytes()).and_then(|config| {
            config.writeback.as_ref().map_or(Ok(()), writeback::check_size)?;
            Ok(Self { path: Some(path.to_owned()), ..config })
        });
        checked.map_err(|source| ConfigError::InFile { path: path.to_owned(), source: Box::new(source) })
    }

    /// The same with the VMs and values that a daemon remembers, if whoever asks may read that.
    ///
    /// # Errors
    /// When what is remembered is damaged, or doesn't go with this.
    pub fn with_remembered(self) -> Result<Self, ConfigError> {
        match Layers::load(self.clone()) {
            Err(ConfigError::Read { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(self)
            }
            layers => layers?.effective(),
        }
    }

    /// Checks a configuration's text, for a host with `host_bytes` of memory.
    ///
    /// # Errors
    /// When it isn't TOML, has a key that doesn't exist, or a value that isn't allowed.
    pub fn parse(text: &str, host_bytes: u64) -> Result<Self, ConfigError> {
        file::parse(text, host_bytes)
    }

    /// The VM of this name.
    ///
    /// # Errors
    /// When there is none; the error lists those that exist.
    pub fn vm(&self, name: &str) -> Result<&VmConfig, UnknownVm> {
        self.vms.iter().find(|vm| vm.name == name).ok_or_else(|| UnknownVm {
            name: name.to_owned(),
            known: self.vms.iter().map(|vm| vm.name.clone()).collect(),
        })
    }

    /// The socket that a VMM connects the named VM to.
    #[must_use]
    pub fn socket_path(&self, vm: &str) -> PathBuf {
        self.runtime_dir.join(format!("{vm}.sock"))
    }

    /// The socket that a VMM connects the named VM's balloon to, if that is ours.
    #[must_use]
    pub fn balloon_socket_path(&self, vm: &str) -> PathBuf {
        self.runtime_dir.join(BALLOON_DIR_NAME).join(format!("{vm}.sock"))
    }

    /// The socket that the client commands speak to.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.runtime_dir.join(CONTROL_SOCKET_NAME)
    }
}

/// A VM was named that doesn't exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no VM {name:?}; {}", known_vms(.known))]
pub struct UnknownVm {
    /// What was asked for.
    pub name: String,
    /// What exists.
    pub known: Vec<String>,
}

/// The names that exist, as the end of a message.
#[must_use]
pub fn known_vms(known: &[String]) -> String {
    if known.is_empty() {
        "no VM is configured: add one with `ballast vm add NAME --size SIZE`".to_owned()
    } else {
        format!("the VMs are: {}", known.join(", "))
    }
}

/// This host's memory in bytes.
fn host_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    // `c_ulong` is 64 bits wide on the hosts that run VMs of this kind; the conversion says so for the others.
    #[allow(clippy::useless_conversion)]
    u64::from(info.totalram).saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests;
