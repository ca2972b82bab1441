//! `ballast status` for people: a few lines for what all VMs share and a row for each VM, sizes in IEC units. Pure
//! functions from a status to a text. What there is nothing to say about has no line and no column.

use super::api::{
    BalloonStatus, CompressorPoolState, PoolStatus, Status, VmStatus, WritebackState, WritebackStatus,
};
use crate::ids::Bytes;
use crate::page::PAGE_SIZE_U64;

/// A column: its heading, and what a VM has there.
type Column = (&'static str, fn(&VmStatus) -> String);

/// The columns before this one hold words and stand left; numbers stand right.
const NUMBERS_FROM: usize = 3;
const COLUMNS: [Column; 11] = [
    ("VM", |vm| vm.name.clone()),
    ("STATE", |vm| vm.state.as_str().to_owned()),
    ("CONNECTED", |vm| if vm.connected { "yes" } else { "no" }.to_owned()),
    ("SIZE", |vm| Bytes(vm.size_bytes).to_string()),
    ("STORED", |vm| pages(vm.stored_pages)),
    ("SAME-FILLED", |vm| pages(vm.same_filled_pages)),
    ("POOL", |vm| Bytes(vm.pool_bytes).to_string()),
    ("LIMIT", |vm| Bytes(vm.limit_bytes).to_string()),
    ("STORES", |vm| vm.stores.to_string()),
    ("LOADS", |vm| vm.loads.to_string()),
    ("ERRORS", |vm| vm.errors.to_string()),
];
/// Only where there is a file, or was one: it stands before the pool's bytes.
const IN_FILE: Column = ("IN FILE", |vm| pages(vm.file_pages));
const IN_FILE_AT: usize = 6;

/// The whole answer, with a newline at its end.
#[must_use]
pub fn render(status: &Status) -> String {
    let mut text = summary(status);
    text.push_str(&rows(&status.vms, status.writeback.is_some()));
    text
}

/// A row for each VM, and below them what is wrong with which.
#[must_use]
pub fn vms(vms: &[VmStatus]) -> String {
    rows(vms, false)
}

fn rows(vms: &[VmStatus], has_file: bool) -> String {
    if vms.is_empty() {
        return "no VM is configured
"
        .to_owned();
    }
    let mut columns = COLUMNS.to_vec();
    if has_file || vms.iter().any(|vm| vm.file_pages > 0) {
        columns.insert(IN_FILE_AT, IN_FILE);
    }
    let mut text = table(&columns, vms);
    for vm in vms {
        if let Some(message) = &vm.message {
            text.push_str(&format!("{}: {message}\n", vm.name));
        }
        if let Some(balloon) = &vm.balloon {
            text.push_str(&format!("{}: balloon {}\n", vm.name, self::balloon(balloon)));
        }
    }
    text
}

/// What a guest has, should have, and why.
fn balloon(balloon: &BalloonStatus) -> String {
    let has = match (balloon.actual_bytes, balloon.configured_bytes) {
        (Some(actual), Some(configured)) => format!("has {} of {}, ", Bytes(actual), Bytes(configured)),
        _ => String::new(),
    };
    let target = match (balloon.reachable, balloon.mode.as_str()) {
        (false, _) => String::new(),
        // Nobody has told its VMM.
        (true, "observe") => format!("would have {} (nothing is done): ", Bytes(balloon.target_bytes)),
        (true, _) => format!("target {}, ", Bytes(balloon.target_bytes)),
    };
    let reading_back = match balloon.reading_back_pages {
        0 => String::new(),
        left => format!("; {} are read back from the file", pages(left)),
    };
    format!("{}: {has}{target}{}{reading_back}", balloon.mode, balloon.reason)
}

/// The lines about what all VMs share, the most important one first.
#[must_use]
pub fn totals(status: &Status) -> Vec<String> {
    summary(status).lines().map(str::to_owned).collect()
}

fn summary(status: &Status) -> String {
    let mut text = pool(&status.pool);
    let (objects, left) = (status.shrinker.recompression_objects, status.shrinker.recompression_objects_left);
    if objects > 0 {
        text.push_str(&format!("recompression: {}\n", done(objects, left)));
    }
    if status.shrinker.recompression_waits {
        text.push_str("recompression: found no room, and tries again less and less often\n");
    }
    if let Some(file) = &status.writeback {
        text.push_str(&writeback(file));
    }
    if let Some(source) = &status.pool.pressure_source {
        let waited = status.memory_pressure.map(|pressure| {
            let percent = |ppm: u64| format!("{}.{:02} %", ppm / 10_000, ppm / 100 % 100);
            let (some, full) = (percent(pressure.some_avg10_ppm), percent(pressure.full_avg10_ppm));
            format!("; of the last 10 s some task waited for memory {some}, and all did {full}")
        });
        text.push_str(&format!("pressure: told by {source}{}\n", waited.unwrap_or_default()));
    }
    text
}

fn table(columns: &[Column], vms: &[VmStatus]) -> String {
    let headings = columns.iter().map(|(heading, _)| (*heading).to_owned()).collect();
    let row = |vm| columns.iter().map(|(_, cell)| cell(vm)).collect();
    let rows: Vec<Vec<String>> = std::iter::once(headings).chain(vms.iter().map(row)).collect();
    let mut widths = vec![0; columns.len()];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, width))| {
            if column < NUMBERS_FROM { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

/// How many of so many objects are done with, when some are left.
fn done(objects: u64, left: u64) -> String {
    let done = objects.saturating_sub(left);
    let percent = u128::from(done) * 100 / u128::from(objects.max(1));
    format!("{done} of {objects} objects done ({percent} %)")
}

fn pages(pages: u64) -> String {
    Bytes(pages.saturating_mul(PAGE_SIZE_U64)).to_string()
}

/// The pool's line, and what there is to say beyond it: that it is full, which pools drain.
#[must_use]
pub fn pool(pool: &PoolStatus) -> String {
    let by_file = match pool.file_pages {
        0 => String::new(),
        in_file => format!(", {} of it by the file", pages(in_file)),
    };
    let mut text = format!(
        "pool: {} of {} used, payload {}, metadata {}; {} stored ({}), ratio {}, saved {}{by_file}\n",
        Bytes(pool.used_bytes),
        Bytes(pool.max_bytes),
        Bytes(pool.payload_bytes),
        Bytes(pool.metadata_bytes),
        pages(pool.stored_pages),
        pool.compressor,
        ratio(pool),
        Bytes(pool.saved_bytes()),
    );
    if pool.full {
        text.push_str(&match (&pool.stuck, pool.accept_threshold_percent) {
            (None, percent) => format!("full: pages leave until less than {percent} % is used\n"),
            (Some(reason), _) => format!("full: no page can leave ({reason}), so new ones are refused\n"),
        });
    }
    // A VM at its limit has its writes wait, too, whatever the pool is.
    if pool.waiting_stores > 0 {
        text.push_str(&format!("writes that wait for room: {}\n", pool.waiting_stores));
    }
    let (no_memory, no_room) = (pool.counters.reject_alloc_fail, pool.counters.reject_reclaim_fail);
    if no_memory > 0 {
        text.push_str(&format!(
            "stores that failed: {no_memory}, as the state directory had no memory left; their guests keep those pages\n"
        ));
    }
    if no_room > 0 {
        text.push_str(&format!(
            "stores that failed: {no_room}, as no room was made in time; their guests keep those pages\n"
        ));
    }
    if pool.counters.bad_pages > 0 {
        let pages = pool.counters.bad_pages;
        text.push_str(&format!("bad pages found: {pages}; `ballast check` says which are still there\n"));
    }
    if pool.mended_pages > 0 {
        let pages = pool.mended_pages;
        text.push_str(&format!(
            "pages of the pool's memory that failed: {pages}; the host's memory or a disk is failing\n"
        ));
    }
    for cold in pool.pools.iter().filter(|pool| pool.state == CompressorPoolState::Cold && pool.objects > 0) {
        text.push_str(&format!("cold: {}, objects: {}\n", cold.compressor, cold.objects));
    }
    if pool.deduplicated_bytes > 0 {
        let saved = Bytes(pool.deduplicated_bytes);
        let (pages, objects) = (pool.shared_pages, pool.shared_objects);
        text.push_str(&format!("equal pages: {pages}, kept as {objects} objects; {saved} saved by that\n"));
    }
    for old in pool.pools.iter().filter(|pool| pool.state == CompressorPoolState::Draining) {
        // A daemon that is older than its client doesn't say how many there were.
        let of = match old.objects_at_first {
            0 => String::new(),
            at_first => format!("; {}", done(at_first, old.objects)),
        };
        text.push_str(&format!("draining: {}, objects left: {}{of}\n", old.compressor, old.objects));
    }
    text
}

fn writeback(file: &WritebackStatus) -> String {
    let limit = file.daily_limit_bytes.map_or_else(String::new, |limit| format!(" of {}", Bytes(limit)));
    let reason = file.message.as_ref().map_or_else(String::new, |message| format!(" ({message})"));
    if file.state == WritebackState::Missing {
        return format!("writeback: missing{reason}\n");
    }
    format!(
        "writeback: {}{reason}; {} of {} in use, {}{limit} written today\n",
        file.state.as_str(),
        Bytes(file.live_bytes),
        Bytes(file.size_bytes),
        Bytes(file.written_today_bytes),
    )
}

/// A VM's share of the pool, as `vm set` left it.
#[must_use]
pub fn share(vm: &VmStatus) -> String {
    format!(
        "{}: limit {}, reserve {}, weight {}, writeback {}\n",
        vm.name,
        Bytes(vm.limit_bytes),
        Bytes(vm.reserve_bytes),
        vm.weight,
        vm.writeback
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

#[cfg(test)]
mod tests {
    use super::super::api::{
        CompressorPool, Counters, MemoryPressure, ShrinkerStatus, VmState, WritebackState,
    };
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
            ..PoolStatus::default()
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

    #[test]
    fn what_is_full_or_drains_or_is_in_the_file_is_said() {
        let draining = CompressorPool {
            compressor: "lz4".to_owned(),
            state: CompressorPoolState::Draining,
            objects: 7,
            objects_at_first: 20,
        };
        let pool = PoolStatus {
            compressor: "zstd:3".to_owned(),
            full: true,
            accept_threshold_percent: 90,
            waiting_stores: 3,
            counters: Counters { bad_pages: 2, ..Counters::default() },
            mended_pages: 1,
            pools: vec![CompressorPool::default(), draining],
            pressure_source: Some("psi+cgroup".to_owned()),
            ..PoolStatus::default()
        };
        let writeback = WritebackStatus {
            state: WritebackState::Failed,
            message: Some("no space".to_owned()),
            size_bytes: 64 << 30,
            live_bytes: 1 << 30,
            written_today_bytes: 2 << 30,
            daily_limit_bytes: Some(3 << 30),
            ..WritebackStatus::default()
        };
        let shrinker = ShrinkerStatus {
            recompression_waits: true,
            recompression_objects: 9,
            recompression_objects_left: 7,
            ..ShrinkerStatus::default()
        };
        let vm = VmStatus { name: "web1".to_owned(), file_pages: 512, ..VmStatus::default() };
        let mut status = Status {
            pool,
            shrinker,
            writeback: Some(writeback),
            memory_pressure: Some(MemoryPressure { some_avg10_ppm: 120_500, full_avg10_ppm: 600 }),
            vms: vec![vm.clone()],
            ..Status::default()
        };
        let expected = "\
pool: 0B of 0B used, payload 0B, metadata 0B; 0B stored (zstd:3), ratio -, saved 0B
full: pages leave until less than 90 % is used
writes that wait for room: 3
bad pages found: 2; `ballast check` says which are still there
pages of the pool's memory that failed: 1; the host's memory or a disk is failing
draining: lz4, objects left: 7; 13 of 20 objects done (65 %)
recompression: 2 of 9 objects done (22 %)
recompression: found no room, and tries again less and less often
writeback: failed (no space); 1GiB of 64GiB in use, 2GiB of 3GiB written today
pressure: told by psi+cgroup; of the last 10 s some task waited for memory 12.05 %, and all did 0.06 %
VM    STATE  CONNECTED  SIZE  STORED  SAME-FILLED  IN FILE  POOL  LIMIT  STORES  LOADS  ERRORS
web1  ready  no           0B      0B           0B     2MiB    0B     0B       0      0       0
";
        assert_eq!(render(&status), expected);
        status.pool.stuck = Some("there is no writeback file".to_owned());
        let stuck = "full: no page can leave (there is no writeback file), so new ones are refused\n";
        assert!(render(&status).contains(stuck));
        if let Some(file) = &mut status.writeback {
            file.state = WritebackState::Missing;
        }
        assert!(render(&status).contains("writeback: missing (no space)\n"));
        status.writeback = None;
        assert!(render(&status).contains("IN FILE"), "pages may be left of a file that was taken away");
        status.vms = vec![VmStatus::default()];
        assert!(!render(&status).contains("IN FILE"));
        let vm = VmStatus { limit_bytes: 1 << 30, weight: 100, ..vm };
        assert_eq!(share(&vm), "web1: limit 1GiB, reserve 0B, weight 100, writeback false\n");
    }

    #[test]
    fn cold_pages_and_pages_that_are_read_back_are_said() {
        let cold = CompressorPool {
            compressor: "zstd:9+dictionary".to_owned(),
            state: CompressorPoolState::Cold,
            objects: 7,
            objects_at_first: 0,
        };
        let pools = vec![CompressorPool::default(), cold];
        let mut status = Status { pool: PoolStatus { pools, ..PoolStatus::default() }, ..Status::default() };
        assert!(render(&status).contains("\ncold: zstd:9+dictionary, objects: 7\n"));
        let pool = &mut status.pool;
        (pool.shared_pages, pool.shared_objects, pool.deduplicated_bytes) = (70, 9, 12 << 10);
        status.pool.file_pages = 256;
        (status.pool.counters.reject_alloc_fail, status.pool.counters.reject_reclaim_fail) = (3, 4);
        let text = render(&status);
        for line in [
            "stores that failed: 3, as the state directory had no memory left; their guests keep those pages",
            "stores that failed: 4, as no room was made in time; their guests keep those pages",
        ] {
            assert!(text.lines().any(|other| other == line), "{text}");
        }
        assert!(text.lines().next().unwrap().ends_with("saved 1MiB, 1MiB of it by the file"), "{text}");
        assert!(render(&status).contains("\nequal pages: 70, kept as 9 objects; 12KiB saved by that\n"));
        let balloon = BalloonStatus {
            mode: "auto".to_owned(),
            reason: "off".to_owned(),
            reading_back_pages: 512,
            ..BalloonStatus::default()
        };
        status.vms = vec![VmStatus { balloon: Some(balloon), ..VmStatus::default() }];
        assert!(render(&status).ends_with(": balloon auto: off; 2MiB are read back from the file\n"));
    }

    #[test]
    fn a_target_that_is_only_worked_out_is_none() {
        let shown = |mode: &str| {
            balloon(&BalloonStatus {
                mode: mode.to_owned(),
                reachable: true,
                configured_bytes: Some(1 << 30),
                actual_bytes: Some(512 << 20),
                target_bytes: 256 << 20,
                reason: "squeezed by 256MiB".to_owned(),
                ..BalloonStatus::default()
            })
        };
        assert_eq!(shown("auto"), "auto: has 512MiB of 1GiB, target 256MiB, squeezed by 256MiB");
        assert_eq!(
            shown("observe"),
            "observe: has 512MiB of 1GiB, would have 256MiB (nothing is done): squeezed by 256MiB"
        );
    }
}
