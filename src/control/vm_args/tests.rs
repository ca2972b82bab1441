//! What each VMM is told about the VM web1 of the example configuration, and that `vmm-configs/` says the same.

use super::*;
use crate::config::Config;

const EXAMPLE: &str = include_str!("../../../vmm-configs/ballast.toml");
const GUEST: Guest = Guest { memory: MEMORY_DEFAULT, qemu_before_9_2: false };

fn wanted(vmm: Vmm) -> Wanted {
    Wanted { vmm, format: vmm.formats()[0], whole: false, guest: GUEST }
}

fn example(wanted: Wanted) -> VmArgs {
    let config = Config::parse(EXAMPLE, 16 << 30).unwrap();
    vm_args(config.vm("web1").unwrap(), &config.socket_path("web1"), wanted)
}

/// With a socket at a path that nobody would choose.
fn at(path: &str, wanted: Wanted) -> VmArgs {
    let config = Config::parse(EXAMPLE, 16 << 30).unwrap();
    vm_args(config.vm("web1").unwrap(), Path::new(path), wanted)
}

fn last_arg(args: &VmArgs) -> String {
    args.json()["args"].as_array().unwrap().last().unwrap().as_str().unwrap().to_owned()
}

#[test]
fn qemu_shares_its_memory_and_reconnects() {
    let text = example(wanted(Vmm::Qemu)).text();
    for part in ["size=2048M,share=on", "path=/run/ballast/web1.sock,reconnect-ms=100", "num-queues=4"] {
        assert!(text.contains(part), "{text}");
    }
    let guest = Guest { memory: Bytes(3 << 29), qemu_before_9_2: true };
    let old = example(Wanted { guest, ..wanted(Vmm::Qemu) }).text();
    assert!(old.ends_with("num-queues=4\n") && old.contains(",reconnect=1 "), "{old}");
    assert!(old.contains("-m 1536M "), "{old}");
}

#[test]
fn a_whole_qemu_script_asks_which_qemu_it_has_unless_it_was_told() {
    let whole = Wanted { whole: true, ..wanted(Vmm::Qemu) };
    for (path, chardev) in [
        ("/run/web1.sock", "path=/run/web1.sock,$reconnect \\"),
        ("/a b.sock", "path=/a b.sock,'$reconnect \\"),
    ] {
        let text = at(path, whole).bare();
        assert!(text.contains(chardev) && text.contains("reconnect=reconnect=1 ;;"), "{text}");
    }
    let old = Guest { qemu_before_9_2: true, ..GUEST };
    let text = example(Wanted { guest: old, ..whole }).bare();
    assert!(
        text.starts_with("exec qemu-system-x86_64 \\\n  -m") && text.contains(",reconnect=1 \\"),
        "{text}"
    );
}

#[test]
fn cloud_hypervisor_has_a_cpu_a_queue() {
    let args = example(wanted(Vmm::CloudHypervisor));
    let bare = args.bare().replace(" \\\n ", "");
    assert_eq!(
        bare,
        "--memory size=2048M,shared=on --cpus boot=4 \
         --disk vhost_user=true,socket=/run/ballast/web1.sock,num_queues=4,queue_size=256\n"
    );
    let document = example(Wanted { format: Format::Json, ..wanted(Vmm::CloudHypervisor) }).json();
    assert_eq!(document["memory"], serde_json::json!({ "size": 2_147_483_648_u64, "shared": true }));
    assert_eq!(document["cpus"]["boot_vcpus"], document["disks"][0]["num_queues"]);
}

#[test]
fn a_comma_in_a_path_divides_nothing() {
    let path = "/run/a,b.sock";
    assert!(at(path, wanted(Vmm::Qemu)).bare().contains("path=/run/a,,b.sock,reconnect"));
    for vmm in [Vmm::CloudHypervisor, Vmm::Crosvm] {
        let arg = last_arg(&at(path, wanted(vmm)));
        assert!(arg.contains("socket=\"/run/a,b.sock\","), "{arg}");
    }
}

