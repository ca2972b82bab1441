//! A guest with Debian's own kernel and systemd (`images/make-debian-guest`), and files that it finds in its place when it
//! boots. It is judged by its `/usr/local/bin/judge-kit`, which may be one of these files.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::vm::{Vm, image};

/// One to three minutes are usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(900);

/// Guests of one test boot one after the other: the line of fstab gives the disk ten seconds, and several guests on a few
/// cores need more.
static BOOTING: Mutex<()> = Mutex::new(());

/// Files for the guest: an archive that Linux unpacks over the initramfs that it is appended to, and whose `/kit` the
/// guest's init copies over the system.
pub struct Files {
    archive: Vec<u8>,
    directories: Vec<String>,
}

impl Files {
    /// None yet.
    pub fn new() -> Self {
        let mut files = Self { archive: Vec::new(), directories: Vec::new() };
        files.make_directory("kit");
        files
    }

    /// A file with these permissions, at a path without a slash before it. Directories are made.
    pub fn put(&mut self, to: &str, mode: u32, content: &[u8]) {
        let name = self.make_place(to);
        self.archive.extend(entry(&name, 0o100_000 | mode, content));
    }

    /// A symbolic link.
    pub fn link(&mut self, to: &str, target: &str) {
        let name = self.make_place(to);
        self.archive.extend(entry(&name, 0o120_777, target.as_bytes()));
    }

    fn make_place(&mut self, to: &str) -> String {
        let name = format!("kit/{to}");
        for (end, _) in name.match_indices('/') {
            self.make_directory(&name[..end]);
        }
        name
    }

    fn make_directory(&mut self, name: &str) {
        if !self.directories.iter().any(|made| made == name) {
            self.archive.extend(entry(name, 0o040_755, b""));
            self.directories.push(name.to_owned());
        }
    }
}

/// A file or a directory of an archive as Linux unpacks it (`newc`).
fn entry(name: &str, mode: u32, content: &[u8]) -> Vec<u8> {
    let name_bytes = name.len() + 1;
    let mut bytes = b"070701".to_vec();
    let numbers = [0, mode as usize, 0, 0, 1, 0, content.len(), 0, 0, 0, 0, name_bytes, 0];
    numbers.iter().for_each(|number| bytes.extend(format!("{number:08x}").bytes()));
    bytes.extend(name.bytes());
    bytes.push(0);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes.extend(content);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// Boots Debian with these files and so much memory, with our disk if there is a socket, and gives what it prints when it
/// has passed.
pub fn boot(dir: &Path, files: Files, memory_mib: u32, socket: Option<&Path>) -> String {
    boot_kernel("", dir, files, memory_mib, socket)
}

/// The same with the kernel of this directory of `images/build`.
pub fn boot_kernel(
    kernel: &str,
    dir: &Path,
    mut files: Files,
    memory_mib: u32,
    socket: Option<&Path>,
) -> String {
    let initramfs = dir.join("initramfs");
    let mut bytes = fs::read(image(&format!("{kernel}initramfs"))).expect("the built image");
    // Archives begin at multiples of four.
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    files.archive.extend(entry("TRAILER!!!", 0, b""));
    bytes.extend(files.archive);
    fs::write(&initramfs, bytes).expect("a file in the test's directory");
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-accel", "tcg"]);
    let memory = format!("{memory_mib}M");
    command.args(["-machine", "q35,memory-backend=memory", "-m", &memory, "-smp", "1"]);
    command.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory},share=on")]);
    command.args(["-kernel", &image(&format!("{kernel}vmlinuz"))]);
    command.arg("-initrd").arg(&initramfs).arg("-append").arg(format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 ballast.system=1 ballast.disk={}",
        u8::from(socket.is_some())
    ));
    // The first disk, of which nothing that is written is kept.
    command
        .args(["-drive", &format!("file={},format=raw,if=none,id=system,snapshot=on", image("debian.ext4"))]);
    command.args(["-device", "virtio-blk-pci,drive=system"]);
    if let Some(socket) = socket {
        command.args(["-chardev", &format!("socket,id=swap,path={}", socket.display())]);
        command.args(["-device", "vhost-user-blk-pci,chardev=swap,num-queues=1"]);
    }
    let _alone = BOOTING.lock().unwrap_or_else(PoisonError::into_inner);
    let mut vm = Vm::boot(command, dir, |file| ["-serial".to_owned(), format!("file:{file}")]);
    let counts = vm.pass(PATIENCE);
    println!("{}\n{counts}", vm.console());
    counts
}
