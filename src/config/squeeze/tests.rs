//! What `squeeze` may be, what holds when a key of it is left out, and what every refusal says.

use super::promotion_rate::{parse, to_text};
use super::*;
use crate::config::{Config, ConfigError};

const QEMU: &str = "vmm = \"qemu\", socket = \"/run/vms/a.qmp\"";

fn config(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, 16 << 30)
}

/// A VM with this value.
fn vm(name: &str, squeeze: &str) -> String {
    format!("[[vm]]\nname = \"{name}\"\nsize = \"1GiB\"\nsqueeze = {squeeze}\n")
}

fn squeeze(value: &str) -> Result<Option<SqueezeConfig>, ConfigError> {
    config(&vm("a", value)).map(|mut config| config.vms.remove(0).squeeze)
}

fn given(value: &str) -> SqueezeConfig {
    squeeze(value).unwrap().unwrap()
}

#[test]
fn what_is_left_out_has_a_default() {
    assert_eq!(config("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\n").unwrap().vms[0].squeeze, None);
    assert_eq!(squeeze("\"none\"").unwrap(), None);
    let expected = SqueezeConfig {
        vmm: SqueezeVmm::Qemu("/run/vms/a.qmp".into()),
        mode: Mode::Auto,
        min_bytes: Some(512 << 20),
        max_bytes: None,
        promotion_rate_ppm: 2000,
    };
    assert_eq!(given(&format!("{{ {QEMU}, min = \"512MiB\" }}")), expected);
}

#[test]
fn every_key_is_read_and_written_as_it_is_read() {
    let text = "{ vmm = \"cloud-hypervisor\", socket = \"/s\", mode = \"observe\", min = \"64MiB\", max = \"8GiB\", \
                promotion_rate = \"1.25%\" }";
    let all = given(text);
    assert_eq!(all.vmm, SqueezeVmm::CloudHypervisor("/s".into()));
    assert_eq!((all.mode, all.min_bytes, all.max_bytes), (Mode::Observe, Some(64 << 20), Some(8 << 30)));
    assert_eq!(all.promotion_rate_ppm, 12_500);
    let fixed = given("{ vmm = \"vhost-user\", mode = \"fixed\", to = \"2GiB\" }");
    assert_eq!(
        (&fixed.vmm, fixed.mode, fixed.min_bytes),
        (&SqueezeVmm::VhostUser, Mode::Fixed(2 << 30), None)
    );
    let off = given(&format!("{{ {QEMU}, mode = \"off\" }}"));
    assert_eq!((off.mode, off.min_bytes), (Mode::Off, None));
    for value in [all, fixed, off] {
        let text = value.value().to_string();
        assert_eq!(given(&text), value, "{text}");
    }
}

#[test]
fn a_promotion_rate_is_read_back_as_it_was() {
    for (text, ppm) in [("0.01%", 100), ("0.2%", 2000), ("0.20%", 2000), ("1%", 10_000), ("10%", 100_000)] {
        assert_eq!(parse(text), Some(ppm), "{text}");
        assert_eq!(parse(&to_text(ppm)), Some(ppm), "{text}");
    }
    assert_eq!([2000, 10_000, 100, 12_500].map(to_text), ["0.2%", "1%", "0.01%", "1.25%"]);
    for text in ["", "%", "0.2", ".2%", "1.%", "+1%", "-1%", "0.125%", "1 %", "99999999%"] {
        assert_eq!(parse(text), None, "{text}");
    }
}

