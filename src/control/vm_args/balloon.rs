//! What a VMM is told so that its VM can be squeezed: a balloon, and a socket at which the daemon drives it. Only where the
//! configuration says so, and only the VMM that it names.
//!
//! Every balloon may be deflated by its guest when that is out of memory. Guests of Firecracker's were reported to hang that
//! way: the driver takes back what it has just given up, again and again, as long as nobody lowers the target. Here somebody
//! does: such a guest is seen to have more than it was to have, and is given more. Without it, a guest whose need grows
//! faster than the daemon looks loses a process instead, for memory that the host has.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::xml;
use crate::balloon::vmm::{cloud_hypervisor, qmp};
use crate::config::{BALLOON_DIR_NAME, SqueezeVmm, VmConfig};

/// cloud-hypervisor creates as many queues as it is told: those of a balloon whose guest has neither statistics nor
/// reporting.
const OWN_QUEUE_SIZES: [u16; 2] = [128, 128];
/// libvirt's words for what [`qmp::BALLOON_ARGUMENT`] says; it asks for statistics itself.
const MEMBALLOON: &str = "\
<memballoon model='virtio' autodeflate='on' freePageReporting='on'>
  <stats period='2'/>
</memballoon>
";

/// What the VMM is told for it, of which most is nothing where there is nothing to be told.
pub(super) fn qemu(vm: &VmConfig) -> Vec<String> {
    let Some(SqueezeVmm::Qemu(socket)) = wanted(vm) else { return Vec::new() };
    let balloon = qmp::BALLOON_ARGUMENT.split(' ').map(str::to_owned);
    let monitor = ["-qmp".to_owned(), format!("unix:{},server=on,wait=off", socket.display())];
    balloon.chain(monitor).collect()
}

/// The same for cloud-hypervisor, whose disk's socket is `disk`.
pub(super) fn cloud_hypervisor(vm: &VmConfig, disk: &Path) -> Vec<String> {
    match wanted(vm) {
        Some(SqueezeVmm::CloudHypervisor(socket)) => {
            let balloon = cloud_hypervisor::BALLOON_ARGUMENT.split(' ').map(str::to_owned);
            balloon.chain(["--api-socket".to_owned(), format!("path={}", socket.display())]).collect()
        }
        Some(SqueezeVmm::VhostUser) => {
            let (own, [first, second]) = (own_socket(vm, disk), OWN_QUEUE_SIZES);
            let device = format!("socket={},device_type=5,queue_sizes=[{first},{second}]", own.display());
            vec!["--generic-vhost-user".to_owned(), device]
        }
        _ => Vec::new(),
    }
}

/// What its document has for that: a member and its value.
pub(super) fn cloud_hypervisor_member(vm: &VmConfig, disk: &Path) -> Option<(&'static str, Value)> {
    match wanted(vm)? {
        SqueezeVmm::CloudHypervisor(_) => {
            Some(("balloon", json!({ "size": 0, "deflate_on_oom": true, "free_page_reporting": true })))
        }
        SqueezeVmm::VhostUser => {
            let socket = own_socket(vm, disk).display().to_string();
            let device = json!({ "socket": socket, "device_type": 5, "queue_sizes": OWN_QUEUE_SIZES });
            Some(("generic_vhost_user", json!([device])))
        }
        SqueezeVmm::Qemu(_) => None,
    }
}

/// libvirt's elements: the balloon, and a second monitor beside libvirt's own.
pub(super) fn libvirt(vm: &VmConfig) -> Option<(&'static str, String)> {
    let Some(SqueezeVmm::Qemu(socket)) = wanted(vm) else { return None };
    let monitor = xml::escape(&format!("unix:{},server=on,wait=off", socket.display()));
    let command_line = format!(
        "\
<qemu:commandline xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <qemu:arg value='-qmp'/>
  <qemu:arg value='{monitor}'/>
</qemu:commandline>
"
    );
    Some((MEMBALLOON, command_line))
}

/// What whoever pastes it should know, for a VMM that the configuration may call by one of these words.
pub(super) fn notes(vm: &VmConfig, words: &[&str]) -> Vec<String> {
    let Some(vmm) = wanted(vm) else { return Vec::new() };
    if !words.contains(&vmm.as_str()) {
        let word = vmm.as_str();
        return vec![format!(
            "No balloon is among this: `squeeze` says that the VM is run by vmm = {word:?}."
        )];
    }
    let Some(socket) = vmm.socket() else {
        return vec![
            "cloud-hypervisor has --generic-vhost-user since version 52; the balloon is the daemon's."
                .to_owned(),
        ];
    };
    // A default ACL on its directory is no way: what is left of it is cut by the umask when a socket is bound.
    vec![format!(
        "The VMM makes {}, and the daemon must be allowed to write to it: start the VMM with umask 007 and a group that \
         the daemon's user is in, as the packaged one's is in kvm. Nobody else may be connected to it.",
        socket.display()
    )]
}

fn wanted(vm: &VmConfig) -> Option<&SqueezeVmm> {
    vm.squeeze.as_ref().map(|squeeze| &squeeze.vmm)
}

/// Our own balloon's socket lies beside the disk's.
fn own_socket(vm: &VmConfig, disk: &Path) -> PathBuf {
    let directory = disk.parent().unwrap_or(Path::new("/"));
    directory.join(BALLOON_DIR_NAME).join(format!("{}.sock", vm.name))
}
