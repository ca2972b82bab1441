//! What the policy was told and what it decided, a line of JSON a tick, so that each decision can be made again: with a
//! newer policy, or at a desk. A line stands for itself, because it holds what was kept from the ticks before it too; so a
//! trace may begin and end anywhere.

use std::io::{self, BufRead, Write};

use serde::{Deserialize, Serialize};

use super::decision::Decision;
use super::share::decide_all;
use super::snapshot::{Host, Snapshot};
use super::state::State;

/// What lines are written in. Changes whenever something in them means another thing, or a decision rests on more.
const VERSION: u32 = 5;
/// The oldest that is read as well: version 4 had neither whether a guest's pages had nowhere to go before nor what it was on
/// its way to, version 3 neither where the shrinker begins nor what is on its way as a guest speaks, version 2 neither what
/// guests say of their swaps nor the loads of all pages.
const VERSION_OLDEST: u32 = 2;
/// No line is longer, in bytes: some thousand VMs.
const LINE_BYTES_MAX: u64 = 8 << 20;

/// One tick.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tick {
    version: u32,
    /// The host.
    pub host: Host,
    /// The VMs that the policy knows.
    pub vms: Vec<Step>,
}

/// One VM at one tick.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// What was known.
    pub snapshot: Snapshot,
    /// What was kept from the ticks before.
    pub state: State,
    /// What was decided.
    pub decision: Decision,
}

impl Tick {
    /// Decides, and notes it. `states` go with `snapshots` by their order, and are those for the next tick afterwards.
    pub fn decide(host: Host, snapshots: Vec<Snapshot>, states: &mut [State]) -> Self {
        let before = states.to_vec();
        let decisions = decide_all(&host, &snapshots, states);
        let steps = snapshots.into_iter().zip(before).zip(decisions);
        let vms = steps.map(|((snapshot, state), decision)| Step { snapshot, state, decision }).collect();
        Self { version: VERSION, host, vms }
    }

    /// What the policy decides today, told the same.
    #[must_use]
    pub fn again(&self) -> Self {
        let snapshots = self.vms.iter().map(|step| step.snapshot.clone()).collect();
        let mut states: Vec<State> = self.vms.iter().map(|step| step.state).collect();
        Self::decide(self.host, snapshots, &mut states)
    }

    /// Writes it as a line.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        to.write_all(&line)
    }
}

/// Why a trace can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Its file can't.
    #[error("line {line} can't be read: give a balloon.trace as the daemon wrote it")]
    Read {
        /// The line, from 1.
        line: usize,
        /// What happened.
        source: io::Error,
    },
    /// It is no trace.
    #[error("line {line} is no tick of a trace: give a balloon.trace as the daemon wrote it")]
    Malformed {
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
    /// Another version wrote it.
    #[error(
        "line {line} is of version {version}, and versions {VERSION_OLDEST} to {VERSION} are read: replay it with the ballast that wrote it"
    )]
    Version {
        /// The line, from 1.
        line: usize,
        /// Its version.
        version: u64,
    },
}

/// The ticks of a trace. The last line may be cut short, as it is when its writer was killed.
pub fn read(mut from: impl BufRead) -> impl Iterator<Item = Result<Tick, TraceError>> {
    let mut number = 0;
    std::iter::from_fn(move || {
        let line = number + 1;
        let mut text = Vec::new();
        match io::Read::take(&mut from, LINE_BYTES_MAX).read_until(b'\n', &mut text) {
            Ok(0) => return None,
            Ok(_) => number = line,
            Err(source) => return Some(Err(TraceError::Read { line, source })),
        }
        match parse(line, &text) {
            Err(TraceError::Malformed { .. }) if text.last() != Some(&b'\n') && line > 1 => None,
            parsed => Some(parsed),
        }
    })
}

fn parse(line: usize, text: &[u8]) -> Result<Tick, TraceError> {
    let malformed = |source| TraceError::Malformed { line, source };
    let value: serde_json::Value = serde_json::from_slice(text).map_err(malformed)?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if !(VERSION_OLDEST.into()..=VERSION.into()).contains(&version) => {
            Err(TraceError::Version { line, version })
        }
        _ => serde_json::from_value(value).map_err(malformed),
    }
}
