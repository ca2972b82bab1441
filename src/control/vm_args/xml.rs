//! libvirt: elements for a domain, or a whole one that its schema accepts. What its schema has and its own rules forbid
//! for vhost-user disks (`discard`, `<serial>`, `cache`, `io`) stays out: the guest sees discards and the serial
//! number all the same, because they are the device's.

use std::path::Path;

use super::{Content, MIB, VmArgs, Wanted, balloon};
use crate::config::VmConfig;

const MEMORY_BACKING: &str = "\
<memoryBacking>
  <source type='memfd'/>
  <access mode='shared'/>
</memoryBacking>
";

pub(super) fn libvirt(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    let disk = disk(vm, socket);
    let (memballoon, monitor) = balloon::libvirt(vm).unwrap_or_default();
    let devices = disk + memballoon;
    let text = if wanted.whole {
        domain(vm, &devices, &monitor, wanted)
    } else {
        format!(
            "<!-- in <domain>: -->\n{MEMORY_BACKING}{monitor}<!-- in its <devices>, by a free name: -->\n{devices}"
        )
    };
    let mut notes = [
        "libvirt (tried with 11.3, checked with 9.0): its QEMU connects again for as long as it lives.",
        "It counts in seconds how long it waits for that, and so long waits a guest that needs a page.",
        "For this disk it takes no discard= and no <serial>; the guest has both, from us.",
        "Its AppArmor profiles (Debian has them) forget this socket: allow it in /etc/apparmor.d/local/abstractions/libvirt-qemu.",
    ]
    .map(str::to_owned)
    .to_vec();
    notes.extend(balloon::notes(vm, &["qemu"]));
    VmArgs { content: Content::Xml(text), notes }
}

fn disk(vm: &VmConfig, socket: &Path) -> String {
    format!(
        "\
<disk type='vhostuser' device='disk' snapshot='no'>
  <driver name='qemu' type='raw' queues='{}'/>
  <source type='unix' path='{}'>
    <reconnect enabled='yes' timeout='1'/>
  </source>
  <target dev='vdb' bus='virtio'/>
</disk>
",
        vm.queues,
        escape(&socket.display().to_string())
    )
}

fn domain(vm: &VmConfig, devices: &str, monitor: &str, wanted: Wanted) -> String {
    let (name, memory, vcpus) = (&vm.name, wanted.guest.memory.0 / MIB, vm.queues);
    format!(
        "\
<domain type='kvm'>
  <name>{name}</name>
  <memory unit='MiB'>{memory}</memory>
{}  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
  </os>
  <features>
    <acpi/>
  </features>
  <cpu mode='host-passthrough'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/var/lib/libvirt/images/{name}.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
{}    <console type='pty'/>
  </devices>
{}</domain>
",
        indented(MEMORY_BACKING, 2),
        indented(devices, 4),
        indented(monitor, 2)
    )
}

fn indented(text: &str, spaces: usize) -> String {
    text.lines().map(|line| format!("{:spaces$}{line}\n", "")).collect()
}

/// A line that is a comment. Two hyphens may not stand in one side by side, as they do in options and may in paths.
pub(super) fn comment(text: &str) -> String {
    let mut inside = text.to_owned();
    while inside.contains("--") {
        inside = inside.replace("--", "- -");
    }
    format!("<!-- {inside} -->\n")
}

/// A text as an attribute between single quotes has it.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::{comment, escape};

    #[test]
    fn a_comment_ends_where_it_should() {
        assert_eq!(comment("no --option"), "<!-- no - -option -->\n");
        assert_eq!(comment("/run/a---b-->.sock-"), "<!-- /run/a- - -b- ->.sock- -->\n");
    }

    #[test]
    fn a_path_stays_inside_its_attribute() {
        assert_eq!(escape("/run/o'b & <c>.sock"), "/run/o&apos;b &amp; &lt;c>.sock");
    }
}
