//! `ballast status` for people: a line for the pool and a row for each VM, sizes in IEC units. A pure function from a
//! status to a text.

use super::api::{PoolStatus, Status, VmStatus};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

const HEADINGS: [&str; 11] = [
    "VM",
    "STATE",
    "CONNECTED",
    "SIZE",
    "STORED",
    "SAME-FILLED",
    "POOL",
    "LIMIT",
    "STORES",
    "LOADS",
    "ERRORS",
];
/// The columns before this one hold words and stand left; numbers stand right.
const NUMBERS_FROM: usize = 3;

/// The whole answer, with a newline at its end.
#[must_use]
pub fn render(status: &Status) -> String {
    let mut text = pool_line(&status.pool);
    if status.vms.is_empty() {
        text.push_str("no VM is configured\n");
        return text;
    }
    let rows: Vec<_> =
        std::iter::once(HEADINGS.map(str::to_owned)).chain(status.vms.iter().map(row)).collect();
    let mut widths = [0; HEADINGS.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    for row in &rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            if column < NUMBERS_FROM { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    for vm in &status.vms {
        if let Some(message) = &vm.message {
            text.push_str(&format!("{}: {message}\n", vm.name));
        }
    }
    text
}

fn pool_line(pool: &PoolStatus) -> String {
    let stored_bytes = pool.stored_pages.saturating_mul(PAGE_SIZE_U64);
    let cost_bytes = pool.used_bytes.saturating_add(pool.metadata_bytes);
    format!(
        "pool: {} of {} used, payload {}, metadata {}; {} stored ({}), ratio {}, saved {}\n",
        Bytes(pool.used_bytes),
        Bytes(pool.max_bytes),
        Bytes(pool.payload_bytes),
        Bytes(pool.metadata_bytes),
        Bytes(stored_bytes),
        pool.compressor,
        ratio(pool),
        Bytes(stored_bytes.saturating_sub(cost_bytes)),
    )
}

/// What the codec makes of the pages it sees, to two places; same-filled pages are not its merit.
fn ratio(pool: &PoolStatus) -> String {
    let compressed_pages = pool.stored_pages.saturating_sub(pool.same_filled_pages);
    let hundredths = u128::from(compressed_pages) * u128::from(PAGE_SIZE_U64) * 100;
    match hundredths.checked_div(u128::from(pool.payload_bytes)) {
        Some(hundredths) => format!("{}.{:02}", hundredths / 100, hundredths % 100),
        None => "-".to_owned(),
    }
}

fn row(vm: &VmStatus) -> [String; HEADINGS.len()] {
    let pages = |pages: u64| Bytes(pages.saturating_mul(PAGE_SIZE_U64)).to_string();
    [
        vm.name.clone(),
        vm.state.as_str().to_owned(),
        if vm.connected { "yes" } else { "no" }.to_owned(),
        Bytes(vm.size_bytes).to_string(),
        pages(vm.stored_pages),
        pages(vm.same_filled_pages),
        Bytes(vm.pool_bytes).to_string(),
        Bytes(vm.limit_bytes).to_string(),
        vm.stores.to_string(),
        vm.loads.to_string(),
        vm.errors.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::api::VmState;
    use super::*;

    #[test]
    fn the_pool_has_a_line_and_each_vm_a_row() {
        let web = VmStatus {
            name: "web1".to_owned(),
            size_bytes: 4 << 30,
            limit_bytes: 1 << 30,
            stored_pages: 1024,
            same_filled_pages: 24,
            pool_bytes: 1 << 20,
            stores: 2048,
            loads: 5,
            connected: true,
            ..VmStatus::default()
        };
        let damaged = VmStatus {
            name: "a-long-name".to_owned(),
            state: VmState::Damaged,
            message: Some("its page table is damaged".to_owned()),
            ..VmStatus::default()
        };
        let pool = PoolStatus {
            max_bytes: 2 << 30,
            used_bytes: 1 << 20,
            payload_bytes: 1000 << 10,
            metadata_bytes: 32 << 10,
            stored_pages: 1024,
            same_filled_pages: 24,
            compressor: "lz4".to_owned(),
        };
        let text = render(&Status { pool, vms: vec![web, damaged], ..Status::default() });
        let expected = "\
pool: 1MiB of 2GiB used, payload 1000KiB, metadata 32KiB; 4MiB stored (lz4), ratio 4.00, saved 2.96MiB
VM           STATE    CONNECTED  SIZE  STORED  SAME-FILLED  POOL  LIMIT  STORES  LOADS  ERRORS
web1         ready    yes        4GiB    4MiB        96KiB  1MiB   1GiB    2048      5       0
a-long-name  damaged  no           0B      0B           0B    0B     0B       0      0       0
a-long-name: its page table is damaged
";
        assert_eq!(text, expected);
    }

    #[test]
    fn an_empty_daemon_divides_by_nothing() {
        let text = render(&Status::default());
        assert!(text.contains("ratio -, saved 0B"), "{text}");
        assert!(text.ends_with("no VM is configured\n"), "{text}");
    }
}
