//! Whatever the status has is told, in both formats, and the formats are what they claim to be.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::*;
use crate::control::api::{
    BalloonStatus, Bucket, CompressorPool, Histogram, LatencyBySource, MemoryPressure, PoolStatus, VmStatus,
    WritebackStatus,
};

/// Parts of the status that are sums over the VMs, or the same number twice; `sum(…)` makes them of what is told, but for
/// what happened to VMs that were removed or cleared.
const TOLD_OTHERWISE: &[&str] = &[
    "/pool/object_bytes",
    "/pool/payload_bytes",
    "/pool/stored_pages",
    "/pool/same_filled_pages",
    "/pool/duplicates",
    "/pool/zombie_pages",
    "/pool/shared_pages",
    "/pool/shared_objects",
    "/pool/deduplicated_bytes",
    "/pool/file_pages",
    "/pool/lost_pages",
    "/pool/waiting_stores",
    "/pool/counters/",
    "/pool/refault_age_seconds",
    "/pool/store_delay_ms",
    "/vms/0/counters/stored_incompressible_pages",
];

/// A status in which nothing is left out.
fn full_status() -> Status {
    let histogram = || Histogram { sum: 0, buckets: vec![Bucket { le: 256, count: 0 }] };
    let by_source = || LatencyBySource { same_filled: histogram(), pool: histogram(), file: histogram() };
    let some = Some(0);
    let balloon = BalloonStatus {
        reachable: true,
        configured_bytes: some,
        actual_bytes: some,
        available_bytes: some,
        other_swap_ppm: some,
        ..BalloonStatus::default()
    };
    let vm = VmStatus {
        balloon: Some(balloon),
        name: "we\"b\\1".to_owned(),
        refault_age_seconds: vec![Bucket { le: 1, count: 0 }],
        store_delay_ms: vec![Bucket { le: 1, count: 0 }],
        store_latency_ns: by_source(),
        load_latency_ns: by_source(),
        compressed_bytes: histogram(),
        ..VmStatus::default()
    };
    let pool = PoolStatus { pools: vec![CompressorPool::default()], ..PoolStatus::default() };
    let file = WritebackStatus { daily_limit_bytes: Some(0), ..WritebackStatus::default() };
    let memory_pressure = Some(MemoryPressure::default());
    Status { pool, writeback: Some(file), memory_pressure, vms: vec![vm], ..Status::default() }
}

/// Gives every number of `value` another value; those that are not told elsewhere go to `given`, by their paths.
fn number_all(value: &mut Value, path: &str, next: &mut u32, given: &mut BTreeMap<String, u32>) {
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                number_all(value, &format!("{path}/{name}"), next, given);
            }
        }
        Value::Array(values) => {
            for (n, value) in values.iter_mut().enumerate() {
                number_all(value, &format!("{path}/{n}"), next, given);
            }
        }
        // A bucket's end is no number that is counted.
        Value::Number(_) if !path.ends_with("/le") => {
            *next += 7;
            *value = (*next).into();
            if !TOLD_OTHERWISE.iter().any(|told| path.starts_with(told)) {
                given.insert(path.to_owned(), *next);
            }
        }
        _ => {}
    }
}

/// The values of all samples, by what their lines begin with.
fn samples(text: &str) -> Vec<(&str, &str)> {
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.map(|line| line.rsplit_once(' ').unwrap()).collect()
}

/// Where a number of the status is told: the metric, and for some the value of a label.
fn metric_of(path: &str) -> (String, Option<&str>) {
    let (path, suffix) = match path.rsplit_once('/') {
        // The one bucket that there is.
        Some((before, "count")) => (before.trim_end_matches("/0").trim_end_matches("/buckets"), "_bucket"),
        Some((before, "sum")) => (before, "_sum"),
        _ => path.strip_suffix("_sum").map_or((path, ""), |path| (path, "_sum")),
    };
    let (path, label) = match path.rsplit_once('/') {
        Some((before, label)) if before.ends_with("latency_ns") || before.ends_with("runs_by_reason") => {
            (before, Some(label))
        }
        _ => (path, None),
    };
    let mut name = path.replace("/vms/0/", "/vm/").replace("/pools/0/", "/").replace("/counters/", "/");
    for (ours, theirs) in [
        ("_latency_ns", "_latency_seconds"),
        ("_delay_ms", "_delay_seconds"),
        ("_threshold_percent", "_threshold_ratio"),
        ("_by_reason", ""),
        ("some_avg10_ppm", "avg10_ratio"),
        ("full_avg10_ppm", "avg10_ratio"),
        ("duplicates", "duplicate_pages"),
        ("vm/crashes", "vm/consecutive_crashes"),
    ] {
        name = name.replace(ours, theirs);
    }
    let label =
        label.or_else(|| ["some", "full"].into_iter().find(|tasks| path.contains(&format!("{tasks}_avg10"))));
    (format!("ballast{}{suffix}", name.replace('/', "_")), label)
}

