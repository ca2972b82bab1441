//! Pages of the state directory's files that can't be read any more, as memory with a hard error or a dying disk leaves
//! them: a Btrfs, whose checksums turn a changed byte of its image into an error for whoever touches that page. A page of
//! the arena costs the pages that were stored in it and nothing else; one of a page table takes that VM out of service.
//! And the hard errors of the kernel of a booted guest. Takes root, for the mount.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ballast::frontend::Queue;
use ballast::page::{PAGE_SIZE, Page};
use support::daemon::Daemon;
use support::debian::{self, Files};
use support::mount::{Loop, Mount};
use support::page_of;

const IMAGE_BYTES: u64 = 256 << 20;
const TWO_VMS: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\ncold_compressor = \"none\"\n\
    [[vm]]\nname = \"web1\"\nsize = \"32MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"32MiB\"\n";
const PAGES: u64 = 600;
const FIRST: u64 = 10;

/// A file system on a disk that fails where it is told to.
struct Dying {
    // Given back in this order.
    mount: Option<Mount>,
    device: Loop,
    dir: tempfile::TempDir,
}

impl Dying {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(IMAGE_BYTES).unwrap();
        let made =
            Command::new("mkfs.btrfs").args(["--quiet", "--data", "single"]).arg(&image).status().unwrap();
        assert!(made.success(), "mkfs.btrfs: {made}");
        let device = Loop::over(&image)?;
        let mut dying = Self { mount: None, device, dir };
        dying.mount = Some(Mount::device(&dying.device.path, &dying.path()));
        Some(dying)
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Makes a page of a file, found by what is in it, unreadable.
    fn lose(&mut self, page: &[u8; PAGE_SIZE]) {
        self.mount.take().unwrap().end();
        let image = OpenOptions::new().read(true).write(true).open(&self.device.path).unwrap();
        let mut block = [0; PAGE_SIZE];
        let mut lost = 0;
        for at in (0..IMAGE_BYTES).step_by(PAGE_SIZE) {
            image.read_exact_at(&mut block, at).unwrap();
            if block == *page {
                image.write_all_at(&[!block[0]], at).unwrap();
                lost += 1;
            }
        }
        image.sync_all().unwrap();
        assert!(lost > 0, "the page is nowhere on the disk");
        self.mount = Some(Mount::device(&self.device.path, &self.path()));
    }
}

fn page(name: &str, slot: u64) -> Page {
    // Not compressible, so that it can be found where it is kept.
    page_of(3, slot * 2 + u64::from(name == "web2"))
}

fn put(daemon: &Daemon, name: &str) {
    let (_device, mut disk) = daemon.attach(name);
    for slot in FIRST..FIRST + PAGES {
        disk.write_pages(slot, &[page(name, slot)]).unwrap();
    }
}

/// How many pages are errors; all others are what was stored.
fn missing(disk: &mut Queue, name: &str) -> usize {
    let read = |slot| disk.read_pages(slot, 1).ok();
    let found: Vec<_> = (FIRST..FIRST + PAGES).map(read).collect();
    for (found, slot) in found.iter().zip(FIRST..) {
        assert!(found.as_ref().is_none_or(|found| found[0] == page(name, slot)), "{name}: slot {slot}");
    }
    found.iter().filter(|found| found.is_none()).count()
}

/// A page of a file that has `needle` in it.
fn page_with(file: &Path, needle: &[u8]) -> (u64, [u8; PAGE_SIZE]) {
    let file = File::open(file).unwrap();
    let mut at = 0;
    let mut block = [0; PAGE_SIZE];
    loop {
        at = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)).expect("some page has it");
        file.read_exact_at(&mut block, at).unwrap();
        if block.windows(needle.len()).any(|window| window == needle) {
            return (at, block);
        }
        at += PAGE_SIZE as u64;
    }
}

#[test]
fn a_page_of_the_arena_that_cannot_be_read_costs_what_was_in_it() {
    let Some(mut dying) = Dying::new() else { return };
    let mut daemon = Daemon::start(&dying.path(), TWO_VMS);
    ["web1", "web2"].into_iter().for_each(|name| put(&daemon, name));
    daemon.kill();
    let middle = &page("web1", FIRST + PAGES / 2)[1000..1200];
    let (_, block) = page_with(&dying.path().join("state/arena"), middle);
    dying.lose(&block);

    daemon.restart();
    let pid = daemon.pid();
    {
        let (_device, mut disk) = daemon.attach("web1");
        let lost = missing(&mut disk, "web1");
        // The page of a file has bytes of two objects, or of three.
        assert!((1..=3).contains(&lost), "{lost} pages are missing");
        let (_other_device, mut other) = daemon.attach("web2");
        assert!(missing(&mut other, "web2") + lost <= 3);
        assert_eq!((daemon.ended(), daemon.pid()), (None, pid), "{}", daemon.log());
        daemon.wait_for_log("pages of the arena can't be read any more");
        assert_eq!(daemon.status()["pool"]["mended_pages"], 1);
    }
    assert_eq!(daemon.vm("web1")["lost_pages"], 0, "they may be written again");
    // What is stored now, at the very place too, is there after another death.
    ["web1", "web2"].into_iter().for_each(|name| put(&daemon, name));
    daemon.restart();
    for name in ["web1", "web2"] {
        let (_device, mut disk) = daemon.attach(name);
        assert_eq!(missing(&mut disk, name), 0, "{name}");
    }
}

#[test]
fn a_page_of_a_table_that_cannot_be_read_takes_its_vm_out_of_service() {
    let Some(mut dying) = Dying::new() else { return };
    let mut daemon = Daemon::start(&dying.path(), TWO_VMS);
    ["web1", "web2"].into_iter().for_each(|name| put(&daemon, name));
    daemon.kill();
    // Its first entries; then its header.
    for at in [PAGE_SIZE as u64, 0] {
        let mut block = [0; PAGE_SIZE];
        File::open(daemon.table("web1")).unwrap().read_exact_at(&mut block, at).unwrap();
        dying.lose(&block);
        daemon.restart();
        let vm = daemon.vm("web1");
        assert_eq!(vm["state"], "damaged", "{vm}");
        let why = vm["message"].as_str().unwrap();
        assert!(why.contains("parts of the page table can't be read: its disk is failing"), "{why}");
        {
            let (_device, mut disk) = daemon.attach("web2");
            assert_eq!(missing(&mut disk, "web2"), 0);
        }
        assert!(daemon.ask(&["vm", "clear", "web1"]).status.success(), "{}", daemon.log());
        put(&daemon, "web1");
        daemon.restart();
        {
            let (_device, mut disk) = daemon.attach("web1");
            assert_eq!(missing(&mut disk, "web1"), 0);
        }
        daemon.kill();
    }
}

/// The kernel's own hard errors, which take one that is built to handle them.
#[test]
fn hard_errors_of_the_hosts_memory_cost_what_was_there() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let judge = Path::new(env!("CARGO_MANIFEST_DIR")).join("images/judge-memory");
    let mut files = Files::new();
    files.put("usr/local/bin/judge-kit", 0o755, &fs::read(judge).unwrap());
    files.put("usr/local/bin/ballast", 0o755, &fs::read(env!("CARGO_BIN_EXE_ballast")).unwrap());
    let said = debian::boot_kernel("generic/", dir.path(), files, 768, None);
    assert!(said.starts_with("memory fails"), "{said}");
}
