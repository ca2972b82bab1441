//! The status as metrics: every number of it under a Prometheus name, in base units, a VM's with the label `vm`. Pure
//! functions from a status to a text, so that a scrape and `status` never disagree. What is a sum over the VMs is left
//! out: `sum(…)` makes it of those that there are. The pool's counters in the status go on with what happened to VMs that
//! were removed or cleared since; here a VM's series end with it, or begin again at 0, as Prometheus expects.
//!
//! Written by hand rather than with the crate prometheus-client, which speaks OpenMetrics alone: promtool and older
//! scrapers read the format before it, where counters are declared under another name. There is nothing to register either
//! when every number is pulled from one snapshot.

mod daemon;
mod text;
mod vm;

use crate::control::api::{Exposition, Status};
use text::{Kind, Writer};

/// All metrics, as text.
#[must_use]
pub fn render(status: &Status, exposition: Exposition) -> String {
    let mut writer = Writer::new(exposition);
    daemon::write(status, &mut writer);
    vm::write(&status.vms, &mut writer);
    writer.finish()
}

/// A number of a `T`, as a metric of its own.
struct Number<T> {
    name: &'static str,
    kind: Kind,
    help: &'static str,
    of: fn(&T) -> u64,
}

/// A number that only grows while the daemon runs. `name` has no `_total`; that is added.
const fn counter<T>(name: &'static str, help: &'static str, of: fn(&T) -> u64) -> Number<T> {
    Number { name, kind: Kind::Counter, help, of }
}

/// A number that goes up and down; 0 and 1 for no and yes.
const fn gauge<T>(name: &'static str, help: &'static str, of: fn(&T) -> u64) -> Number<T> {
    Number { name, kind: Kind::Gauge, help, of }
}

/// Writes the numbers of the one `T` that there is.
fn write_numbers<T>(numbers: &[Number<T>], of: &T, writer: &mut Writer) {
    for Number { name, kind, help, of: number } in numbers {
        writer.family(name, *kind, help);
        writer.sample(&[], number(of));
    }
}

#[cfg(test)]
mod tests;
