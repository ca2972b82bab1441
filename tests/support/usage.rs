//! What a process takes of its host.

use std::fs;

/// What a process takes, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Memory that is its own, swapped or not: neither the arena and the page tables nor its guests' memory, which are
    /// shared mappings, nor its program, which is the page cache's.
    pub private_bytes: u64,
    /// File descriptors.
    pub descriptors: u64,
    /// Threads.
    pub threads: u64,
}

impl Usage {
    /// What the process `pid` takes.
    pub fn of(pid: u32) -> Self {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
        let number = |key: &str| -> u64 {
            let line =
                status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{key}"));
            line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().expect("a number")
        };
        let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).expect("it is ours").count();
        Self {
            private_bytes: (number("RssAnon") + number("VmSwap")) << 10,
            descriptors: descriptors as u64,
            threads: number("Threads"),
        }
    }
}
