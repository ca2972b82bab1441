//! The balloon policy at a desk: on recorded ticks, and on guests that are not there.

use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use anyhow::{Context, bail};
use ballast::balloon::simulate::{self, SCENARIOS, Scenario};
use ballast::balloon::trace::{self, Step, Tick};
use ballast::balloon::{Host, Vmm};
use ballast::config::nearest;
use ballast::ids::Bytes;

use super::{Global, print};

/// A VM at a tick, in a line.
fn line(host: &Host, step: &Step) -> String {
    let actual = match &step.snapshot.vmm {
        Vmm::Answers(memory) => Bytes(memory.actual_bytes).to_string(),
        Vmm::Silent(_) | Vmm::Gone(_) => "-".to_owned(),
    };
    let (seconds, decision) = (host.now_ms / 1000, &step.decision);
    let target = if decision.apply { Bytes(decision.target_bytes).to_string() } else { "-".to_owned() };
    format!(
        "{seconds:>8} s  {:<12} has {actual:>9}, target {target:>9}  {}",
        step.snapshot.vm, decision.reason
    )
}

pub fn replay(global: &Global, file: &Path) -> anyhow::Result<()> {
    let named = || format!("the trace {}", file.display());
    let trace = BufReader::new(File::open(file).with_context(|| {
        format!(
            "{} can't be read; name balloon.trace in the state directory, or what `ballast simulate NAME --json` printed",
            named()
        )
    })?);
    let (mut decisions, mut others) = (0, 0);
    for tick in trace::read(trace) {
        let tick = tick.with_context(named)?;
        let again = tick.again();
        if global.json {
            again.write(std::io::stdout().lock())?;
        }
        for (before, now) in tick.vms.iter().zip(&again.vms) {
            decisions += 1;
            let mut text = line(&tick.host, now);
            if before.decision != now.decision {
                others += 1;
                write!(
                    text,
                    "\n{:>14}was target {}: {}",
                    "",
                    Bytes(before.decision.target_bytes),
                    before.decision.reason
                )?;
            }
            if !global.json {
                print(&format!("{text}\n"))?;
            }
        }
    }
    if decisions == 0 {
        bail!(
            "{} has no decision: the daemon writes one at each look at a VM that has `squeeze`; name balloon.trace in its state directory once it has",
            named()
        );
    }
    if others > 0 {
        bail!(
            "{others} of {decisions} decisions would be others: the policy has changed since, so replay it with the ballast that wrote it, or see above what changed"
        );
    }
    Ok(())
}

pub fn simulate(global: &Global, scenario: Option<&str>) -> anyhow::Result<()> {
    let list = || {
        SCENARIOS
            .iter()
            .map(|scenario| format!("{:<9} {}\n", scenario.name, scenario.about))
            .collect::<String>()
    };
    let Some(name) = scenario else { return print(&list()) };
    let Some(scenario) = simulate::named(name) else {
        let names: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
        let meant = nearest(name, &names).map(|meant| format!(" (was {meant:?} meant?)")).unwrap_or_default();
        bail!("there is no scenario {name:?}{meant}; name one of these:\n{}", list().trim_end());
    };
    run(global, scenario)
}

fn run(global: &Global, scenario: &Scenario) -> anyhow::Result<()> {
    let mut simulation = scenario.begin();
    for number in 0..scenario.ticks {
        scenario.turn(number, simulation.guests());
        let tick = simulation.tick();
        if global.json {
            tick.write(std::io::stdout().lock())?;
        } else {
            show(&tick, simulation.guests())?;
        }
    }
    Ok(())
}

fn show(tick: &Tick, guests: &[simulate::Guest]) -> anyhow::Result<()> {
    for (step, guest) in tick.vms.iter().zip(guests) {
        let (out, waits) = (Bytes(guest.swapped()), guest.stalled() * 100.0);
        let signals = step.state.look.unwrap_or_default();
        let text = line(&tick.host, step);
        print(&format!(
            "{text}  [out {out}, back {:.2} %/min, waits {waits:.1} %]\n",
            signals.promotion_ppm as f64 / 1e4
        ))?;
    }
    Ok(())
}
