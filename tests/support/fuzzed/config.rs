//! A configuration's text: refused with a message that names what is wrong, or everything in it is in its range.

use std::collections::HashSet;

use ballast::balloon::Mode;
use ballast::config::{Config, ConfigError, LIMIT_BYTES, SOCKET_PATH_BYTES_MAX, WEIGHT, reserves_max_bytes};

const HOST_BYTES: u64 = 8 << 30;

pub fn run(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    match Config::parse(text, HOST_BYTES) {
        Ok(config) => check(&config),
        Err(err @ (ConfigError::Value { .. } | ConfigError::Missing { .. })) => {
            let (ConfigError::Value { key, .. } | ConfigError::Missing { key, .. }) = &err else { return };
            let names_key = key.chars().next().is_some_and(|first| first.is_alphanumeric() || first == '[');
            assert!(names_key && err.to_string().starts_with(key.as_str()), "{err}");
        }
        Err(err @ (ConfigError::Syntax { .. } | ConfigError::InKey { .. })) => {
            assert!(!err.to_string().is_empty())
        }
        Err(err) => panic!("a text is no file: {err}"),
    }
}

fn check(config: &Config) {
    assert!((1..=64).contains(&config.workers));
    assert!((1 << 20..=HOST_BYTES).contains(&config.pool.max_bytes));
    assert!((1..=100).contains(&config.pool.accept_threshold_percent));
    assert!(config.pool.store_deadline.as_secs() <= 60);
    let names: HashSet<_> = config.vms.iter().map(|vm| &vm.name).collect();
    assert_eq!(names.len(), config.vms.len(), "two VMs of one name");
    for vm in &config.vms {
        assert!(vm.size_bytes.is_multiple_of(4096) && u64::from(vm.slots()) == vm.size_bytes / 4096);
        assert!(vm.slots() > 0);
        assert!(
            LIMIT_BYTES.contains(&vm.limit_bytes) || vm.limit_bytes == vm.size_bytes + vm.size_bytes / 64
        );
        assert!(vm.reserve_bytes <= vm.limit_bytes && WEIGHT.contains(&vm.weight));
        assert!((1..=64).contains(&vm.queues) && (1..=16).contains(&vm.label.len()));
        assert!(!vm.name.contains('/') && config.socket_path(&vm.name) != config.control_socket());
        assert!(config.socket_path(&vm.name).as_os_str().len() <= SOCKET_PATH_BYTES_MAX);
    }
    let squeezed = config.vms.iter().filter_map(|vm| vm.squeeze.as_ref());
    let mut sockets = HashSet::new();
    for squeeze in squeezed {
        let (min, max) = (squeeze.min_bytes.unwrap_or(64 << 20), squeeze.max_bytes.unwrap_or(16 << 40));
        assert!((64 << 20..=max).contains(&min) && max <= 16 << 40, "{squeeze:?}");
        match squeeze.mode {
            Mode::Auto | Mode::Observe => assert!(squeeze.min_bytes.is_some(), "{squeeze:?}"),
            Mode::Fixed(bytes) => assert!((min..=max).contains(&bytes), "{squeeze:?}"),
            Mode::Off => {}
        }
        if let Some(socket) = squeeze.vmm.socket() {
            assert!(socket.is_absolute() && !socket.starts_with(&config.runtime_dir), "{squeeze:?}");
            assert!(sockets.insert(socket), "two VMs with one socket");
        }
    }
    let reserves: u64 = config.vms.iter().map(|vm| vm.reserve_bytes).sum();
    assert!(reserves <= reserves_max_bytes(config.pool.max_bytes));
}
