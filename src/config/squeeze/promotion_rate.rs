//! The promotion rate, which is written in percent and kept in millionths: `0.2%` are 2000.

use std::ops::RangeInclusive;

use toml::Value;

use super::super::ConfigError;
use super::super::value::Key;

/// Hundredths of a percent are some pages a minute, and at a tenth of what it works with a guest does little else.
const RANGE_PPM: RangeInclusive<u32> = 100..=100_000;
/// The bound that far memory was found to be harmless below: 0.2 %.
const DEFAULT_PPM: u32 = 2_000;

pub(super) fn read(key: &Key<'_>) -> Result<u32, ConfigError> {
    let allowed = format!(
        "must be a share of the guest's working set a minute from \"{}\" to \"{}\", with at most two decimals",
        to_text(*RANGE_PPM.start()),
        to_text(*RANGE_PPM.end())
    );
    let read = |value: &Value| parse(value.as_str()?).filter(|ppm| RANGE_PPM.contains(ppm));
    key.or(DEFAULT_PPM, &allowed, read)
}

/// Millionths, of a text such as `0.25%`.
pub(super) fn parse(text: &str) -> Option<u32> {
    let number = text.strip_suffix('%')?;
    let (whole, part) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(part) || part.len() > 2 {
        return None;
    }
    let hundredths: u32 = format!("{part:0<2}").parse().ok()?;
    whole.parse::<u32>().ok()?.checked_mul(10_000)?.checked_add(hundredths * 100)
}

/// The text that is read back as so many millionths.
pub(super) fn to_text(ppm: u32) -> String {
    let (whole, hundredths) = (ppm / 10_000, ppm % 10_000 / 100);
    let text = if hundredths == 0 { whole.to_string() } else { format!("{whole}.{hundredths:02}") };
    let short = if hundredths == 0 { &text } else { text.trim_end_matches('0') };
    format!("{short}%")
}
