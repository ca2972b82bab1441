//! The words that name things, as types: which slot, which VM, how many bytes. They carry no behaviour
//! beyond reading and printing themselves.

use std::fmt;
use std::str::FromStr;

/// The index of a page on a VM's device; the device offset divided by the page size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// The slot as an index into a table.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A VM's durable number. It is on disk before its first use and is never given to another VM, so a page
/// that carries it can't be taken for somebody else's. Zero is no VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub u32);

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose page something holds: an object, or a record of the writeback file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The VM that stored the page.
    pub vm: VmId,
    /// The slot that it was stored to.
    pub slot: Slot,
}

impl Owner {
    /// Nobody in particular: several slots of `vm` have the same page. No disk has that many slots.
    #[must_use]
    pub fn shared(vm: VmId) -> Self {
        Self { vm, slot: Slot(u32::MAX) }
    }

    /// Whether that is who owns it.
    #[must_use]
    pub fn is_shared(self) -> bool {
        self == Self::shared(self.vm)
    }
}

/// A number of bytes, read and printed in IEC units: `512MiB`, `1.5GiB`, `4096B`. Without a unit it is none: a number alone
/// is more likely a unit that was forgotten than so many bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    /// It is no number with a unit, or more than 2^64 bytes.
    #[error(
        "{given:?} is not a size: write a number and an IEC unit (B, KiB, MiB, GiB or TiB), for example \"512MiB\""
    )]
    Malformed {
        /// The text.
        given: String,
    },
    /// Its unit is none of ours, and there is one of ours that was probably meant.
    #[error("{given:?} is not in IEC units (B, KiB, MiB, GiB, TiB): did you mean \"{meant}\"?")]
    Unit {
        /// The text.
        given: String,
        /// The same number with the unit that is nearest.
        meant: String,
    },
    /// It is a number alone.
    #[error("{given} has no unit: write \"{given}MiB\" or \"{given}GiB\", or \"{given}B\" for so many bytes")]
    NoUnit {
        /// The text.
        given: String,
    },
}

impl ParseBytesError {
    /// What was probably meant, if that can be told.
    #[must_use]
    pub fn meant(&self) -> Option<String> {
        match self {
            Self::Malformed { .. } => None,
            Self::Unit { meant, .. } => Some(meant.clone()),
            Self::NoUnit { given } => Some(format!("{given}MiB")),
        }
    }
}

/// The unit that is nearest to another spelling of it: `8G`, `8gb` and `8Gi` are meant to be `8GiB`.
fn nearest_unit(unit: &str) -> Option<&'static str> {
    let unit = unit.to_ascii_lowercase();
    if matches!(unit.as_str(), "byte" | "bytes") {
        return Some("B");
    }
    let rest_is_near = unit.chars().skip(1).all(|c| matches!(c, 'i' | 'b'));
    let begins_as = |name: &str| unit.chars().next() == name.to_ascii_lowercase().chars().next();
    let found = UNITS.iter().find(|(name, _)| name.len() > 1 && rest_is_near && begins_as(name));
    found.map(|(name, _)| *name)
}

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let err = || ParseBytesError::Malformed { given: text.to_owned() };
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if unit.is_empty() && number.parse::<f64>().is_ok() && !number.ends_with('.') {
            return Err(ParseBytesError::NoUnit { given: number.to_owned() });
        }
        let unit = unit.trim();
        let Some(&(_, unit)) = UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)) else {
            let meant = nearest_unit(unit).map(|unit| format!("{}{unit}", number.trim_end()));
            let meant = meant.filter(|meant| meant.parse::<Self>().is_ok()).ok_or_else(err)?;
            return Err(ParseBytesError::Unit { given: text.to_owned(), meant });
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let whole: u64 = whole.parse().map_err(|_| err())?;
        // Nine decimal places are more than any size is written with, and keep the sum inside u128.
        if fraction.len() > 9 || number.ends_with('.') {
            return Err(err());
        }
        let part: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| err())? };
        let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| err())?);
        let bytes = u128::from(whole) * u128::from(unit) + part * u128::from(unit) / scale;
        u64::try_from(bytes).map(Bytes).map_err(|_| err())
    }
}

impl Bytes {
    /// A text that is read back as exactly this many bytes, with the largest unit that allows it.
    #[must_use]
    pub fn exact(self) -> String {
        let fits = |(_, unit): &&(&str, u64)| self.0 >= *unit && self.0.is_multiple_of(*unit);
        let (name, unit) = UNITS.iter().find(fits).copied().unwrap_or(("B", 1));
        format!("{}{name}", self.0 / unit)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, unit) = UNITS.iter().find(|(_, unit)| self.0 >= *unit).copied().unwrap_or(("B", 1));
        let (whole, rest) = (self.0 / unit, self.0 % unit);
        let text = if rest == 0 {
            format!("{whole}{name}")
        } else {
            // Hundredths, rounded down: a size is never shown as more than it is.
            format!("{whole}.{:02}{name}", u128::from(rest) * 100 / u128::from(unit))
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_iec_units() {
        for (text, bytes) in
            [("0B", 0), ("4096 B", 4096), ("4KiB", 4096), ("1.5 GiB", 3 << 29), ("2tib", 2 << 40), ("7B", 7)]
        {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn an_exact_size_is_read_back_as_it_was() {
        for (bytes, text) in [(0, "0B"), (1 << 30, "1GiB"), ((1 << 30) + 1024, "1048577KiB"), (4097, "4097B")]
        {
            assert_eq!((Bytes(bytes).exact(), text.parse()), (text.to_owned(), Ok(Bytes(bytes))));
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in
            ["", "GiB", "GB", "1EB", "1Mbit", "-1", "1..5KiB", "1.", "99999999TiB", "1.0000000001GiB", "0x10"]
        {
            let error = text.parse::<Bytes>().unwrap_err();
            assert_eq!(error, ParseBytesError::Malformed { given: text.to_owned() });
        }
    }

    #[test]
    fn another_spelling_of_a_unit_is_refused_with_ours() {
        for (text, meant) in [
            ("8GB", "8GiB"),
            ("8G", "8GiB"),
            ("8g", "8GiB"),
            ("1.5 gb", "1.5GiB"),
            ("512Mi", "512MiB"),
            ("7k", "7KiB"),
            ("2T", "2TiB"),
            ("4096 bytes", "4096B"),
        ] {
            let error = text.parse::<Bytes>().unwrap_err();
            assert_eq!(error.meant().as_deref(), Some(meant), "{text}");
            assert!(error.to_string().ends_with(&format!("did you mean \"{meant}\"?")), "{error}");
        }
    }

    #[test]
    fn a_number_alone_is_refused_with_what_it_may_have_meant() {
        for text in ["0", "4096", "1.5"] {
            let error = text.parse::<Bytes>().unwrap_err().to_string();
            assert!(error.contains(&format!("write \"{text}MiB\"")), "{error}");
        }
    }

    #[test]
    fn sizes_are_printed_in_iec_units() {
        for (bytes, text) in [(0, "0B"), (4096, "4KiB"), (3 << 29, "1.50GiB"), (1023, "1023B")] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
    }
}
