//! Bodies of control requests and of their answers: refused, or what they change a VM to is what the configuration could
//! have said as well.

use ballast::config::{Config, LIMIT_BYTES, VmConfig, WEIGHT, parse_vm, reserves_max_bytes};
use ballast::control::api::{
    CheckOrder, CheckStatus, NewVm, PoolChange, SetError, Status, VmChange, VmDetails,
};
use ballast::control::{check, listing, table};
use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

const POOL_BYTES: u64 = 100 << 20;
const OTHER_RESERVES_BYTES: u64 = 50 << 20;

/// Which type it is to be, then the text.
pub fn run(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    match kind % 7 {
        0 => drop(parsed::<VmChange>(body).map(apply)),
        1 => drop(parsed::<PoolChange>(body)),
        2 => drop(parsed::<CheckOrder>(body)),
        3 => {
            drop(parsed::<CheckStatus>(body).map(|status| (check::summary(&status), check::verdict(&status))))
        }
        // What a client shows is what a daemon of another version says.
        4 => drop(parsed::<Status>(body).map(|status| table::render(&status))),
        5 => drop(parsed::<NewVm>(body).map(|vm| accepted(vm.keys()))),
        _ => drop(parsed::<VmDetails>(body).map(|vm| (listing::details(&vm), vm.config()))),
    }
}

/// What the body says, if it says anything; it comes back the same from its own text.
fn parsed<T: DeserializeOwned + Serialize>(body: &[u8]) -> Option<T> {
    let value: T = serde_json::from_slice(body).ok()?;
    let text = serde_json::to_string(&value).expect("it was text before");
    let again: T = serde_json::from_str(&text).expect("what was written can be read");
    assert_eq!(serde_json::to_string(&again).expect("it was text before"), text);
    Some(value)
}

fn vm() -> VmConfig {
    let text = "[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlimit = \"100MiB\"\nreserve = \"10MiB\"\n";
    Config::parse(text, 1 << 30).expect("it is right").vms.remove(0)
}

/// Lays keys over a VM's, as the daemon does with what it is told; what comes of it is refused, or in its ranges.
fn accepted(keys: Table) {
    let mut all = Table::from_iter([("name".to_owned(), Value::String("a".to_owned()))]);
    all.extend(keys);
    match parse_vm(&all) {
        Ok(vm) => {
            assert!(vm.size_bytes.is_multiple_of(4096) && u64::from(vm.slots()) == vm.size_bytes / 4096);
            assert!(vm.slots() > 0 && (1..=64).contains(&vm.queues) && WEIGHT.contains(&vm.weight));
            assert!(vm.reserve_bytes <= vm.limit_bytes && (1..=16).contains(&vm.label.len()));
        }
        Err(err) => assert!(!err.chain().is_empty()),
    }
}

fn apply(change: VmChange) {
    let before = vm();
    let keys = change.keys(&before).map(|changed| {
        let given = before.keys().into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?)));
        given.chain(changed).collect()
    });
    keys.map_or_else(|refused| assert!(!refused.to_string().is_empty()), accepted);
    match change.applied(&before, OTHER_RESERVES_BYTES, POOL_BYTES) {
        Ok(after) => {
            assert!(LIMIT_BYTES.contains(&after.limit_bytes) && WEIGHT.contains(&after.weight));
            assert!(after.reserve_bytes <= after.limit_bytes);
            let reserves = after.reserve_bytes.saturating_add(OTHER_RESERVES_BYTES);
            let fits = reserves <= reserves_max_bytes(POOL_BYTES);
            assert!(fits || after.reserve_bytes <= before.reserve_bytes);
            assert_eq!((&after.name, after.size_bytes), (&before.name, before.size_bytes));
        }
        Err(SetError::Invalid { message }) => assert!(!message.is_empty()),
        Err(err) => panic!("{err}"),
    }
}
