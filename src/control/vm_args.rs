//! What to add to a VMM's command line so that its VM swaps to us. A pure function, so that the scripts in
//! `vmm-configs/` can be held to it. Guest memory must be shared, or the VMM can't hand it to us; everything else
//! about the VM is its owner's business.

use std::path::Path;

use crate::config::VmConfig;
use crate::ids::Bytes;

/// A VMM whose command line we know.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Vmm {
    /// QEMU; reconnects for as long as it lives.
    Qemu,
    /// cloud-hypervisor; reconnects for 60 s.
    CloudHypervisor,
}

impl Vmm {
    /// The program that takes the arguments.
    #[must_use]
    pub fn program(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86_64",
            Self::CloudHypervisor => "cloud-hypervisor",
        }
    }
}

/// What isn't in our configuration and must be on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The guest's memory: whole MiB, at least one.
    pub memory: Bytes,
    /// QEMU learnt `reconnect-ms` with 9.2; older ones wait in seconds.
    pub qemu_before_9_2: bool,
}

/// The guest's memory when nobody says.
pub const MEMORY_DEFAULT: Bytes = Bytes(2 << 30);

const MIB: u64 = 1 << 20;
/// cloud-hypervisor's own default is 128; twice that lets a whole cluster's requests be under way.
const CLOUD_HYPERVISOR_QUEUE_SIZE: u16 = 256;

/// Reads a guest's memory size.
///
/// # Errors
/// When it isn't a size, or not one that every VMM takes.
pub fn parse_memory(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|error: crate::ids::ParseBytesError| error.to_string())?;
    if bytes.0 >= MIB && bytes.0.is_multiple_of(MIB) {
        Ok(bytes)
    } else {
        Err(format!("{text:?} is not a guest's memory: it must be at least 1MiB and a multiple of 1MiB"))
    }
}

/// The arguments that give `vmm` the device of `vm` at `socket`.
#[must_use]
pub fn vm_args(vm: &VmConfig, socket: &Path, vmm: Vmm, guest: Guest) -> Vec<String> {
    match vmm {
        Vmm::Qemu => qemu(vm, socket, guest),
        Vmm::CloudHypervisor => cloud_hypervisor(vm, socket, guest),
    }
}

fn qemu(vm: &VmConfig, socket: &Path, guest: Guest) -> Vec<String> {
    let memory = format!("{}M", guest.memory.0 / MIB);
    let socket = socket.display();
    let reconnect = if guest.qemu_before_9_2 { "reconnect=1" } else { "reconnect-ms=100" };
    owned(&[
        "-m",
        &memory,
        "-object",
        &format!("memory-backend-memfd,id=ballast-memory,size={memory},share=on"),
        "-numa",
        "node,memdev=ballast-memory",
        "-chardev",
        &format!("socket,id=ballast-socket,path={socket},{reconnect}"),
        "-device",
        &format!("vhost-user-blk-pci,chardev=ballast-socket,num-queues={}", vm.queues),
    ])
}

fn cloud_hypervisor(vm: &VmConfig, socket: &Path, guest: Guest) -> Vec<String> {
    let queues = vm.queues;
    let disk = format!(
        "vhost_user=true,socket={},num_queues={queues},queue_size={CLOUD_HYPERVISOR_QUEUE_SIZE}",
        socket.display()
    );
    owned(&[
        "--memory",
        &format!("size={}M,shared=on", guest.memory.0 / MIB),
        // It refuses a disk with more queues than the VM has vCPUs, and has one vCPU unless told otherwise.
        "--cpus",
        &format!("boot={queues}"),
        // Last, so that other disks can follow: it takes all of them behind one --disk.
        "--disk",
        &disk,
    ])
}

fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

/// The arguments for a shell: an option and its value a line, each line but the last continued by a backslash.
#[must_use]
pub fn shell_lines(args: &[String]) -> String {
    let mut text = String::new();
    for arg in args {
        if !text.is_empty() {
            text.push_str(if arg.starts_with('-') { " \\\n  " } else { " " });
        }
        text.push_str(&shell_quote(arg));
    }
    text
}

/// One argument as a POSIX shell reads it back.
fn shell_quote(arg: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,=:+%@".contains(c);
    if !arg.is_empty() && arg.chars().all(plain) {
        arg.to_owned()
    } else {
        format!("'{}'", arg.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    const EXAMPLE: &str = include_str!("../../vmm-configs/ballast.toml");
    const GUEST: Guest = Guest { memory: MEMORY_DEFAULT, qemu_before_9_2: false };

    fn example(vmm: Vmm, guest: Guest) -> Vec<String> {
        let config = Config::parse(EXAMPLE, 16 << 30).unwrap();
        vm_args(config.vm("web1").unwrap(), &config.socket_path("web1"), vmm, guest)
    }

    #[test]
    fn qemu_shares_its_memory_and_reconnects() {
        let text = example(Vmm::Qemu, GUEST).join(" ");
        for part in ["size=2048M,share=on", "path=/run/ballast/web1.sock,reconnect-ms=100", "num-queues=4"] {
            assert!(text.contains(part), "{text}");
        }
        let old = example(Vmm::Qemu, Guest { memory: Bytes(3 << 29), qemu_before_9_2: true }).join(" ");
        assert!(old.ends_with("num-queues=4") && old.contains(",reconnect=1 "), "{old}");
        assert!(old.contains("-m 1536M "), "{old}");
    }

    #[test]
    fn cloud_hypervisor_has_a_cpu_a_queue() {
        let text = example(Vmm::CloudHypervisor, GUEST).join(" ");
        assert_eq!(
            text,
            "--memory size=2048M,shared=on --cpus boot=4 \
             --disk vhost_user=true,socket=/run/ballast/web1.sock,num_queues=4,queue_size=256"
        );
    }

    /// The scripts are what `ballast vm args web1` prints for the example configuration, and nothing can drift.
    #[test]
    fn the_scripts_have_the_arguments_that_vm_args_prints() {
        for (vmm, script) in [
            (Vmm::Qemu, include_str!("../../vmm-configs/qemu.sh")),
            (Vmm::CloudHypervisor, include_str!("../../vmm-configs/cloud-hypervisor.sh")),
        ] {
            let command =
                format!("exec {} \\\n  {} \\\n  \"$@\"\n", vmm.program(), shell_lines(&example(vmm, GUEST)));
            assert!(script.ends_with(&command), "expected at the script's end:\n{command}");
        }
    }

    #[test]
    fn the_guests_fstab_names_the_label_of_the_example() {
        let config = Config::parse(EXAMPLE, 16 << 30).unwrap();
        let fstab = include_str!("../../vmm-configs/guest/fstab");
        assert!(fstab.contains(&format!("\nLABEL={} ", config.vms[0].label)), "{fstab}");
    }

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        let args = owned(&["-m", "1G", "--it's", "a b", "", "$(x)"]);
        assert_eq!(shell_lines(&args), "-m 1G \\\n  '--it'\\''s' 'a b' '' '$(x)'");
    }

    #[test]
    fn memory_is_whole_mebibytes() {
        assert_eq!(parse_memory("1.5GiB"), Ok(Bytes(3 << 29)));
        for text in ["0", "4096", "1048577", "2GB"] {
            assert!(parse_memory(text).unwrap_err().contains(text), "{text}");
        }
    }
}
