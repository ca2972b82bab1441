//! What is accepted, what holds when a key is left out, and what every refusal says.

use super::*;
use crate::reclaim::ColdOptions;

const HOST_BYTES: u64 = 16 << 30;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse(text, HOST_BYTES)
}

#[test]
fn an_empty_file_is_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config.state_dir, Path::new("/dev/shm/ballast"));
    assert_eq!(config.control_socket(), Path::new("/run/ballast/control.sock"));
    assert!((1..=4).contains(&config.workers));
    assert_eq!((config.poll, config.sandbox, config.scrub), (Duration::from_micros(50), true, None));
    assert_eq!(config.pool.max_bytes, (HOST_BYTES / 100 * 25) / 4096 * 4096);
    assert_eq!((config.pool.compressor, config.pool.accept_threshold_percent), (Compressor::Lz4, 90));
    assert_eq!((config.pool.store_deadline, config.pool.pressure), (Duration::from_secs(5), true));
    assert_eq!((config.writeback, config.metrics, config.balloon_budget_bytes), (None, None, None));
    assert!(config.vms.is_empty());
}

const EVERY_KEY: &str = r#"
        state_dir = "/dev/shm/b"
        runtime_dir = "/run/b"
        workers = 3
        poll_us = 0
        sandbox = false
        scrub = "7d"
        metrics = "[::1]:9464"
        [pool]
        max = "8GiB"
        compressor = "zstd:3"
        cold_compressor = "zstd:15+dictionary"
        cold_after = "2h"
        cold_cpu = "25%"
        deduplicate = false
        accept_threshold = 80
        store_deadline_ms = 0
        pressure = false
        [writeback]
        path = "/var/lib/b/file"
        size = "64MiB"
        daily_limit = "100GiB"
        idle = "30m"
        [[vm]]
        name = "web1"
        size = "4GiB"
        limit = "1.5GiB"
        reserve = "1.5GiB"
        weight = 10000
        writeback = false
        queues = 2
        label = "swap"
        uuid = "00112233-4455-6677-8899-aabbccddeeff"
        [[vm]]
        name = "Db.2_x-y"
        size = "1048576B"
"#;

#[test]
fn every_key_is_read() {
    let config = parse(EVERY_KEY).unwrap();
    assert_eq!((config.workers, config.poll, config.host_bytes), (3, Duration::ZERO, HOST_BYTES));
    assert!(!config.sandbox);
    assert_eq!(config.scrub, Some(Duration::from_secs(7 * 24 * 3600)));
    assert_eq!(config.metrics, Some("[::1]:9464".parse().unwrap()));
    let pool = PoolConfig {
        max_bytes: 8 << 30,
        compressor: Compressor::Zstd(3),
        cold_compressor: Some(Compressor::ZstdWithDictionary(15)),
        cold: ColdOptions { after: Duration::from_secs(7200), cpu_percent: 25, ..ColdOptions::default() },
        deduplicate: false,
        accept_threshold_percent: 80,
        store_deadline: Duration::ZERO,
        pressure: false,
    };
    assert_eq!(config.pool, pool);
    let writeback = WritebackConfig {
        path: "/var/lib/b/file".into(),
        size_bytes: Some(64 << 20),
        daily_limit_bytes: Some(100 << 30),
        idle: Some(Duration::from_secs(1800)),
    };
    assert_eq!(config.writeback, Some(writeback));
    let web = config.vm("web1").unwrap();
    assert_eq!((web.slots(), web.limit_bytes, web.queues), (1 << 20, 3 << 29, 2));
    assert_eq!((web.label.as_str(), web.uuid[15]), ("swap", 0xff));
    assert_eq!((web.reserve_bytes, web.weight, web.writeback), (3 << 29, 10_000, false));
    let db = &config.vms[1];
    assert_eq!((db.reserve_bytes, db.weight, db.writeback), (0, 100, true));
    assert_eq!(
        (db.slots(), db.limit_bytes, db.queues, db.label.as_str()),
        (256, (1 << 20) + (1 << 14), 4, "ballast")
    );
    assert_eq!(config.socket_path("web1"), Path::new("/run/b/web1.sock"));
    assert_eq!(
        config.vm("web2").unwrap_err().to_string(),
        "there is no VM \"web2\"; the VMs are: web1, Db.2_x-y"
    );
}

