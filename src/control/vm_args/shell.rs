//! The VMMs that are told by arguments: QEMU, cloud-hypervisor and crosvm; and how arguments look in a shell. Each has
//! its own way to put a path with a comma into a list that commas divide.

use std::path::Path;

use super::{Content, MIB, QUEUE_SIZE, VmArgs, Wanted, balloon};
use crate::config::VmConfig;

/// How a QEMU that knows milliseconds connects again, and how an older one does.
const RECONNECT: &str = "reconnect-ms=100";
const RECONNECT_BEFORE_9_2: &str = "reconnect=1";

/// Asks the QEMU of the host which of the two it knows.
const ASK_QEMU: &str = "\
# Before 9.2 QEMU counts in seconds how long it waits before it connects again.
case $(qemu-system-x86_64 --version) in
*' version '[0-8].* | *' version 9.'[01].*) reconnect=reconnect=1 ;;
*) reconnect=reconnect-ms=100 ;;
esac
";

pub(super) fn qemu(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let old = wanted.guest.qemu_before_9_2;
    let memory = format!("{}M", wanted.guest.memory.0 / MIB);
    let path = socket.display().to_string().replace(',', ",,");
    let reconnect = if old { RECONNECT_BEFORE_9_2 } else { RECONNECT };
    let mut args = owned(&[
        "-m",
        &memory,
        "-object",
        &format!("memory-backend-memfd,id=ballast-memory,size={memory},share=on"),
        "-numa",
        "node,memdev=ballast-memory",
        "-chardev",
        &format!("socket,id=ballast-socket,path={path},{reconnect}"),
        "-device",
        &format!("vhost-user-blk-pci,chardev=ballast-socket,num-queues={}", vm.queues),
    ]);
    args.extend(balloon::qemu(vm));
    let mut shown = shown(&args, "qemu-system-x86_64", wanted.whole);
    if wanted.whole && !old {
        // Out of the quotes, if there are any.
        let asked = shown.replacen(&format!(",{RECONNECT}'"), ",'$reconnect", 1);
        shown = ASK_QEMU.to_owned() + &asked.replacen(&format!(",{RECONNECT}"), ",$reconnect", 1);
    }
    let mut notes = vec![
        "QEMU (tried with 7.2 and 10.0): connects again for as long as it lives, and nothing is lost meanwhile.".to_owned(),
        "The guest's memory stands in it twice, 2 GiB unless --memory says otherwise. How many vCPUs it has is yours to \
         say (-smp); it uses as many of the queues."
            .to_owned(),
    ];
    if !old && !wanted.whole {
        notes.push(
            "QEMU before 9.2, as in Debian 12, knows no reconnect-ms: see --qemu-before-9.2.".to_owned(),
        );
    }
    if old {
        notes.push(
            "Before 9.2 it waits a whole second for that, and so does a guest that needs a page.".to_owned(),
        );
    }
    notes.extend(balloon::notes(vm, &["qemu"]));
    VmArgs { content: Content::Arguments { args, shown }, notes }
}

pub(super) fn cloud_hypervisor(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let (queues, path) = (vm.queues, socket.display().to_string());
    let path = if path.contains([',', '[', ']']) { format!("\"{path}\"") } else { path };
    let mut args = owned(&[
        "--memory",
        &format!("size={}M,shared=on", wanted.guest.memory.0 / MIB),
        // It refuses a disk with more queues than the VM has vCPUs, and has one vCPU unless told otherwise.
        "--cpus",
        &format!("boot={queues}"),
    ]);
    args.extend(balloon::cloud_hypervisor(vm, socket));
    // Last, so that other disks can follow: it takes all of them behind one --disk.
    let disk = format!("vhost_user=true,socket={path},num_queues={queues},queue_size={QUEUE_SIZE}");
    args.extend(["--disk".to_owned(), disk]);
    let shown = shown(&args, "cloud-hypervisor", wanted.whole);
    VmArgs { content: Content::Arguments { args, shown }, notes: cloud_hypervisor_notes(vm) }
}

/// What is true of it however it is told.
pub(super) fn cloud_hypervisor_notes(vm: &VmConfig) -> Vec<String> {
    let mut notes = owned(&[
        "cloud-hypervisor (tried with 53): connects again for 60 s after the daemon has gone; then the disk is dead \
         until the VM starts anew.",
        "It takes at most as many queues as the VM has vCPUs.",
    ]);
    notes.extend(balloon::notes(vm, &["cloud-hypervisor", "vhost-user"]));
    notes
}

pub(super) fn crosvm(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let path = socket.display().to_string();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
    let path = if path.chars().all(plain) { path } else { format!("{path:?}") };
    let args = owned(&[
        "--cpus",
        &vm.queues.to_string(),
        "--mem",
        &(wanted.guest.memory.0 / MIB).to_string(),
        "--vhost-user",
        // Its own queues have 32768 places, and ours at most 1024.
        &format!("type=block,socket={path},max-queue-size={QUEUE_SIZE}"),
    ]);
    let mut notes = owned(&[
        "crosvm (checked against its source of August 2026, f1e797a; not tried): --vhost-user is there since November 2023.",
        "It never connects again, and ends the VM when the daemon ends: restart the daemon only after its VMs.",
        "It keeps no in-flight region. Guest memory is shared as it is, and it takes all of the VM's queues.",
    ]);
    notes.extend(balloon::notes(vm, &[]));
    let shown = shown(&args, "crosvm run", wanted.whole);
    VmArgs { content: Content::Arguments { args, shown }, notes }
}

fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

/// The arguments as a shell reads them; a whole command runs the program and takes more arguments.
fn shown(args: &[String], program: &str, whole: bool) -> String {
    let lines = shell_lines(args);
    if whole { format!("exec {program} \\\n  {lines} \\\n  \"$@\"") } else { lines }
}

/// An option and its value a line, each line but the last continued by a backslash.
fn shell_lines(args: &[String]) -> String {
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
pub(super) fn shell_quote(arg: &str) -> String {
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

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        let args = owned(&["-m", "1G", "--it's", "a b", "", "$(x)"]);
        assert_eq!(shell_lines(&args), "-m 1G \\\n  '--it'\\''s' 'a b' '' '$(x)'");
    }
}
