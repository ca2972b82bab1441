//! The files of `vmm-configs/` as they are: QEMU boots a guest from its script beside a daemon with the example
//! configuration, libvirt's validator accepts the domain, and each member of the JSON files is one that its VMM knows.
//! That the files are what `ballast vm args` prints is tested beside that (`control::vm_args`). They need QEMU, the
//! built images and virt-xml-validate; `tests/run` provides all three.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use support::daemon::Daemon;
use support::vm::{Vm, image};

/// Half a minute is usual; a machine that is busy may take much longer.
const PATIENCE: Duration = Duration::from_secs(600);

/// What libvirt's own rules refuse for this disk though its schema has it: `virDomainDiskVhostUserValidate` in
/// `src/conf/domain_validate.c` of libvirt 9.0, whose other refusals are of elements that are not in here.
const REFUSED_BY_LIBVIRT: [&str; 9] = [
    "cache=",
    "error_policy=",
    "io=",
    "ioeventfd=",
    "copy_on_read=",
    "discard=",
    "iothread=",
    "<serial>",
    "<readonly",
];

/// cloud-hypervisor v53.0, `vmm/src/vm_config.rs`: `VmConfig` and of the structs in it those that the file has.
const CLOUD_HYPERVISOR: [(&str, &[&str]); 5] = [
    (
        "",
        &[
            "cpus",
            "memory",
            "payload",
            "rate_limit_groups",
            "disks",
            "net",
            "rng",
            "balloon",
            "fs",
            "pmem",
            "serial",
            "console",
            "devices",
            "vsock",
            "iommu",
            "numa",
            "watchdog",
            "platform",
            "tpm",
            "landlock_enable",
        ],
    ),
    ("/cpus", &["boot_vcpus", "max_vcpus", "topology", "max_phys_bits", "affinity", "features", "nested"]),
    (
        "/memory",
        &[
            "size",
            "mergeable",
            "hotplug_method",
            "hotplug_size",
            "shared",
            "hugepages",
            "prefault",
            "zones",
            "thp",
        ],
    ),
    ("/payload", &["firmware", "kernel", "cmdline", "initramfs"]),
    (
        "/disks/*",
        &[
            "path",
            "readonly",
            "direct",
            "num_queues",
            "queue_size",
            "vhost_user",
            "vhost_socket",
            "rate_limit_group",
            "rate_limiter_config",
            "serial",
            "queue_affinity",
            "backing_files",
            "sparse",
            "image_type",
        ],
    ),
];

/// Firecracker v1.16.1, `src/vmm/src/resources.rs` (`VmmConfig`), and in `src/vmm/src/vmm_config` `drive.rs`
/// (`BlockDeviceConfig`), `machine_config.rs` and `boot_source.rs`. It refuses members that it doesn't know.
const FIRECRACKER: [(&str, &[&str]); 4] = [
    (
        "",
        &[
            "balloon",
            "drives",
            "boot-source",
            "cpu-config",
            "logger",
            "machine-config",
            "metrics",
            "mmds-config",
            "network-interfaces",
            "vsock",
            "entropy",
            "pmem",
            "memory-hotplug",
        ],
    ),
    ("/boot-source", &["kernel_image_path", "initrd_path", "boot_args"]),
    (
        "/machine-config",
        &["vcpu_count", "mem_size_mib", "smt", "cpu_template", "track_dirty_pages", "huge_pages"],
    ),
    (
        "/drives/*",
        &[
            "drive_id",
            "partuuid",
            "is_root_device",
            "cache_type",
            "is_read_only",
            "path_on_host",
            "rate_limiter",
            "io_engine",
            "socket",
        ],
    ),
];

fn file(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs").join(name)).unwrap()
}

