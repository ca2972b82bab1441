//! The VMMs that are told by a JSON document: cloud-hypervisor's API, and Firecracker's API and configuration file. The
//! names of the members are held to the VMMs' own by `tests/vm_configs`.

use std::path::Path;

use serde_json::{Value, json};

use super::{Content, MIB, QUEUE_SIZE, VmArgs, Wanted, balloon, shell};
use crate::config::VmConfig;

/// More vCPUs than this Firecracker gives no VM.
const FIRECRACKER_VCPUS_MAX: u16 = 32;

/// The body of its `vm.create`.
pub(super) fn cloud_hypervisor(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let queues = vm.queues;
    let disk = json!({
        "vhost_user": true,
        "vhost_socket": socket.display().to_string(),
        "num_queues": queues,
        "queue_size": QUEUE_SIZE,
    });
    let mut notes = shell::cloud_hypervisor_notes(vm);
    let call = |action: &str, body: &str| {
        format!(
            "curl --unix-socket API_SOCKET -X PUT http://localhost/api/v1/{action} -H 'Content-Type: application/json' -d {body}"
        )
    };
    notes.push(format!(
        "Its place: the body of vm.create; with the rest of the VM in VM.json: {}",
        call("vm.create", "@VM.json")
    ));
    notes.push(format!(
        "For a VM that runs, with shared memory: {}",
        call("vm.add-disk", &shell::shell_quote(&disk.to_string()))
    ));
    let mut document = json!({
        "cpus": { "boot_vcpus": queues, "max_vcpus": queues },
        "memory": { "size": wanted.guest.memory.0, "shared": true },
        "disks": [disk.clone()],
    });
    if let Some((member, value)) = balloon::cloud_hypervisor_member(vm, socket) {
        document[member] = value;
    }
    if wanted.whole {
        document["payload"] = json!({ "kernel": "/var/lib/vms/vmlinux", "cmdline": "root=/dev/vda1 console=hvc0 zswap.enabled=0" });
        document["disks"] =
            json!([{ "path": format!("/var/lib/vms/{}.raw", vm.name), "image_type": "Raw" }, disk]);
    }
    VmArgs { content: Content::Document(document), notes }
}

/// Its configuration file, whose drives are what its API takes one by one.
pub(super) fn firecracker(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let drive = json!({
        "drive_id": "ballast",
        "is_root_device": false,
        "socket": socket.display().to_string(),
    });
    let document =
        if wanted.whole { firecracker_whole(vm, &drive, wanted) } else { json!({ "drives": [drive] }) };
    let mut notes = firecracker_notes(&drive);
    notes.extend(balloon::notes(vm, &[]));
    VmArgs { content: Content::Document(document), notes }
}

fn firecracker_whole(vm: &VmConfig, drive: &Value, wanted: Wanted) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": "/var/lib/vms/vmlinux",
            "boot_args": "console=ttyS0 reboot=k panic=1 zswap.enabled=0",
        },
        "machine-config": {
            "vcpu_count": vm.queues.min(FIRECRACKER_VCPUS_MAX),
            "mem_size_mib": wanted.guest.memory.0 / MIB,
        },
        "drives": [
            {
                "drive_id": "root",
                "is_root_device": true,
                "is_read_only": false,
                "path_on_host": format!("/var/lib/vms/{}.ext4", vm.name),
            },
            drive,
        ],
    })
}

fn firecracker_notes(drive: &Value) -> Vec<String> {
    let body = shell::shell_quote(&drive.to_string());
    vec![
        "Firecracker (checked against the source of 1.16.1; 1.17.0-dev starts with it; vhost-user is a developer preview).".to_owned(),
        "It connects once and keeps no in-flight region: when the daemon ends, what its guest waits for never comes. \
         Restart the daemon only after its VMs."
            .to_owned(),
        "It has one queue whatever `queues` says, passes no discards on, so that dead pages stay until they are \
         overwritten, and takes no snapshots. Memory is shared by itself where a drive has a socket."
            .to_owned(),
        "Its place: the file for --config-file, among its drives.".to_owned(),
        format!(
            "By the API, before InstanceStart: curl --unix-socket API_SOCKET -X PUT http://localhost/drives/ballast \
             -H 'Content-Type: application/json' -d {body}"
        ),
    ]
}