#[test]
fn every_number_of_the_status_is_told() {
    let mut value = serde_json::to_value(full_status()).unwrap();
    let mut given = BTreeMap::new();
    number_all(&mut value, "", &mut 100_003, &mut given);
    assert!(given.len() > 70, "{given:?}");
    let status: Status = serde_json::from_value(value).unwrap();
    for exposition in [Exposition::OpenMetrics, Exposition::Text] {
        let text = render(&status, exposition);
        let told = samples(&text);
        for (path, number) in &given {
            let number = f64::from(*number);
            // In base units.
            let per = [
                ("percent", 100.0),
                ("avg10_ppm", 1e6),
                ("_ms_sum", 1e3),
                ("_ns/sum", 1e9),
                ("latency_ns/", 1e9),
            ];
            let per = per.iter().find(|(name, _)| path.contains(name) && !path.ends_with("/count"));
            let expected = number / per.map_or(1.0, |(_, per)| *per);
            let forms = [expected.to_string(), format!("{expected:.1}")];
            let (name, label) = metric_of(path);
            let is_it = |sample: &str| {
                let (metric, labels) = sample.split_once('{').unwrap_or((sample, ""));
                (metric == name || metric == format!("{name}_total"))
                    && label.is_none_or(|label| labels.contains(&format!("=\"{label}\"")))
            };
            let found: Vec<_> =
                told.iter().filter(|(sample, _)| is_it(sample)).map(|(_, value)| *value).collect();
            let is_told = forms.iter().any(|form| found.contains(&form.as_str()));
            assert!(is_told, "{path} = {number} is not told as {name} {label:?}, which has {found:?}");
        }
    }
}

#[test]
fn what_is_said_to_be_told_otherwise_is_there() {
    let value = serde_json::to_value(full_status()).unwrap();
    for path in TOLD_OTHERWISE {
        assert!(value.pointer(path.trim_end_matches('/')).is_some(), "{path}");
    }
}

/// The declared families with their types, by what their samples begin with.
fn families(text: &str) -> Vec<(&str, &str)> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    types.map(|family| family.split_once(' ').unwrap()).collect()
}

#[test]
fn both_texts_say_the_same_and_differ_where_the_formats_do() {
    let status = full_status();
    let (open, text) = (render(&status, Exposition::OpenMetrics), render(&status, Exposition::Text));
    let samples = |text: &str| {
        text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(samples(&open), samples(&text));
    assert!(open.ends_with("\n# EOF\n") && !text.contains("# EOF") && !text.contains("# UNIT"));
    for line in [
        "# TYPE ballast_vm_stores counter",
        "# TYPE ballast_build info",
        "# UNIT ballast_pool_max_bytes bytes",
        "# UNIT ballast_vm_store_latency_seconds seconds",
        "ballast_vm_stores_total{vm=\"we\\\"b\\\\1\"} 0",
        "ballast_vm_balloon_state{vm=\"we\\\"b\\\\1\",state=\"off\"} 1",
        "ballast_vm_store_latency_seconds_bucket{vm=\"we\\\"b\\\\1\",source=\"pool\",le=\"0.000000256\"} 0",
        "ballast_vm_refault_age_seconds_bucket{vm=\"we\\\"b\\\\1\",le=\"4194304.0\"} 0",
        "ballast_vm_load_latency_seconds_bucket{vm=\"we\\\"b\\\\1\",source=\"file\",le=\"+Inf\"} 0",
    ] {
        assert!(open.lines().any(|other| other == line), "{line}");
    }
    for line in ["# TYPE ballast_vm_stores_total counter", "# TYPE ballast_build_info gauge"] {
        assert!(text.lines().any(|other| other == line), "{line}");
    }
    assert!(!open.contains("_total counter"));
}

#[test]
fn names_keep_to_the_conventions_and_are_declared_once() {
    let text = render(&full_status(), Exposition::Text);
    let mut seen = BTreeSet::new();
    for (name, kind) in families(&text) {
        assert!(name.starts_with("ballast_") && seen.insert(name), "{name}");
        assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        assert!(!["_ms", "_ns", "_us", "_percent"].iter().any(|unit| name.ends_with(unit)), "{name}");
        let help = format!("# HELP {name} ");
        let help = text.lines().find_map(|line| line.strip_prefix(&*help)).unwrap();
        assert!(help.ends_with('.') && help.len() > 10, "{name}: {help}");
    }
    assert!(seen.len() > 60);
}

#[test]
fn buckets_add_up() {
    let mut status = full_status();
    let bucket = |le, count| Bucket { le, count };
    // Empty ones are left out, and the last one of these has no end.
    status.vms[0].store_latency_ns.pool =
        Histogram { sum: 1500, buckets: vec![bucket(512, 2), bucket(1024, 1), bucket(256 << 27, 4)] };
    let text = render(&status, Exposition::Text);
    let ends = text.lines().filter(|line| {
        line.starts_with("ballast_vm_store_latency_seconds_") && line.contains("source=\"pool\"")
    });
    let counts: Vec<_> = ends.map(|line| line.rsplit_once(' ').unwrap().1).collect();
    let mut expected = vec!["0", "2"];
    expected.extend(["3"; 25]);
    expected.extend(["7", "0.0000015", "7"]);
    assert_eq!(counts, expected);
}

#[test]
fn a_daemon_without_vms_or_a_file_has_no_families_without_samples() {
    let text = render(&Status::default(), Exposition::OpenMetrics);
    assert!(!text.contains("ballast_vm_") && !text.contains("ballast_writeback_"), "{text}");
    let many = Status { vms: vec![VmStatus::default(); 2], ..Status::default() };
    assert_eq!(render(&many, Exposition::Text).matches("# TYPE ballast_vm_stores_total ").count(), 1);
}
