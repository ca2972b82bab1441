//! `kill -9` at random moments of a real daemon under load: whatever was answered before is there after the restart,
//! whatever was in flight is answered after it, and no page is anything but what was last written to it, by an
//! answered or an unanswered write. Once with room for everything, once in a pool that overflows into a file while its
//! compressor and a VM's limit change.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ballast::demo::daemon::{Daemon, DaemonSpec};
use ballast::frontend::{Device, Manners, Memory, Op, Options, Queue, Status};
use ballast::page::{Page, ZERO_PAGE};
use support::page_of;

const KILLS: u64 = 24;
const SLOTS: u64 = 6000;
const PATIENCE: Duration = Duration::from_secs(60);

/// One VM under load: what is known to be stored, and what was asked and not yet answered.
struct Load {
    device: Device,
    queues: Vec<Queue>,
    stored: HashMap<u64, Page>,
    asked: HashMap<(usize, u16), Asked>,
    noise: u64,
}

#[derive(Clone)]
enum Asked {
    Store(u64, Box<Page>),
    Load(u64),
    Discard(u64),
}

impl Asked {
    fn slot(&self) -> u64 {
        match self {
            Self::Store(slot, _) | Self::Load(slot) | Self::Discard(slot) => *slot,
        }
    }
}

impl Load {
    fn attach(socket: PathBuf, manners: Manners) -> Self {
        let options = Options {
            manners,
            queues: 2,
            queue_size: 256,
            depth: 64,
            data_bytes: 8192,
            ..Options::default()
        };
        let memory = Memory::with_bytes(16 << 20).unwrap();
        let mut device = Device::connect(socket, memory, options).unwrap();
        let queues = device.start().unwrap();
        Self { device, queues, stored: HashMap::new(), asked: HashMap::new(), noise: 7 }
    }

    fn random(&mut self) -> u64 {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        self.noise
    }

    /// Asks for something on every free tag. A slot has one request at a time, so that its content is known.
    fn ask(&mut self, n: usize) {
        while let Some(tag) = self.queues[n].free_tag() {
            let slot = 1 + self.random() % (SLOTS - 1);
            if self.asked.values().any(|asked| asked.slot() == slot) {
                break;
            }
            let queue = &mut self.queues[n];
            let asked = match self.noise >> 32 & 7 {
                0..=4 => {
                    let page = page_of((self.noise >> 40 & 0xff).try_into().unwrap(), self.noise);
                    queue.write_data(tag, 0, &page).unwrap();
                    queue.stage(tag, Op::Write { sector: slot * 8, bytes: 4096 }).unwrap();
                    Asked::Store(slot, Box::new(page))
                }
                5 | 6 => {
                    queue.stage(tag, Op::Read { sector: slot * 8, bytes: 4096 }).unwrap();
                    Asked::Load(slot)
                }
                _ => {
                    let range = ballast::frontend::Range { sector: slot * 8, sectors: 8, flags: 0 };
                    queue.write_ranges(tag, &[range]).unwrap();
                    queue.stage(tag, Op::Discard { ranges: 1 }).unwrap();
                    Asked::Discard(slot)
                }
            };
            self.asked.insert((n, tag), asked);
        }
        self.queues[n].publish().unwrap();
        self.queues[n].kick().unwrap();
    }

    fn answered(&mut self, n: usize, tag: u16, status: Status) {
        assert_eq!(status, Status::Ok);
        match self.asked.remove(&(n, tag)).expect("answered once") {
            Asked::Store(slot, page) => drop(self.stored.insert(slot, *page)),
            Asked::Discard(slot) => drop(self.stored.remove(&slot)),
            Asked::Load(slot) => {
                let mut found = ZERO_PAGE;
                self.queues[n].read_data(tag, 0, &mut found).unwrap();
                assert!(&found == self.stored.get(&slot).unwrap_or(&ZERO_PAGE), "slot {slot}");
            }
        }
    }