fn json(name: &str) -> Value {
    serde_json::from_str(&file(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The paths of all members below a value, with `*` for every element of a list.
fn members(value: &Value, at: &str, into: &mut Vec<(String, String)>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                into.push((at.to_owned(), name.clone()));
                members(value, &format!("{at}/{name}"), into);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| members(value, &format!("{at}/*"), into)),
        _ => {}
    }
}

fn knows_all(name: &str, known: &[(&str, &[&str])]) {
    let mut found = Vec::new();
    members(&json(name), "", &mut found);
    assert!(found.len() > 5, "{name}: {found:?}");
    for (at, member) in found {
        let there = known.iter().find(|(place, _)| *place == at).map(|(_, members)| *members);
        assert!(
            there.is_some_and(|members| members.contains(&&*member)),
            "{name}: {at}/{member} is not known"
        );
    }
}

#[test]
fn the_members_of_the_json_files_are_ones_that_their_vmms_know() {
    knows_all("cloud-hypervisor.json", &CLOUD_HYPERVISOR);
    knows_all("firecracker.json", &FIRECRACKER);
}

/// What each demands of a VM that has our disk.
#[test]
fn the_json_files_keep_their_vmms_rules() {
    let document = json("cloud-hypervisor.json");
    let (queues, cpus) = (&document["disks"][1]["num_queues"], &document["cpus"]["boot_vcpus"]);
    assert_eq!(document["memory"]["shared"], true, "vhost-user needs shared memory");
    assert!(
        queues.as_u64() <= cpus.as_u64() && document["disks"][1]["vhost_socket"].is_string(),
        "{document}"
    );
    let document = json("firecracker.json");
    // A drive with a socket is refused when it has one of these, and the file when one of those is missing.
    let drive = &document["drives"][1];
    for refused in ["is_read_only", "path_on_host", "rate_limiter", "io_engine"] {
        assert!(drive[refused].is_null() && drive["socket"].is_string(), "{drive}");
    }
    for needed in ["drive_id", "is_root_device"] {
        assert!(
            document["drives"].as_array().unwrap().iter().all(|drive| !drive[needed].is_null()),
            "{document}"
        );
    }
    let roots = document["drives"].as_array().unwrap().iter().filter(|drive| drive["is_root_device"] == true);
    assert_eq!(roots.count(), 1, "{document}");
}

/// What the validator says of a domain.
fn validate(xml: &str) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("domain.xml");
    fs::write(&path, xml).unwrap();
    let command = Command::new("virt-xml-validate").arg(&path).arg("domain").output();
    command.expect("virt-xml-validate (Debian packages: libvirt-clients libxml2-utils) is missing")
}

#[test]
fn libvirts_validator_accepts_the_domain_and_no_broken_one() {
    let domain = file("libvirt.xml");
    let output = validate(&domain);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (right, wrong) in [
        ("type='unix' path=", "type='unix' file="),
        ("<access mode='shared'/>", "<access mode='ours'/>"),
        ("timeout='1'", "timeout='100ms'"),
        ("queues='4'", "queues='many'"),
    ] {
        assert!(domain.contains(right), "{right} is not in the domain");
        assert!(!validate(&domain.replace(right, wrong)).status.success(), "{wrong} is accepted");
    }
}

#[test]
fn libvirts_validator_accepts_the_domain_of_a_vm_that_is_squeezed() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("ballast.toml");
    let squeeze = "squeeze = { vmm = \"qemu\", socket = \"/run/vms/web1.qmp\", min = \"512MiB\" }";
    fs::write(&config, file("ballast.toml").replace("#squeeze = \"none\"", squeeze)).unwrap();
    let mut ballast = Command::new(env!("CARGO_BIN_EXE_ballast"));
    let args = ballast.args(["vm", "args", "web1", "--vmm", "libvirt", "--whole", "--config"]).arg(&config);
    let output = args.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let domain = String::from_utf8(output.stdout).unwrap();
    for part in ["<memballoon model='virtio'", "<qemu:commandline xmlns:qemu=", "/run/vms/web1.qmp"] {
        assert!(domain.contains(part), "{part}: {domain}");
    }
    let output = validate(&domain);
    assert!(output.status.success(), "{domain}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_domain_has_nothing_that_libvirt_refuses_for_our_disk() {
    let domain = file("libvirt.xml");
    let disk = domain.split("<disk type='vhostuser'").nth(1).unwrap().split("</disk>").next().unwrap();
    for refused in REFUSED_BY_LIBVIRT {
        assert!(!disk.contains(refused), "{refused} in {disk}");
    }
    assert!(disk.contains("snapshot='no'") && disk.contains("bus='virtio'"), "{disk}");
}

