//! Values of options that clap doesn't know: sizes, durations and numbers in their ranges.

use std::time::Duration;

use ballast::config::{LIMIT_BYTES, NOT_SQUEEZED, WEIGHT, nearest, parse_duration};
use ballast::control::api::{CHECK_RATE_BYTES_MIN, Squeeze};
use ballast::ids::{Bytes, ParseBytesError};

pub fn limit(text: &str) -> Result<Bytes, String> {
    let limit: Bytes = text.parse().map_err(|error: ParseBytesError| error.to_string())?;
    let (least, most) = (Bytes(*LIMIT_BYTES.start()), Bytes(*LIMIT_BYTES.end()));
    if LIMIT_BYTES.contains(&limit.0) { Ok(limit) } else { Err(format!("must be from {least} to {most}")) }
}

pub fn rate(text: &str) -> Result<Bytes, String> {
    let rate: Bytes = text.parse().map_err(|error: ParseBytesError| error.to_string())?;
    let least = Bytes(CHECK_RATE_BYTES_MIN);
    if rate >= least { Ok(rate) } else { Err(format!("must be at least {least}")) }
}

pub fn weight(text: &str) -> Result<u32, String> {
    let weight = text.parse().ok().filter(|weight| WEIGHT.contains(weight));
    weight.ok_or_else(|| format!("must be a whole number from {} to {}", WEIGHT.start(), WEIGHT.end()))
}

/// A duration, in seconds; 0 for never.
pub fn seconds(text: &str) -> Result<u64, String> {
    let duration = if text == "never" { Some(Duration::ZERO) } else { parse_duration(text) };
    let duration = duration.filter(|duration| text == "never" || !duration.is_zero());
    let allowed = || "must be a whole number and s, m, h or d, for example \"30d\", or \"never\"".to_owned();
    duration.map(|duration| duration.as_secs()).ok_or_else(allowed)
}

/// How a VM is squeezed: the configuration's keys with their values, or "none". Whether they are right the daemon says.
pub fn squeeze(text: &str) -> Result<Squeeze, String> {
    let mut squeeze = Squeeze::default();
    if text == NOT_SQUEEZED {
        return Ok(Squeeze { vmm: text.to_owned(), ..squeeze });
    }
    for part in text.split(',') {
        let (key, value) = part.split_once('=').ok_or_else(|| format!("{part:?} is not KEY=VALUE: give pairs with commas between, as in vmm=qemu,socket=/run/vms/web1.qmp"))?;
        let word = || Some(value.to_owned());
        let bytes =
            || value.parse::<Bytes>().map(|Bytes(bytes)| Some(bytes)).map_err(|error| error.to_string());
        match key {
            "vmm" => value.clone_into(&mut squeeze.vmm),
            "socket" => squeeze.socket = word(),
            "mode" => squeeze.mode = word(),
            "to" => squeeze.to_bytes = bytes()?,
            "min" => squeeze.min_bytes = bytes()?,
            "max" => squeeze.max_bytes = bytes()?,
            "promotion_rate" => squeeze.promotion_rate = word(),
            _ => {
                let known = ["vmm", "socket", "mode", "to", "min", "max", "promotion_rate"];
                let meant =
                    nearest(key, &known).map(|meant| format!("; was {meant:?} meant?")).unwrap_or_default();
                return Err(format!("{key:?} is no key of squeeze, which are {}{meant}", known.join(", ")));
            }
        }
    }
    if squeeze.vmm.is_empty() {
        return Err("vmm is missing: vmm=qemu, vmm=cloud-hypervisor or vmm=vhost-user".to_owned());
    }
    Ok(squeeze)
}
