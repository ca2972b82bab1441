//! The `[[vm]]` sections: a disk each, its share of the pool, and what the guest finds on it.

use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Value;

use super::value::{self, Key};
use super::{ConfigError, Migration, VM_KEYS, VmConfig, keys, squeeze, uuid};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

const MIB: u64 = 1 << 20;
/// A slot's index is a u32, and an 8 TiB disk is already a thousand times what anybody swaps to.
const SIZE_BYTES_MAX: u64 = 8 << 40;
/// What a VM's limit may be, in the configuration and later: a disk of pages that don't shrink needs little more than
/// its size.
pub const LIMIT_BYTES: RangeInclusive<u64> = MIB..=2 * SIZE_BYTES_MAX;
/// What a VM's weight may be, in the configuration and later: the range of a cgroup's weights.
pub const WEIGHT: RangeInclusive<u32> = 1..=10_000;
const WEIGHT_DEFAULT: u32 = 100;
/// Virtqueues are told apart by the bits of a u64.
const QUEUES_MAX: u32 = 64;
/// Each VM costs a listening socket and a thread; this many would be thousands of guests on one host.
const VMS_MAX: usize = 4096;
const LABEL_DEFAULT: &str = "ballast";
/// The width of a swap header's label.
const LABEL_BYTES_MAX: usize = 16;

/// The last word on whether a VM's pages are still wanted: sooner than an hour, a guest that is only restarted loses them.
const CLEAR_AFTER: RangeInclusive<Duration> =
    Duration::from_secs(3600)..=Duration::from_secs(10 * 365 * 24 * 3600);

#[derive(Deserialize)]
#[serde(deny_unknown_fields, expecting = "a section [[vm]]: a name, a size, and what else is said of one VM")]
pub(super) struct Vm {
    name: Option<Value>,
    size: Option<Value>,
    limit: Option<Value>,
    reserve: Option<Value>,
    weight: Option<Value>,
    writeback: Option<Value>,
    queues: Option<Value>,
    migration: Option<Value>,
    label: Option<Value>,
    uuid: Option<Value>,
    clear_after: Option<Value>,
    squeeze: Option<Value>,
}

pub(super) fn parse(vms: &[Vm], pool_max_bytes: u64) -> Result<Vec<VmConfig>, ConfigError> {
    check_number(vms.len())?;
    let mut names = HashSet::new();
    let vms: Vec<_> = vms
        .iter()
        .enumerate()
        .map(|(index, vm)| {
            let key = format!("[[vm]] number {}: name", index + 1);
            self::vm(key, |name| format!("[[vm]] {name:?}: "), vm, &mut names)
        })
        .collect::<Result<_, _>>()?;
    check_reserves(&vms, pool_max_bytes)?;
    Ok(vms)
}

/// The `[[vm]]` sections of a file, each read as a `T`. A message about anything else names what they may have.
pub(super) fn sections<'de, D: Deserializer<'de>, T: Deserialize<'de>>(file: D) -> Result<Vec<T>, D::Error> {
    file.deserialize_any(Sections(PhantomData))
}

struct Sections<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Sections<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a section [[vm]], in two brackets, for each VM, with its keys: {}", VM_KEYS.join(", "))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, sections: A) -> Result<Self::Value, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(sections))
    }
}

/// One VM whose keys came from several places.
///
/// # Errors
/// As for a `[[vm]]` of a configuration.
pub fn parse_one(keys: &toml::Table) -> Result<VmConfig, ConfigError> {
    let name = keys.get("name").and_then(Value::as_str).unwrap_or_default();
    let read = Vm::deserialize(keys.clone()).map_err(ConfigError::syntax);
    let vm = read.map_err(|error| ConfigError::InVm { name: name.to_owned(), error: Box::new(error) })?;
    self::vm("name".to_owned(), |name| format!("the VM {name:?}: "), &vm, &mut HashSet::new())
}

pub(super) fn check_number(vms: usize) -> Result<(), ConfigError> {
    if vms <= VMS_MAX {
        return Ok(());
    }
    Err(ConfigError::Value {
        key: "number of [[vm]] sections".to_owned(),
        given: vms.to_string(),
        allowed: format!("must be at most {VMS_MAX}"),
    })
}

/// The most that all VMs together may have reserved, in bytes of objects: the spans that hold them take a little more
/// of the pool.
#[must_use]
pub fn reserves_max_bytes(pool_max_bytes: u64) -> u64 {
    pool_max_bytes / 10 * 9
}

