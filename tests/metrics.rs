//! `/metrics` of a daemon that did something: on the control socket and, where the configuration says so, at a TCP
//! address, in the text that the scraper wants; and the latencies and sizes that it counted.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::daemon::Daemon;
use support::http::{Answer, get};
use support::working::{self, BUSY, Guest, LIMITED, free_address};

const OPEN: &str = "application/openmetrics-text; version=1.0.0";

fn over_tcp(address: SocketAddr, path: &str, accept: &str) -> Answer {
    get(TcpStream::connect(address).unwrap(), path, accept).unwrap()
}

fn over_unix(daemon: &Daemon, path: &str, accept: &str) -> Answer {
    get(UnixStream::connect(daemon.socket("control")).unwrap(), path, accept).unwrap()
}

/// The samples by what stands before their values.
fn samples(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(name, value)| (name, value.parse().unwrap()))
        .collect()
}

fn counted(histogram: &Value) -> u64 {
    histogram["buckets"].as_array().unwrap().iter().map(|bucket| bucket["count"].as_u64().unwrap()).sum()
}

#[test]
fn a_scraper_gets_the_numbers_of_the_status_on_the_socket_and_at_the_address() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let address = free_address();
    let (daemon, _guests) = working::start(dir.path(), address);
    let status = daemon.status();
    for answer in [over_unix(&daemon, "/metrics", OPEN), over_tcp(address, "/metrics", OPEN)] {
        assert_eq!((answer.status, &*answer.content_type), (200, &*format!("{OPEN}; charset=utf-8")));
        assert!(answer.body.ends_with("\n# EOF\n"));
        let samples = samples(&answer.body);
        for vm in status["vms"].as_array().unwrap() {
            let name = vm["name"].as_str().unwrap();
            for field in ["stores", "loads"] {
                let sample = format!("ballast_vm_{field}_total{{vm=\"{name}\"}}");
                assert_eq!(samples.get(&*sample).copied(), vm[field].as_f64(), "{sample}");
            }
        }
        assert_eq!(samples["ballast_writeback_state{state=\"ready\"}"], 1.0);
        let balloon = &status["vms"][0]["balloon"];
        assert_eq!((&balloon["state"], &balloon["mode"]), (&Value::from("fixed"), &Value::from("fixed")));
        let of_balloons = samples.keys().filter(|name| name.starts_with("ballast_vm_balloon_state"));
        let expected = format!("ballast_vm_balloon_state{{vm=\"{BUSY}\",state=\"fixed\"}}");
        assert_eq!(of_balloons.copied().collect::<Vec<_>>(), [&*expected], "no word but the one that holds");
        assert_eq!(samples[&*expected], 1.0);
        let target = format!("ballast_vm_balloon_target_bytes{{vm=\"{BUSY}\"}}");
        assert_eq!(samples.get(&*target).copied(), balloon["target_bytes"].as_f64());
        assert_eq!(samples.get("ballast_start_time_seconds").copied(), status["start_time_seconds"].as_f64());
    }
    for answer in [over_unix(&daemon, "/metrics", "*/*"), over_tcp(address, "/metrics", "text/plain")] {
        assert_eq!((answer.status, &*answer.content_type), (200, "text/plain; version=0.0.4; charset=utf-8"));
        assert!(!answer.body.contains("# EOF"));
    }
    assert_eq!(
        over_tcp(address, "/api/v1/status", "*/*").status,
        404,
        "the address has metrics and nothing else"
    );
}

#[test]
fn latencies_and_sizes_are_counted_by_what_was_asked_for_and_where_it_was() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let (daemon, guests) = working::start(dir.path(), free_address());
    let status = daemon.status();
    let vms = status["vms"].as_array().unwrap();
    for vm in vms {
        let loads = &vm["load_latency_ns"];
        let by_source = ["same_filled", "pool", "file"].map(|source| counted(&loads[source]));
        // Each of the guest's requests was for one page.
        assert_eq!(by_source.iter().sum::<u64>(), vm["loads"].as_u64().unwrap(), "{vm}");
        let stores = ["same_filled", "pool", "file"].map(|source| counted(&vm["store_latency_ns"][source]));
        let all = vm["stores"].as_u64().unwrap();
        assert_eq!(stores.iter().sum::<u64>(), all, "the swap header is no store of the guest's");
        assert!(stores[0] > 0 && stores[1] > 300 && stores[2] == 0, "whole pages, of both kinds: {stores:?}");
        // The loads of empty slots, and the pages that repeat a word that an entry can hold.
        assert!(by_source[0] > 100 && by_source.iter().all(|count| *count > 0), "{by_source:?}");
        assert_eq!(by_source[2], vm["counters"]["loaded_from_file"].as_u64().unwrap());
        assert!(
            loads["file"]["sum"].as_u64().unwrap() / by_source[2] > 1000,
            "a file answers in no microsecond"
        );
        let sizes = &vm["compressed_bytes"];
        let incompressible = sizes["buckets"][15]["count"].as_u64().unwrap();
        assert_eq!((sizes["buckets"][15]["le"].as_u64(), incompressible), (Some(4096), 300), "{sizes}");
        assert!(vm["store_delay_ms_sum"].as_u64().is_some());
    }
    assert!(vms[1]["counters"]["limit_hit"].as_u64().unwrap() > 0, "{LIMITED} was at its limit");
    // What rings counted that have ended is not forgotten.
    let before = [&vms[0]["store_latency_ns"], &vms[0]["load_latency_ns"]].map(Value::clone);
    drop(guests);
    let deadline = Instant::now() + Duration::from_secs(20);
    while daemon.vm(BUSY)["connected"] != false {
        assert!(Instant::now() < deadline, "the VMM is gone");
        std::thread::sleep(Duration::from_millis(10));
    }
    let vm = daemon.vm(BUSY);
    assert_eq!([&vm["store_latency_ns"], &vm["load_latency_ns"]].map(Value::clone), before);
}

#[test]
fn without_an_address_nothing_listens_and_one_that_is_taken_keeps_nobody_from_their_pages() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let one_vm = "[pool]\nmax = \"64MiB\"\n[[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n";
    let mut daemon = Daemon::start(dir.path(), one_vm);
    let threads = |daemon: &Daemon| {
        let threads = std::fs::read_dir(format!("/proc/{}/task", daemon.pid().unwrap())).unwrap();
        let names =
            threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("comm")).unwrap());
        names.map(|name| name.trim().to_owned()).collect::<Vec<_>>()
    };
    assert!(!threads(&daemon).contains(&"metrics".to_owned()));
    let somebody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = somebody.local_addr().unwrap();
    daemon.configure(&format!("metrics = \"{address}\"\n{one_vm}"));
    daemon.restart();
    Guest::attach(&daemon, "web1").work();
    assert!(daemon.log().contains("the metrics are on the control socket alone"), "{}", daemon.log());
    assert_eq!(over_unix(&daemon, "/metrics", "*/*").status, 200);
    drop(somebody);
    daemon.restart();
    assert!(threads(&daemon).contains(&"metrics".to_owned()));
    assert_eq!(over_tcp(address, "/metrics", "*/*").status, 200);
    // Whoever holds all of the connections keeps others out, and harms nobody else.
    let idle: Vec<_> =
        (0..40).map_while(|_| TcpStream::connect_timeout(&address, Duration::from_millis(50)).ok()).collect();
    assert!(idle.len() < 40, "some are refused, or left waiting");
    assert_eq!(over_unix(&daemon, "/metrics", "*/*").status, 200);
    drop(idle);
    assert_eq!(over_tcp(address, "/metrics", "*/*").status, 200);
}
