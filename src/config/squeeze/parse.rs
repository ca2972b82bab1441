//! One value of `squeeze`, by itself.

use std::ops::RangeInclusive;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use toml::{Table, Value};

use super::super::value::Key;
use super::super::{ConfigError, SOCKET_PATH_BYTES_MAX};
use super::{MEMORY_BYTES, NONE, SqueezeConfig, SqueezeVmm, promotion_rate};
use crate::balloon::Mode;
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Squeeze {
    vmm: Option<Value>,
    socket: Option<Value>,
    mode: Option<Value>,
    to: Option<Value>,
    min: Option<Value>,
    max: Option<Value>,
    promotion_rate: Option<Value>,
}

/// The value of `squeeze`; `key` is what messages call it.
pub(in crate::config) fn parse(
    key: &str,
    value: Option<&Value>,
) -> Result<Option<SqueezeConfig>, ConfigError> {
    let table: &Table = match value {
        None => return Ok(None),
        Some(Value::String(text)) if text == NONE => return Ok(None),
        Some(Value::Table(table)) => table,
        other => {
            let example = "{ vmm = \"qemu\", socket = \"/run/vms/web1.qmp\", min = \"512MiB\" }";
            return Err(Key::new(key, other).error(format!("must be \"none\", or a table such as {example}")));
        }
    };
    let given = Squeeze::deserialize(table.clone()).map_err(|error| ConfigError::InKey {
        key: key.to_owned(),
        error: Box::new(ConfigError::syntax(error)),
    })?;
    let of = |name: &str, value| Key::new(format!("{key}.{name}"), value);
    let vmm = vmm(&of("vmm", given.vmm.as_ref()), &of("socket", given.socket.as_ref()))?;
    let min_bytes = memory(&of("min", given.min.as_ref()), MEMORY_BYTES)?;
    let max = *MEMORY_BYTES.end();
    let max_bytes = memory(&of("max", given.max.as_ref()), min_bytes.unwrap_or(*MEMORY_BYTES.start())..=max)?;
    let within = min_bytes.unwrap_or(*MEMORY_BYTES.start())..=max_bytes.unwrap_or(max);
    let mode = mode(&of("mode", given.mode.as_ref()), &of("to", given.to.as_ref()), within)?;
    if matches!(mode, Mode::Auto | Mode::Observe) && min_bytes.is_none() {
        let allowed = format!(
            "must be the least memory that the guest is left, from {}, for example \"512MiB\"; only with mode = \"off\" or \
             \"fixed\" there need not be any",
            Bytes(*MEMORY_BYTES.start())
        );
        return Err(of("min", None).error(allowed));
    }
    let promotion_rate_ppm = promotion_rate::read(&of("promotion_rate", given.promotion_rate.as_ref()))?;
    Ok(Some(SqueezeConfig { vmm, mode, min_bytes, max_bytes, promotion_rate_ppm }))
}

fn vmm(vmm: &Key<'_>, socket: &Key<'_>) -> Result<SqueezeVmm, ConfigError> {
    let made: fn(PathBuf) -> SqueezeVmm = match vmm.text() {
        Some("qemu") => SqueezeVmm::Qemu,
        Some("cloud-hypervisor") => SqueezeVmm::CloudHypervisor,
        Some("vhost-user") if socket.is_given() => {
            return Err(socket.error(
                "must be left out with vmm = \"vhost-user\", whose socket is the daemon's own, in its runtime_dir: \
                 balloon/VM.sock",
            ));
        }
        Some("vhost-user") => return Ok(SqueezeVmm::VhostUser),
        _ => return Err(vmm.error("must be \"qemu\", \"cloud-hypervisor\" or \"vhost-user\"")),
    };
    socket.text().filter(|path| is_socket_path(path)).map(|path| made(path.into())).ok_or_else(|| {
        socket.error(format!(
            "must be the absolute path of the VMM's socket (QEMU's -qmp, cloud-hypervisor's --api-socket), of at most \
             {SOCKET_PATH_BYTES_MAX} bytes, without \"..\", commas and control characters"
        ))
    })
}

/// As for [`Key::directory`], with what two paths can't be compared by left out.
fn is_socket_path(text: &str) -> bool {
    text.starts_with('/')
        && !text.ends_with('/')
        && text.len() <= SOCKET_PATH_BYTES_MAX
        && !text.contains(|c: char| c == ',' || c.is_control())
        && !Path::new(text).components().any(|part| part == Component::ParentDir)
}

fn memory(key: &Key<'_>, allowed: RangeInclusive<u64>) -> Result<Option<u64>, ConfigError> {
    if key.is_given() { key.size(None, allowed, PAGE_SIZE_U64).map(Some) } else { Ok(None) }
}

fn mode(mode: &Key<'_>, to: &Key<'_>, within: RangeInclusive<u64>) -> Result<Mode, ConfigError> {
    let found = match mode.text() {
        Some("off") => Mode::Off,
        Some("observe") => Mode::Observe,
        Some("auto") => Mode::Auto,
        None if !mode.is_given() => Mode::Auto,
        Some("fixed") => return to.size(None, within, PAGE_SIZE_U64).map(Mode::Fixed),
        _ => return Err(mode.error("must be \"auto\", \"observe\", \"off\" or \"fixed\"")),
    };
    if to.is_given() {
        return Err(
            to.error("must be left out unless mode = \"fixed\": it is the memory that the guest has then")
        );
    }
    Ok(found)
}