/// The text, then what the message must hold: the key, what was given, what is allowed.
const REFUSED: &[(&str, [&str; 3])] = &[
    ("workers = 0", ["workers", "= 0", "1 to 64"]),
    ("workers = 65", ["workers", "65", "1 to 64"]),
    ("workers = -1", ["workers", "-1", "1 to 64"]),
    ("workers = \"four\"", ["workers", "\"four\"", "whole number"]),
    ("workers = 1.5", ["workers", "1.5", "whole number"]),
    ("poll_us = 1001", ["poll_us", "1001", "0 to 1000"]),
    ("sandbox = 1", ["sandbox", "1", "true or false"]),
    ("scrub = \"1m\"", ["scrub", "1m", "from 1h to 365d"]),
    ("state_dir = \"ballast\"", ["state_dir", "\"ballast\"", "absolute path"]),
    ("state_dir = 7", ["state_dir", "7", "absolute path"]),
    ("runtime_dir = \"/run/a,b\"", ["runtime_dir", "/run/a,b", "commas"]),
    ("wrokers = 1", ["wrokers", "unknown field", "`workers`"]),
    ("[pool]\nmax = \"0%\"", ["pool.max", "\"0%\"", "1%"]),
    ("[pool]\nmax = \"91%\"", ["pool.max", "\"91%\"", "90%"]),
    ("[pool]\nmax = \"2.5%\"", ["pool.max", "\"2.5%\"", "90%"]),
    ("[pool]\nmax = \"8GB\"", ["pool.max", "\"8GB\"", "did you mean \"8GiB\"?"]),
    ("[pool]\nmax = \"17GiB\"", ["pool.max", "\"17GiB\"", "(16GiB)"]),
    ("[pool]\nmax = 4294967296", ["pool.max", "4294967296", "1MiB"]),
    ("[pool]\ncompressor = \"gzip\"", ["pool.compressor", "\"gzip\"", "lz4"]),
    ("[pool]\ncold_compressor = \"zstd:9+dict\"", ["pool.cold_compressor", "+dictionary", "none"]),
    ("[pool]\ncold_compressor = \"lz4\"", ["pool.cold_compressor", "\"lz4\"", "none"]),
    ("[pool]\ncold_after = \"0s\"", ["pool.cold_after", "1s", "30d"]),
    ("[pool]\ndeduplicate = \"yes\"", ["pool.deduplicate", "\"yes\"", "true or false"]),
    ("[pool]\ncold_cpu = 10", ["pool.cold_cpu", "\"1%\"", "\"100%\""]),
    ("[pool]\ncompressor = \"zstd:23\"", ["pool.compressor", "\"zstd:23\"", "-7 to 22"]),
    ("[pool]\naccept_threshold = 0", ["pool.accept_threshold", "= 0", "1 to 100"]),
    ("[pool]\nmaximum = 1", ["maximum", "unknown field", "`max`"]),
    ("[pool]\nstore_deadline_ms = 60001", ["pool.store_deadline_ms", "60001", "0 to 60000"]),
    ("[pool]\npressure = \"psi\"", ["pool.pressure", "\"psi\"", "true or false"]),
    ("[writeback]\nsize = \"1GiB\"", ["writeback.path", "missing", "absolute path"]),
    ("[writeback]\npath = \"x\"", ["writeback.path", "\"x\"", "absolute path"]),
    ("[writeback]\npath = \"/var/\"", ["writeback.path", "\"/var/\"", "file or a block device"]),
    ("[writeback]\npath = 1", ["writeback.path", "1", "absolute path"]),
    ("[writeback]\npath = \"/x\"\nsize = \"63MiB\"", ["writeback.size", "63MiB", "64MiB to 16TiB"]),
    ("[writeback]\npath = \"/x\"\ndaily_limit = 0", ["writeback.daily_limit", "= 0", "1MiB to 1024TiB"]),
    ("[writeback]\npath = \"/x\"\nidle = \"0s\"", ["writeback.idle", "\"0s\"", "from 1s to 30d"]),
    ("[writeback]\npath = \"/x\"\nidle = \"31d\"", ["writeback.idle", "\"31d\"", "from 1s to 30d"]),
    ("[writeback]\npath = \"/x\"\nidle = 30", ["writeback.idle", "30", "\"30m\""]),
    ("[writeback]\npath = \"/x\"\nlimit = 1", ["limit", "unknown field", "`daily_limit`"]),
    ("[[vm]]\nsize = \"1GiB\"", ["number 1: name", "missing", "1 to 64 letters"]),
    ("[[vm]]\nname = \"../etc\"", ["number 1: name", "\"../etc\"", "1 to 64 letters"]),
    ("[[vm]]\nname = \".a\"", ["name", "\".a\"", "first a letter"]),
    ("[[vm]]\nname = \"\"", ["name", "\"\"", "1 to 64"]),
    ("[[vm]]\nname = 3", ["name", "3", "1 to 64"]),
    ("[[vm]]\nname = \"control\"", ["name", "\"control\"", "another name"]),
    ("[[vm]]\nname = \"a\"", ["\"a\": size", "missing", "1MiB to 8TiB"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1MiB\"\n[[vm]]\nname = \"a\"", ["number 2: name", "\"a\"", "unique"]),
    ("[[vm]]\nname = \"a\"\nsize = \"512KiB\"", ["\"a\": size", "\"512KiB\"", "1MiB to 8TiB"]),
    ("[[vm]]\nname = \"a\"\nsize = \"9TiB\"", ["\"a\": size", "\"9TiB\"", "1MiB to 8TiB"]),
    ("[[vm]]\nname = \"a\"\nsize = 1048576", ["\"a\": size", "1048576", "with its unit"]),
    ("[[vm]]\nname = \"a\"\nsize = \"4\"", ["\"a\": size", "\"4\"", "with its unit"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1048577B\"", ["\"a\": size", "1048577", "multiple of 4KiB"]),
    ("[[vm]]\nname = \"a\"\nsize = true", ["\"a\": size", "true", "size from"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlimit = \"1KiB\"", ["\"a\": limit", "\"1KiB\"", "1MiB"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nqueues = 0", ["\"a\": queues", "= 0", "1 to 64"]),
    ("metrics = \"localhost:9464\"", ["metrics", "\"localhost:9464\"", "numeric IP address and a port"]),
    ("metrics = \"127.0.0.1\"", ["metrics", "\"127.0.0.1\"", "127.0.0.1:9464"]),
    ("metrics = \"127.0.0.1:0\"", ["metrics", "127.0.0.1:0", "a port"]),
    ("[pool]\nmetrics = \"127.0.0.1:9464\"", ["metrics", "unknown field", "above the first [section]"]),
    ("[[vm]]\nname = \"a\"\nscrub = \"7d\"", ["scrub", "line 3", "above the first [section]"]),
    ("metrics = 9464", ["metrics", "9464", "[::1]:9464"]),
    ("socket_group = 36", ["socket_group", "36", "\"kvm\""]),
    ("control_group = \"\"", ["control_group", "\"\"", "\"adm\""]),
    (
        "[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nmigration = true",
        ["\"a\": migration", "true", "\"same-host\""],
    ),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nqueues = 65", ["\"a\": queues", "65", "1 to 64"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlabel = \"12345678901234567\"", ["label", "4567", "16 bytes"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nuuid = \"zz\"", ["\"a\": uuid", "\"zz\"", "UUID"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nwieght = 2", ["wieght", "unknown field", "`weight`"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nweight = 0", ["\"a\": weight", "= 0", "1 to 10000"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nweight = 10001", ["\"a\": weight", "10001", "1 to 10000"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nwriteback = 1", ["\"a\": writeback", "1", "true or false"]),
    (
        "[[vm]]\nname = \"a\"\nsize = \"2GiB\"\nlimit = \"1GiB\"\nreserve = \"2GiB\"",
        ["\"a\": reserve", "\"2GiB\"", "0B to the VM's limit (1GiB)"],
    ),
    ("[[vm]]\nname = \"a\"\nsize = \"4g\"", ["\"a\": size", "\"4g\"", "did you mean \"4GiB\"?"]),
    ("[balloon]\nbudget = \"4gb\"", ["balloon.budget", "\"4gb\"", "did you mean \"4GiB\"?"]),
    ("[balloon]\nbudget = \"101%\"", ["balloon.budget", "\"101%\"", "\"100%\""]),
    ("[balloon]\nbudget = \"17GiB\"", ["balloon.budget", "\"17GiB\"", "64MiB to that memory (16GiB)"]),
    ("[balloon]\ninterval = \"0s\"", ["balloon.interval", "\"0s\"", "from 1s to 1m"]),
    ("[balloon]\nbudgte = 1", ["budgte", "unknown field", "`budget`"]),
    ("workers", ["workers", "line 1", "="]),
];

#[test]
fn the_packaged_file_has_its_line_for_metrics_where_it_belongs_and_says_so_of_one_at_its_end() {
    const PACKAGED: &str = include_str!("../../vmm-configs/systemd/ballast.toml");
    let line = "metrics = \"127.0.0.1:9464\"";
    let config = parse(&PACKAGED.replace(&format!("#{line}"), line)).unwrap();
    assert_eq!(config.metrics.map(|address| address.port()), Some(9464));
    let message = parse(&format!("{PACKAGED}{line}\n")).unwrap_err().to_string();
    assert!(
        message.contains("`metrics` belongs to no section: move it above the first [section]"),
        "{message}"
    );
}

#[test]
fn keys_that_belong_to_no_section_are_all_known_as_such() {
    let message = parse("colour = 1").unwrap_err().to_string();
    let listed = message.split('`').skip(3).step_by(2);
    let expected: Vec<_> =
        listed.filter(|key| !["pool", "writeback", "balloon", "vm"].contains(key)).collect();
    assert_eq!(expected, super::file::KEYS_WITHOUT_SECTION);
}

#[test]
fn every_refusal_names_the_key_the_value_and_what_is_allowed() {
    for (text, parts) in REFUSED {
        let message = parse(text).unwrap_err().to_string();
        for part in parts {
            assert!(message.contains(part), "{text:?} said {message:?}, without {part:?}");
        }
    }
}

#[test]
fn reserves_that_the_pool_does_not_have_are_refused() {
    let vm = |name: &str, reserve: &str| {
        format!("[[vm]]\nname = \"{name}\"\nsize = \"4GiB\"\nreserve = \"{reserve}\"\n")
    };
    let with =
        |second: &str| parse(&format!("[pool]\nmax = \"4GiB\"\n{}{}", vm("a", "3GiB"), vm("b", second)));
    assert!(with("512MiB").is_ok());
    let message = with("1.5GiB").unwrap_err().to_string();
    for part in ["sum of reserve", "\"4.50GiB\"", "at most nine tenths of pool.max"] {
        assert!(message.contains(part), "{message}");
    }
}

#[test]
fn durations_are_whole_numbers_with_a_unit() {
    let idle = |text: &str| {
        let config = parse(&format!("[writeback]\npath = \"/x\"\nidle = \"{text}\""))?;
        Ok::<_, ConfigError>(config.writeback.unwrap().idle.unwrap().as_secs())
    };
    for (text, seconds) in [("1s", 1), ("90m", 5400), ("2h", 7200), ("30d", 30 * 86_400)] {
        assert_eq!(idle(text).unwrap(), seconds, "{text}");
    }
    for text in ["", "s", "1", "1.5h", "+1m", "-1m", "1 m", "1w", "1mm", "\u{e9}", "99999999999999999d"] {
        assert!(idle(text).is_err(), "{text}");
    }
}

#[test]
fn the_example_is_right_with_and_without_its_comments() {
    let example = include_str!("../../vmm-configs/ballast.toml");
    let config = parse(example).unwrap();
    assert!(config.writeback.is_none());
    let uncommented: Vec<_> = example
        .lines()
        .map(|line| line.strip_prefix('#').filter(|line| !line.starts_with(' ')).unwrap_or(line))
        .collect();
    let all = parse(&uncommented.join("\n")).unwrap();
    assert_eq!((all.pool, &all.vms), (config.pool, &config.vms), "what is commented out is the default");
    assert_eq!(all.writeback.unwrap().idle, Some(Duration::from_secs(7200)));
}

#[test]
fn the_example_has_every_key() {
    let example = include_str!("../../vmm-configs/ballast.toml");
    for (section, keys_min) in [("", 8), ("[pool]\n", 5), ("[writeback]\n", 4), ("[[vm]]\n", 12)] {
        // serde lists the keys that exist for one that doesn't.
        let message = format!("{:?}", parse(&format!("{section}nonsense = 1\n")).unwrap_err());
        let (_, keys) = message.split_once("expected one of").unwrap();
        let keys: Vec<&str> = keys.split('`').skip(1).step_by(2).take(keys_min).collect();
        assert_eq!(keys.len(), keys_min, "{message}");
        for key in keys {
            let lines = [format!("\n{key} ="), format!("\n#{key} ="), format!("[{key}]")];
            assert!(lines.iter().any(|line| example.contains(line)), "{section}{key}");
        }
    }
}

#[test]
fn a_section_that_is_none_is_told_its_keys() {
    for section in ["pool", "writeback", "balloon", "vm"] {
        let brackets = if section == "vm" { "[[vm]]" } else { &format!("[{section}]") };
        let keys = parse(&format!("{brackets}\nnonsense = 1\n")).unwrap_err().to_string();
        let (_, keys) = keys.split_once("expected").unwrap();
        let keys: Vec<&str> = keys.split('`').skip(1).step_by(2).collect();
        assert!(keys.len() >= 2, "{section}");
        for value in ["3", "\"8GiB\"", "true", "[3]", "[[[]]]"] {
            let message = parse(&format!("{section} = {value}")).unwrap_err().to_string();
            assert!(message.contains(brackets), "{section} = {value}: {message}");
            assert!(!message.contains("struct"), "{message}");
            // What stands in a list of VMs is one of them, and told what one is.
            let keys = if section == "vm" && value.starts_with('[') { &["name", "size"] } else { &keys[..] };
            assert!(keys.iter().all(|key| message.contains(key)), "{section} = {value}: {message}");
        }
    }
    let message = parse("[vm]\nname = \"a\"\n").unwrap_err().to_string();
    assert!(message.contains("[[vm]], in two brackets"), "{message}");
}

#[test]
fn what_is_wrong_in_a_key_is_said_once() {
    let vm = "[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nsqueeze = { vmm = \"vhost-user\", mn = \"1GiB\" }";
    let error = parse(vm).unwrap_err();
    assert!(error.to_string().contains("`mn`") && std::error::Error::source(&error).is_none(), "{error}");
}

#[test]
fn only_a_block_device_needs_no_size() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ballast.toml");
    let load = |writeback: &str| {
        std::fs::write(&path, format!("[writeback]\n{writeback}")).unwrap();
        Config::load(&path)
    };
    let file = dir.path().join("file");
    assert!(load(&format!("path = {file:?}\nsize = \"64MiB\"")).is_ok());
    // Neither of these is one: a file that is yet to be made, a directory.
    for path in [file.as_path(), dir.path()] {
        let error = load(&format!("path = {path:?}")).unwrap_err();
        let message = std::error::Error::source(&error).unwrap().to_string();
        for part in ["writeback.size is missing", path.to_str().unwrap(), "block device", "64MiB"] {
            assert!(message.contains(part), "{message}");
        }
    }
}

#[test]
fn a_socket_path_that_fits_no_address_is_refused() {
    let vm = format!("[[vm]]\nname = \"{}\"\nsize = \"1MiB\"", "n".repeat(64));
    let with_dir = |bytes: usize| format!("runtime_dir = \"/{}\"\n{vm}", "d".repeat(bytes - 1));
    // The directory, a slash, 64 bytes of name and ".sock" are 107 bytes.
    assert!(parse(&with_dir(37)).is_ok());
    let message = parse(&with_dir(38)).unwrap_err().to_string();
    assert!(message.contains("runtime_dir") && message.contains("108 bytes"), "{message}");
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let message = Config::load(Path::new("/nonexistent/ballast.toml")).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/ballast.toml"), "{message}");
}

#[test]
fn the_host_has_memory() {
    assert!(host_bytes() > 64 << 20);
}