/// A queue of ours has at most 1024 places, and crosvm's has 32768 unless it is told.
#[test]
fn crosvm_is_told_how_long_a_queue_is() {
    let arg = last_arg(&example(wanted(Vmm::Crosvm)));
    assert_eq!(arg, "type=block,socket=/run/ballast/web1.sock,max-queue-size=256");
}

/// The VM of the example, squeezed.
fn squeezed(value: &str, wanted: Wanted) -> VmArgs {
    let config = EXAMPLE.replace("#squeeze = \"none\"", &format!("squeeze = {value}"));
    let config = Config::parse(&config, 16 << 30).unwrap();
    assert!(config.vms[0].squeeze.is_some());
    vm_args(config.vm("web1").unwrap(), &config.socket_path("web1"), wanted)
}

const BY_QEMU: &str = "{ vmm = \"qemu\", socket = \"/run/vms/web1.qmp\", min = \"512MiB\" }";
const BY_CLOUD_HYPERVISOR: &str =
    "{ vmm = \"cloud-hypervisor\", socket = \"/run/vms/web1.api\", min = \"512MiB\" }";
const BY_OURSELVES: &str = "{ vmm = \"vhost-user\", min = \"512MiB\" }";

#[test]
fn a_qemu_whose_vm_is_squeezed_has_a_balloon_and_a_monitor() {
    let text = squeezed(BY_QEMU, wanted(Vmm::Qemu)).text();
    for part in [
        crate::balloon::vmm::qmp::BALLOON_ARGUMENT,
        "-qmp unix:/run/vms/web1.qmp,server=on,wait=off",
        "# The VMM makes /run/vms/web1.qmp, and the daemon must be allowed to write to it",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!example(wanted(Vmm::Qemu)).text().contains("balloon"));
    let whole = Wanted { whole: true, ..wanted(Vmm::Libvirt) };
    for wanted in [wanted(Vmm::Libvirt), whole] {
        let text = squeezed(BY_QEMU, wanted).bare();
        for part in ["<stats period='2'/>", "<qemu:arg value='unix:/run/vms/web1.qmp,server=on,wait=off'/>"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

#[test]
fn a_cloud_hypervisor_whose_vm_is_squeezed_has_a_balloon_and_an_api() {
    let document = Wanted { format: Format::Json, ..wanted(Vmm::CloudHypervisor) };
    let text = squeezed(BY_CLOUD_HYPERVISOR, wanted(Vmm::CloudHypervisor)).bare();
    for part in
        [crate::balloon::vmm::cloud_hypervisor::BALLOON_ARGUMENT, "--api-socket path=/run/vms/web1.api"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(squeezed(BY_CLOUD_HYPERVISOR, document).json()["balloon"]["size"], 0);
    let text = squeezed(BY_OURSELVES, wanted(Vmm::CloudHypervisor)).bare();
    let own = "'socket=/run/ballast/balloon/web1.sock,device_type=5,queue_sizes=[128,128]'";
    assert!(text.contains(own) && !text.contains("--balloon"), "{text}");
    let own = squeezed(BY_OURSELVES, document).json()["generic_vhost_user"][0].take();
    assert_eq!(own["socket"], "/run/ballast/balloon/web1.sock");
    assert_eq!(example(document).json().as_object().unwrap().len(), 3, "nothing where nothing is squeezed");
}

#[test]
fn who_asks_for_another_vmm_than_squeeze_names_is_told() {
    for (value, vmm) in [
        (BY_QEMU, Vmm::CloudHypervisor),
        (BY_CLOUD_HYPERVISOR, Vmm::Libvirt),
        (BY_OURSELVES, Vmm::Qemu),
        (BY_QEMU, Vmm::Firecracker),
        (BY_QEMU, Vmm::Crosvm),
    ] {
        let args = squeezed(value, wanted(vmm));
        assert!(args.text().contains("No balloon is among this"), "{vmm:?}: {}", args.text());
        assert!(!args.bare().contains("balloon"), "{vmm:?}: {}", args.bare());
    }
}

#[test]
fn what_is_printed_for_scripts_has_no_comments() {
    for vmm in [Vmm::Qemu, Vmm::Libvirt, Vmm::CloudHypervisor, Vmm::Firecracker, Vmm::Crosvm] {
        for &format in vmm.formats() {
            let args = example(Wanted { format, ..wanted(vmm) });
            let text = args.text();
            let notes =
                text.lines().take_while(|line| line.starts_with('#') || line.starts_with("<!-- ")).count();
            assert!(notes > 0, "{vmm:?} has no notes:\n{text}");
            let json = args.json().to_string();
            assert!(!json.contains("# ") && json.contains("/run/ballast/web1.sock"), "{json}");
            assert!(text.ends_with(&args.bare()), "{text}");
        }
    }
}

/// The files are a head and what `ballast vm args web1 --whole` prints for the example configuration, and nothing can
/// drift. JSON has no comments and so no head.
#[test]
fn the_files_have_what_vm_args_prints() {
    for (vmm, format, file, has_head) in [
        (Vmm::Qemu, Format::Cli, include_str!("../../../vmm-configs/qemu.sh"), true),
        (Vmm::Libvirt, Format::Xml, include_str!("../../../vmm-configs/libvirt.xml"), true),
        (Vmm::CloudHypervisor, Format::Cli, include_str!("../../../vmm-configs/cloud-hypervisor.sh"), true),
        (
            Vmm::CloudHypervisor,
            Format::Json,
            include_str!("../../../vmm-configs/cloud-hypervisor.json"),
            false,
        ),
        (Vmm::Firecracker, Format::Json, include_str!("../../../vmm-configs/firecracker.json"), false),
        (Vmm::Crosvm, Format::Cli, include_str!("../../../vmm-configs/crosvm.sh"), true),
    ] {
        let wanted = Wanted { vmm, format, whole: true, guest: GUEST };
        let printed = example(wanted).bare();
        let head = file.strip_suffix(&printed);
        let head = head.unwrap_or_else(|| panic!("{vmm:?}: expected at the file's end:\n{printed}"));
        assert_eq!(!head.is_empty(), has_head, "{vmm:?}: {head}");
    }
}

#[test]
fn the_guests_files_name_the_label_of_the_example() {
    let config = Config::parse(EXAMPLE, 16 << 30).unwrap();
    let label = &config.vms[0].label;
    let fstab = include_str!("../../../vmm-configs/guest/fstab");
    assert!(fstab.contains(&format!("\nLABEL={label} ")), "{fstab}");
}

#[test]
fn memory_is_whole_mebibytes() {
    assert_eq!(parse_memory("1.5GiB"), Ok(Bytes(3 << 29)));
    for text in ["0", "4096", "1048577", "2GB"] {
        assert!(parse_memory(text).unwrap_err().contains(text), "{text}");
    }
}

#[test]
fn what_is_printed_for_one_vm_has_nothing_of_another() {
    let config = Config::parse(&EXAMPLE.replace("web1", "db"), 16 << 30).unwrap();
    for vmm in [Vmm::Qemu, Vmm::Libvirt, Vmm::CloudHypervisor, Vmm::Firecracker, Vmm::Crosvm] {
        for format in [Format::Cli, Format::Json, Format::Xml] {
            for whole in [false, true] {
                let wanted = Wanted { format, whole, ..wanted(vmm) };
                let text = vm_args(config.vm("db").unwrap(), &config.socket_path("db"), wanted).text();
                assert!(text.contains("/db.sock") && !text.contains("web1"), "{vmm:?} {format:?}: {text}");
            }
        }
    }
}