/// Values, and what the message must name: the key, what was given, what is allowed.
const REFUSED: &[(&str, [&str; 3])] = &[
    ("true", ["\"a\": squeeze", "true", "{ vmm = \"qemu\""]),
    ("\"off\"", ["\"a\": squeeze", "\"off\"", "\"none\""]),
    ("{ min = \"1GiB\" }", ["\"a\": squeeze.vmm", "missing", "\"vhost-user\""]),
    ("{ vmm = \"xen\" }", ["\"a\": squeeze.vmm", "\"xen\"", "\"cloud-hypervisor\""]),
    ("{ vmm = \"qemu\", min = \"1GiB\" }", ["squeeze.socket", "missing", "absolute path"]),
    ("{ vmm = \"qemu\", socket = \"a.qmp\" }", ["squeeze.socket", "\"a.qmp\"", "absolute path"]),
    ("{ vmm = \"qemu\", socket = \"/a,b\" }", ["squeeze.socket", "\"/a,b\"", "commas"]),
    ("{ vmm = \"qemu\", socket = \"/a/../b\" }", ["squeeze.socket", "\"/a/../b\"", "without \"..\""]),
    ("{ vmm = \"qemu\", socket = 7 }", ["squeeze.socket", "= 7", "at most 107 bytes"]),
    ("{ vmm = \"vhost-user\", socket = \"/a\" }", ["squeeze.socket", "\"/a\"", "left out"]),
    ("{ vmm = \"vhost-user\" }", ["squeeze.min", "missing", "from 64MiB"]),
    ("{ vmm = \"vhost-user\", mode = \"observe\" }", ["squeeze.min", "missing", "mode = \"off\""]),
    ("{ vmm = \"vhost-user\", mode = \"on\" }", ["squeeze.mode", "\"on\"", "\"auto\", \"observe\""]),
    ("{ vmm = \"vhost-user\", mode = 1 }", ["squeeze.mode", "= 1", "\"auto\""]),
    ("{ vmm = \"vhost-user\", min = \"63MiB\" }", ["squeeze.min", "\"63MiB\"", "64MiB to 16TiB"]),
    ("{ vmm = \"vhost-user\", min = 67108865 }", ["squeeze.min", "67108865", "multiple of 4KiB"]),
    ("{ vmm = \"vhost-user\", min = \"2GiB\", max = \"1GiB\" }", ["squeeze.max", "\"1GiB\"", "from 2GiB"]),
    ("{ vmm = \"vhost-user\", mode = \"fixed\" }", ["squeeze.to", "missing", "64MiB to 16TiB"]),
    (
        "{ vmm = \"vhost-user\", mode = \"fixed\", to = \"3GiB\", max = \"2GiB\" }",
        ["squeeze.to", "\"3GiB\"", "64MiB to 2GiB"],
    ),
    ("{ vmm = \"vhost-user\", min = \"1GiB\", to = \"2GiB\" }", ["squeeze.to", "\"2GiB\"", "\"fixed\""]),
    (
        "{ vmm = \"vhost-user\", min = \"1GiB\", promotion_rate = \"11%\" }",
        ["squeeze.promotion_rate", "\"11%\"", "\"0.01%\" to \"10%\""],
    ),
    (
        "{ vmm = \"vhost-user\", min = \"1GiB\", promotion_rate = 0.2 }",
        ["squeeze.promotion_rate", "0.2", "\"10%\""],
    ),
    (
        "{ vmm = \"vhost-user\", promotoin_rate = \"1%\" }",
        ["\"a\": squeeze", "`promotoin_rate`", "did you mean `promotion_rate`?"],
    ),
];

#[test]
fn every_refusal_names_the_key_the_value_and_what_is_allowed() {
    for (value, parts) in REFUSED {
        let message = squeeze(value).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{value:?} said {message:?}, without {part:?}");
        }
    }
}

#[test]
fn a_socket_belongs_to_one_vm_and_not_to_the_daemon() {
    let value = |socket: &str| format!("{{ vmm = \"qemu\", socket = \"{socket}\", min = \"1GiB\" }}");
    let two = |first: &str, second: &str| config(&(vm("a", &value(first)) + &vm("b", &value(second))));
    assert!(two("/run/vms/a.qmp", "/run/vms/b.qmp").is_ok());
    for (first, second, parts) in [
        ("/run/vms/a.qmp", "/run/vms//a.qmp", ["the VM \"b\": squeeze.socket", "the VM \"a\" has it"]),
        (
            "/run/ballast/control.sock",
            "/b",
            ["the VM \"a\": squeeze.socket", "another directory than runtime_dir"],
        ),
        ("/a", "/run/ballast/vms/b", ["the VM \"b\": squeeze.socket", "/run/ballast/vms/b"]),
    ] {
        let message = two(first, second).unwrap_err().to_string();
        assert!(parts.iter().all(|part| message.contains(part)), "{message}");
    }
    let of_length = |bytes: usize| squeeze(&value(&format!("/{}", "s".repeat(bytes - 1))));
    assert!(of_length(107).is_ok());
    assert!(of_length(108).unwrap_err().to_string().contains("at most 107 bytes"));
}

#[test]
fn the_socket_of_our_own_balloon_fits_an_address_too() {
    let dir = |bytes: usize| format!("runtime_dir = \"/{}\"\n", "d".repeat(bytes - 1));
    let own = "{ vmm = \"vhost-user\", min = \"1GiB\" }";
    // The directory, "/balloon/", the name and ".sock" are 107 bytes.
    assert!(config(&(dir(92) + &vm("a", own))).is_ok());
    let message = config(&(dir(93) + &vm("a", own))).unwrap_err().to_string();
    assert!(message.contains("balloon/a.sock would have 108 bytes"), "{message}");
    assert!(config(&(dir(93) + &vm("a", "\"none\""))).is_ok());
}

#[test]
fn a_budget_has_room_for_what_nobody_may_take() {
    let auto = "{ vmm = \"vhost-user\", min = \"3GiB\" }";
    let fixed = "{ vmm = \"vhost-user\", mode = \"fixed\", to = \"2GiB\" }";
    let off = "{ vmm = \"vhost-user\", mode = \"off\", min = \"8GiB\" }";
    let vms = vm("a", auto) + &vm("b", fixed) + &vm("c", off);
    let with = |budget: &str| config(&format!("[balloon]\nbudget = \"{budget}\"\n{vms}"));
    assert_eq!(with("5GiB").unwrap().balloon_budget_bytes, Some(5 << 30));
    assert_eq!(with("50%").unwrap().balloon_budget_bytes, Some((16 << 30) / 100 * 50));
    let message = with("4.5GiB").unwrap_err().to_string();
    for part in ["sum of squeeze.min", "\"5GiB\"", "balloon.budget (4.50GiB)"] {
        assert!(message.contains(part), "{message}");
    }
}