/// What is reserved for one VM is nobody else's, so the pool must have it.
pub(super) fn check_reserves(vms: &[VmConfig], pool_max_bytes: u64) -> Result<(), ConfigError> {
    let sum = vms.iter().fold(0, |sum: u64, vm| sum.saturating_add(vm.reserve_bytes));
    let max_bytes = reserves_max_bytes(pool_max_bytes);
    if sum <= max_bytes {
        return Ok(());
    }
    Err(ConfigError::Value {
        key: "sum of reserve over all [[vm]]".to_owned(),
        given: format!("\"{}\"", Bytes(sum)),
        allowed: format!("must be at most nine tenths of pool.max ({})", Bytes(max_bytes)),
    })
}

/// One VM; `key_of_name` is what messages call its name before that is known, `place` what they begin with from then on.
fn vm(
    key_of_name: String,
    place: impl Fn(&str) -> String,
    vm: &Vm,
    names: &mut HashSet<String>,
) -> Result<VmConfig, ConfigError> {
    let name = vm_name(&Key::new(key_of_name, vm.name.as_ref()), vm, names)?;
    let place = place(&name);
    let of_vm = |key: &str| format!("{place}{key}");
    let size_bytes =
        Key::new(of_vm("size"), vm.size.as_ref()).size(None, MIB..=SIZE_BYTES_MAX, PAGE_SIZE_U64)?;
    // A full disk of pages that don't shrink fits: each takes a page and the header of its object.
    let limit_default = size_bytes + size_bytes / 64;
    let limit_bytes =
        Key::new(of_vm("limit"), vm.limit.as_ref()).size(Some(limit_default), LIMIT_BYTES, 1)?;
    let reserve_bytes = reserve(&Key::new(of_vm("reserve"), vm.reserve.as_ref()), limit_bytes)?;
    let weight = Key::new(of_vm("weight"), vm.weight.as_ref()).number(WEIGHT_DEFAULT, WEIGHT)?;
    let writeback = Key::new(of_vm("writeback"), vm.writeback.as_ref()).boolean(true)?;
    let queues = Key::new(of_vm("queues"), vm.queues.as_ref()).number(4, 1..=QUEUES_MAX)?;
    let migration = Key::new(of_vm("migration"), vm.migration.as_ref()).or(
        Migration::None,
        "must be \"none\", or \"same-host\" for VMMs that hand their guest to another on this host",
        |value| match value.as_str()? {
            "none" => Some(Migration::None),
            "same-host" => Some(Migration::SameHost),
            _ => None,
        },
    )?;
    let label = label(&Key::new(of_vm("label"), vm.label.as_ref()))?;
    let uuid = Key::new(of_vm("uuid"), vm.uuid.as_ref()).or(
        uuid::of_name(&name),
        "must be a UUID such as \"6d1b4a52-93c7-4c0e-8f0a-2b7d5c1e9a34\"",
        |value| uuid::parse(value.as_str()?),
    )?;
    let queues = u16::try_from(queues).unwrap_or(u16::MAX);
    let clear_after = clear_after(&Key::new(of_vm("clear_after"), vm.clear_after.as_ref()))?;
    let squeeze = squeeze::parse(&of_vm("squeeze"), vm.squeeze.as_ref())?;
    Ok(VmConfig {
        name,
        size_bytes,
        limit_bytes,
        reserve_bytes,
        weight,
        writeback,
        queues,
        migration,
        label,
        uuid,
        clear_after,
        squeeze,
    })
}

/// A duration; or "never", for whoever takes back what another place says.
fn clear_after(key: &Key<'_>) -> Result<Option<Duration>, ConfigError> {
    match key.text() {
        Some(keys::NEVER) => Ok(None),
        _ => key.optional_duration(CLEAR_AFTER),
    }
}

fn reserve(key: &Key<'_>, limit_bytes: u64) -> Result<u64, ConfigError> {
    let allowed = format!("must be a size from 0B to the VM's limit ({})", Bytes(limit_bytes));
    key.size_or(0, &allowed, |value| value::bytes(value).filter(|bytes| *bytes <= limit_bytes))
}

fn label(key: &Key<'_>) -> Result<String, ConfigError> {
    let allowed = "must be a text of 1 to 16 bytes without control characters";
    key.or(LABEL_DEFAULT.to_owned(), allowed, |value| {
        let label = value.as_str()?;
        let fits = (1..=LABEL_BYTES_MAX).contains(&label.len()) && !label.contains(char::is_control);
        fits.then(|| label.to_owned())
    })
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