/// The scripts run what they are given besides.
#[test]
fn every_script_passes_its_arguments_on() {
    let dir = tempfile::tempdir().unwrap();
    for (script, program) in [
        ("qemu.sh", "qemu-system-x86_64"),
        ("cloud-hypervisor.sh", "cloud-hypervisor"),
        ("crosvm.sh", "crosvm"),
    ] {
        let path = dir.path().join(program);
        fs::write(&path, "#!/bin/sh\nprintf '%s\\n' \"$@\"\n").unwrap();
        assert!(Command::new("chmod").arg("+x").arg(&path).status().unwrap().success());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs").join(script);
        let path = format!("{}:{}", dir.path().display(), std::env::var("PATH").unwrap());
        let output = Command::new(&script).args(["--more", "a b"]).env("PATH", path).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(
            said.contains("/run/ballast/web1.sock") && said.ends_with("--more\na b\n"),
            "{script:?}: {said}"
        );
    }
}

/// Only the paths are the test's own. The script gives its VM 2 GiB, of which the guest is told to use 128 MiB.
#[test]
fn a_guest_of_the_qemu_script_swaps_to_a_daemon_with_the_example_configuration() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let daemon = Daemon::start(dir.path(), &file("ballast.toml"));
    let script = dir.path().join("qemu.sh");
    let run = dir.path().join("run/");
    fs::write(&script, file("qemu.sh").replace("/run/ballast/", run.to_str().unwrap())).unwrap();
    let mut command = Command::new("sh");
    command.arg(&script).args([
        "-accel",
        "tcg",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.args(["-kernel", &image("vmlinuz"), "-initrd", &image("initramfs"), "-append"]);
    command.arg(
        "console=ttyS0 quiet loglevel=4 panic=-1 mem=128M ballast.mib=160 ballast.rounds=1 ballast.serial=ballast-web1",
    );
    let mut vm = Vm::boot(command, dir.path(), |file| ["-serial".to_owned(), format!("file:{file}")]);
    let counts = vm.pass(PATIENCE);
    assert!(counts.contains("pages=40960 ") && counts.contains(" bad=0 "), "{counts}");
    let status = daemon.vm("web1");
    assert!(status["stores"].as_u64() > Some(4_000) && status["loads"].as_u64() > Some(0), "{status}");
    assert_eq!(status["errors"], 0, "{}", daemon.log());
}

/// Each file stands in the cloud-config as it is, six spaces in.
#[test]
fn the_cloud_config_writes_the_files_beside_it() {
    let config = file("guest/cloud-config.yaml");
    assert!(config.starts_with("#cloud-config\n") && config.contains("\nruncmd:\n"), "{config}");
    for (directory, name) in [
        ("/etc/udev/rules.d", "60-ballast.rules"),
        ("/etc/sysctl.d", "60-ballast.conf"),
        ("/etc/systemd/system", r"dev-disk-by\x2dlabel-ballast.swap"),
    ] {
        let indent = |line: &str| if line.is_empty() { "\n".to_owned() } else { format!("      {line}\n") };
        let content: String = file(&format!("guest/{name}")).lines().map(indent).collect();
        let entry = format!(
            "  - path: {directory}/{name}\n    owner: root:root\n    permissions: '0644'\n    content: |\n{content}"
        );
        assert!(config.contains(&entry), "expected in the cloud-config:\n{entry}");
    }
}