    fn work_until(&mut self, ended: &AtomicBool) {
        while !ended.load(Ordering::Acquire) {
            for n in 0..self.queues.len() {
                self.ask(n);
                while let Some(done) = self.queues[n].poll().unwrap() {
                    self.answered(n, done.tag, done.status);
                }
            }
        }
    }

    fn settle(&mut self) {
        for n in 0..self.queues.len() {
            while self.queues[n].in_flight() > 0 {
                let done =
                    self.queues[n].wait(PATIENCE).expect("what was in flight is answered after a restart");
                self.answered(n, done.tag, done.status);
            }
        }
    }

    fn check_everything(&mut self) {
        for slot in 1..SLOTS {
            let found = self.queues[0].read_page(slot).unwrap();
            assert!(&found == self.stored.get(&slot).unwrap_or(&ZERO_PAGE), "slot {slot}");
        }
    }
}

fn spec(dir: &Path) -> DaemonSpec {
    DaemonSpec {
        executable: PathBuf::from(env!("CARGO_BIN_EXE_ballast")),
        directory: dir.to_owned(),
        vms: vec!["web1".to_owned(), "web2".to_owned()],
        vm_keys: String::new(),
        vm_mib: 64,
        compressor: "lz4".to_owned(),
        pool_max: None,
        file: None,
    }
}

/// Kills the daemon under load at random moments; `meanwhile` is done at the time of each kill, before it.
fn kill_under_load(spec: DaemonSpec, mut meanwhile: impl FnMut(u64, &Daemon)) {
    let sockets = ["web1", "web2"].map(|vm| spec.socket(vm));
    let mut daemon = Daemon::start(spec).unwrap();
    let [one, two] = sockets;
    let mut loads = [Load::attach(one, Manners::Qemu), Load::attach(two, Manners::CloudHypervisor)];
    for kill in 0..KILLS {
        let time = Duration::from_micros(5_000 + loads[0].random() % 60_000);
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for load in &mut loads {
                let ended = &ended;
                scope.spawn(move || load.work_until(ended));
            }
            meanwhile(kill, &daemon);
            std::thread::sleep(time);
            daemon.kill_and_restart().unwrap();
            ended.store(true, Ordering::Release);
        });
        for load in &mut loads {
            load.device.reconnect(PATIENCE).unwrap();
        }
        if kill % 6 == 5 {
            for load in &mut loads {
                load.settle();
                load.check_everything();
            }
        }
    }
    for load in &mut loads {
        load.settle();
        load.check_everything();
        assert!(load.stored.len() > 1000, "{}", load.stored.len());
    }
}

#[test]
fn nothing_is_lost_when_the_daemon_is_killed_under_load() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    kill_under_load(spec(dir.path()), |_, _| {});
}

#[test]
fn nothing_is_lost_when_it_is_killed_while_pages_leave_and_pools_and_limits_change() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let files = tempfile::tempdir().unwrap();
    // About a third of what the two VMs store.
    let spec = DaemonSpec {
        pool_max: Some("6MiB".to_owned()),
        file: Some(files.path().join("writeback")),
        ..spec(dir.path())
    };
    let mut evicted = 0;
    kill_under_load(spec, |kill, daemon| {
        let compressor = ["lz4", "zstd:1", "zstd:3"][usize::try_from(kill % 3).unwrap()];
        daemon.ask(&["pool", "set", "--compressor", compressor, "--recompress"]).unwrap();
        let limit = ["64MiB", "2MiB"][usize::try_from(kill % 2).unwrap()];
        daemon.ask(&["vm", "set", "web1", "--limit", limit]).unwrap();
        let status: serde_json::Value =
            serde_json::from_str(&daemon.ask(&["status", "--json"]).unwrap()).unwrap();
        evicted += status["shrinker"]["evicted_pages"].as_u64().unwrap();
    });
    assert!(evicted > 1000, "hardly anything went to the file: {evicted}");
}
