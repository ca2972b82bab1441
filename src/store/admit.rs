//! How a VM comes into service: with the table that was found of it, or with a new one; and what is said when it doesn't.

use std::sync::Arc;

use super::accounting::Held;
use super::dictionaries::Dictionaries;
use super::recovery::Recovered;
use super::room::Shared;
use super::sharing::Sharing;
use super::state::{StateDir, StateError};
use super::table::Table;
use super::vm::{Limits, VmStore};
use super::{ClearError, Damaged, VmSpec, VmState};

/// The VM of a table, or what is wrong with the table as a whole.
///
/// # Errors
/// When its dictionaries can't be read, which says nothing about them.
pub(super) fn serve(
    recovered: Recovered,
    spec: Option<&VmSpec>,
    dir: &StateDir,
    shared: &Arc<Shared>,
) -> Result<Result<VmState, String>, StateError> {
    Ok(Ok(match recovered {
        Recovered::Whole { table, held, sharing } => {
            let limits = spec.map_or(Limits::NONE, |spec| spec.limits);
            let tables = dir.tables_path();
            let dictionaries = Dictionaries::open(&tables, table.name(), table.vm())
                .map_err(StateError::io("read dictionaries in", &tables))?;
            let vm =
                Arc::new(VmStore::new(*table, dictionaries, Arc::clone(shared), limits, (held, sharing)));
            if spec.is_some() { VmState::Ready(vm) } else { VmState::Unconfigured(vm) }
        }
        Recovered::Unusable { reason } => return Ok(Err(reason)),
        Recovered::Damaged { reason, named } => VmState::Damaged(Damaged { reason, named: Arc::new(named) }),
    }))
}

/// Makes the table of a new VM.
///
/// # Errors
/// When there is no room for it.
pub(super) fn create(
    dir: &mut StateDir,
    spec: &VmSpec,
    shared: &Arc<Shared>,
) -> Result<Arc<VmStore>, ClearError> {
    let id = dir.next_vm_id()?;
    let table = Table::create(&dir.table_path(&spec.name), id, &spec.name, spec.slots)?;
    let tables = dir.tables_path();
    let dictionaries = Dictionaries::open(&tables, &spec.name, id)
        .map_err(StateError::io("read dictionaries in", &tables))?;
    let nothing = (Held::default(), Sharing::default());
    Ok(Arc::new(VmStore::new(table, dictionaries, Arc::clone(shared), spec.limits, nothing)))
}

/// Why a new VM is out of service, and what to do.
pub(super) fn not_made(name: &str, err: &dyn std::error::Error) -> String {
    let cause = std::iter::successors(Some(err), |err| err.source()).map(ToString::to_string);
    format!(
        "the VM is new, and what it needs in the state directory can't be made: {}; the file system may need room: make \
         some, and run `ballast vm clear {name}` or start the daemon again",
        cause.collect::<Vec<_>>().join(": ")
    )
}
