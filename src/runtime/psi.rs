//! What the kernel says of the host's memory pressure, for whoever looks at the status; what is done about pressure goes by
//! triggers ([`crate::reclaim::pressure`]). The format is that of Documentation/accounting/psi.rst.

const FILE: &str = "/proc/pressure/memory";

/// The shares of the last ten seconds in which tasks stood still for want of memory, in millionths.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Psi {
    /// At least one did.
    pub some_avg10_ppm: u64,
    /// All did.
    pub full_avg10_ppm: u64,
}

/// Those of this moment; `None` where the kernel keeps none.
pub(super) fn now() -> Option<Psi> {
    parse(&std::fs::read_to_string(FILE).ok()?)
}

fn parse(text: &str) -> Option<Psi> {
    let avg10_ppm = |kind: &str| {
        let line = text.lines().find(|line| line.split(' ').next() == Some(kind))?;
        ppm(line.split(' ').find_map(|word| word.strip_prefix("avg10="))?)
    };
    Some(Psi { some_avg10_ppm: avg10_ppm("some")?, full_avg10_ppm: avg10_ppm("full")? })
}

/// A percentage with two places, as the kernel prints it.
fn ppm(percent: &str) -> Option<u64> {
    let (whole, hundredths) = percent.split_once('.').filter(|(_, places)| places.len() == 2)?;
    let (whole, hundredths): (u64, u64) = (whole.parse().ok()?, hundredths.parse().ok()?);
    whole.checked_mul(10_000)?.checked_add(hundredths * 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_are_read_exactly_and_garbage_is_none() {
        let text = "some avg10=1.05 avg60=0.20 avg300=0.00 total=7\nfull avg10=100.00 avg60=0.00 avg300=0.00 total=0\n";
        assert_eq!(parse(text), Some(Psi { some_avg10_ppm: 10_500, full_avg10_ppm: 1_000_000 }));
        for garbage in
            ["", "some avg10=1.05\n", "some avg10=1.05\nfull avg10=1\n", "some avg10=-1.00\nfull avg10=0.00"]
        {
            assert_eq!(parse(garbage), None, "{garbage}");
        }
    }
}
