//! What is accepted, what holds when a key is left out, and what every refusal says.

use super::*;

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
    assert_eq!(config.poll, Duration::from_micros(50));
    assert_eq!(config.pool.max_bytes, (HOST_BYTES / 100 * 25) / 4096 * 4096);
    assert_eq!((config.pool.compressor, config.pool.accept_threshold_percent), (Compressor::Lz4, 90));
    assert!(config.vms.is_empty());
}

#[test]
fn every_key_is_read() {
    let config = parse(
        r#"
        state_dir = "/dev/shm/b"
        runtime_dir = "/run/b"
        workers = 3
        poll_us = 0
        [pool]
        max = "8GiB"
        compressor = "zstd:3"
        accept_threshold = 80
        [[vm]]
        name = "web1"
        size = "4GiB"
        limit = "1.5GiB"
        queues = 2
        label = "swap"
        uuid = "00112233-4455-6677-8899-aabbccddeeff"
        [[vm]]
        name = "Db.2_x-y"
        size = 1048576
        "#,
    )
    .unwrap();
    assert_eq!((config.workers, config.poll, config.host_bytes), (3, Duration::ZERO, HOST_BYTES));
    let pool =
        PoolConfig { max_bytes: 8 << 30, compressor: Compressor::Zstd(3), accept_threshold_percent: 80 };
    assert_eq!(config.pool, pool);
    let web = config.vm("web1").unwrap();
    assert_eq!((web.slots(), web.limit_bytes, web.queues), (1 << 20, 3 << 29, 2));
    assert_eq!((web.label.as_str(), web.uuid[15]), ("swap", 0xff));
    let db = &config.vms[1];
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
    ("state_dir = \"ballast\"", ["state_dir", "\"ballast\"", "absolute path"]),
    ("state_dir = 7", ["state_dir", "7", "absolute path"]),
    ("runtime_dir = \"/run/a,b\"", ["runtime_dir", "/run/a,b", "commas"]),
    ("wrokers = 1", ["wrokers", "unknown field", "`workers`"]),
    ("[pool]\nmax = \"0%\"", ["pool.max", "\"0%\"", "1%"]),
    ("[pool]\nmax = \"91%\"", ["pool.max", "\"91%\"", "90%"]),
    ("[pool]\nmax = \"2.5%\"", ["pool.max", "\"2.5%\"", "90%"]),
    ("[pool]\nmax = \"8GB\"", ["pool.max", "\"8GB\"", "1MiB"]),
    ("[pool]\nmax = \"17GiB\"", ["pool.max", "\"17GiB\"", "(16GiB)"]),
    ("[pool]\nmax = 4096", ["pool.max", "4096", "1MiB"]),
    ("[pool]\ncompressor = \"gzip\"", ["pool.compressor", "\"gzip\"", "lz4"]),
    ("[pool]\ncompressor = \"zstd:23\"", ["pool.compressor", "\"zstd:23\"", "-7 to 22"]),
    ("[pool]\naccept_threshold = 0", ["pool.accept_threshold", "= 0", "1 to 100"]),
    ("[pool]\nmaximum = 1", ["maximum", "unknown field", "`max`"]),
    ("[writeback]\npath = \"/x\"", ["[writeback]", "no writeback", "remove"]),
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
    ("[[vm]]\nname = \"a\"\nsize = 1048577", ["\"a\": size", "1048577", "multiple of 4KiB"]),
    ("[[vm]]\nname = \"a\"\nsize = true", ["\"a\": size", "true", "size from"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlimit = \"1KiB\"", ["\"a\": limit", "\"1KiB\"", "1MiB"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nqueues = 0", ["\"a\": queues", "= 0", "1 to 64"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nqueues = 65", ["\"a\": queues", "65", "1 to 64"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nlabel = \"12345678901234567\"", ["label", "4567", "16 bytes"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nuuid = \"zz\"", ["\"a\": uuid", "\"zz\"", "UUID"]),
    ("[[vm]]\nname = \"a\"\nsize = \"1GiB\"\nweight = 2", ["weight", "unknown field", "`limit`"]),
    ("workers", ["workers", "line 1", "="]),
];

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
