//! A real Prometheus takes what the daemon tells, and everything in `vmm-configs/prometheus` works on it: each query of
//! the dashboard, each rule, each rule's own tests. It needs Debian's package `prometheus`, which `images/install-missing
//! tests` installs.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use support::http::get;
use support::working::{self, Guest, free_address};

const PATIENCE: Duration = Duration::from_secs(60);

fn kit(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("vmm-configs/prometheus").join(name)
}

/// Starts one of the package's programs.
fn spawn(command: &mut Command) -> Child {
    let name = command.get_program().to_string_lossy().into_owned();
    command.spawn().unwrap_or_else(|err| {
        panic!("{name} can't be run ({err}): install Debian's package `prometheus`, as `images/install-missing tests` does")
    })
}

/// Runs promtool with `input`, and expects that it finds nothing wrong.
fn promtool(args: &[&str], input: &str) -> String {
    let mut command = Command::new("promtool");
    command
        .args(args)
        .current_dir(kit(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = spawn(&mut command);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
    let said = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).join("");
    assert!(status.success(), "promtool {args:?}: {status}\n{said}");
    said
}

#[test]
fn promtool_finds_nothing_wrong_with_the_metrics_of_a_daemon_that_worked() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let address = free_address();
    let (_daemon, _guests) = working::start(dir.path(), address);
    let answer = get(TcpStream::connect(address).unwrap(), "/metrics", "*/*").unwrap();
    assert_eq!(promtool(&["check", "metrics"], &answer.body), "", "not even a remark");
}

#[test]
fn the_rules_hold_and_fire_when_they_should() {
    promtool(&["check", "config", "prometheus.yml"], "");
    promtool(&["check", "rules", "alerts.yml"], "");
    promtool(&["test", "rules", "alerts_test.yml"], "");
    // Nobody forgot to write a test.
    let tests = fs::read_to_string(kit("alerts_test.yml")).unwrap();
    for (name, _) in alerts() {
        let fires = tests
            .split("- interval:")
            .any(|test| test.contains(&format!("alertname: {name}\n")) && test.contains("exp_alerts:"));
        assert!(fires, "no test of {name} has it fire");
    }
}

/// The alerts by name, with their expressions.
fn alerts() -> Vec<(String, String)> {
    let text = fs::read_to_string(kit("alerts.yml")).unwrap();
    let alerts = text.split("- alert: ").skip(1).map(|alert| {
        let name = alert.lines().next().unwrap().to_owned();
        let mut lines = alert.lines().skip_while(|line| !line.trim_start().starts_with("expr:"));
        let first = lines.next().unwrap().trim().trim_start_matches("expr:").trim().trim_start_matches(">-");
        // Lines that belong to it are indented more.
        let more = lines.take_while(|line| line.starts_with("          "));
        (name, more.fold(first.to_owned(), |text, line| format!("{text} {}", line.trim())))
    });
    let alerts: Vec<_> = alerts.collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    alerts
}

/// A Prometheus that scrapes one daemon all the time. Dropping it ends it.
struct Prometheus {
    child: Child,
    address: SocketAddr,
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Prometheus {
    fn start(dir: &Path, daemon: SocketAddr) -> Self {
        let config = fs::read_to_string(kit("prometheus.yml")).unwrap();
        let config = config.replace("15s", "200ms").replace("127.0.0.1:9464", &daemon.to_string());
        fs::write(dir.join("prometheus.yml"), config).unwrap();
        fs::copy(kit("alerts.yml"), dir.join("alerts.yml")).unwrap();
        let address = free_address();
        let mut command = Command::new("prometheus");
        command
            .arg(format!("--web.listen-address={address}"))
            .arg(format!("--config.file={}", dir.join("prometheus.yml").display()))
            .arg(format!("--storage.tsdb.path={}", dir.join("data").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(dir.join("log")).unwrap());
        Self { child: spawn(&mut command), address }
    }

    /// What its API answers, or why it doesn't.
    fn ask(&self, path: &str) -> Result<Value, String> {
        let stream = TcpStream::connect(self.address).map_err(|err| err.to_string())?;
        let answer = get(stream, path, "*/*").map_err(|err| err.to_string())?;
        let value: Value = serde_json::from_str(&answer.body).map_err(|_| answer.body.clone())?;
        if value["status"] == "success" { Ok(value["data"].clone()) } else { Err(answer.body) }
    }

    /// What a query gives.
    fn query(&self, query: &str) -> Vec<Value> {
        let escaped: String = query.bytes().map(|byte| format!("%{byte:02X}")).collect();
        let answer = self.ask(&format!("/api/v1/query?query={escaped}"));
        let answer = answer.unwrap_or_else(|err| panic!("{query}: {err}"));
        answer["result"].as_array().unwrap_or_else(|| panic!("{query}: {answer}")).clone()
    }

    /// Waits until it has scraped the daemon a few times.
    fn wait_for_scrapes(&self, dir: &Path) {
        let deadline = Instant::now() + PATIENCE;
        let scraped = || {
            let answer =
                self.ask("/api/v1/query?query=count_over_time(ballast_start_time_seconds[1m])").ok()?;
            answer["result"][0]["value"][1].as_str()?.parse::<u32>().ok()
        };
        while scraped().is_none_or(|times| times < 5) {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            let targets = self.ask("/api/v1/targets");
            assert!(Instant::now() < deadline, "no scrapes: {targets:?}\n{log}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// All queries of the dashboard, with what its variables stand for put in.
fn dashboard_queries() -> Vec<String> {
    let dashboard: Value = serde_json::from_str(&fs::read_to_string(kit("dashboard.json")).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.filter_map(|panel| panel["targets"].as_array()).flatten();
    let queries = targets.map(|target| target["expr"].as_str().unwrap());
    let queries: Vec<_> = queries
        .map(|query| {
            [("$instance", ".*"), ("$vm", ".*"), ("$__rate_interval", "1m")]
                .iter()
                .fold(query.to_owned(), |query, (variable, value)| query.replace(variable, value))
        })
        .collect();
    assert!(queries.len() > 30 && queries.iter().all(|query| !query.contains('$')), "{queries:?}");
    queries
}

/// The names of our metrics in an expression.
fn metrics_in(expression: &str) -> BTreeSet<&str> {
    let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
    words.filter(|word| word.starts_with("ballast_")).collect()
}

#[test]
fn a_prometheus_scrapes_the_daemon_and_answers_every_query_of_dashboard_and_alerts() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let address = free_address();
    let (_daemon, mut guests) = working::start(dir.path(), address);
    let prometheus_dir = dir.path().join("prometheus");
    fs::create_dir(&prometheus_dir).unwrap();
    let prometheus = Prometheus::start(&prometheus_dir, address);
    prometheus.wait_for_scrapes(&prometheus_dir);
    guests.iter_mut().for_each(Guest::work);
    std::thread::sleep(Duration::from_millis(500));

    assert_eq!(prometheus.query("up{job=\"ballast\"} == 1").len(), 1);
    for query in dashboard_queries() {
        assert!(!prometheus.query(&query).is_empty(), "a panel of the dashboard is empty: {query}");
    }
    for source in ["same_filled", "pool", "file"] {
        let query = format!("increase(ballast_vm_load_latency_seconds_count{{source=\"{source}\"}}[1m]) > 0");
        assert_eq!(prometheus.query(&query).len(), 2, "both VMs loaded pages: {source}");
    }
    let quantile =
        "histogram_quantile(0.5, sum by (le) (ballast_vm_load_latency_seconds_bucket{source=\"pool\"}))";
    let median: f64 = prometheus.query(quantile)[0]["value"][1].as_str().unwrap().parse().unwrap();
    assert!(median > 1e-7 && median < 1.0, "in seconds: {median}");

    let known = prometheus.ask("/api/v1/label/__name__/values").unwrap();
    let known: BTreeSet<_> = known.as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for (name, expression) in alerts() {
        // No error; and what it looks at is there, although there may be nothing to tell.
        prometheus.query(&expression);
        for metric in metrics_in(&expression) {
            assert!(known.contains(metric), "{name} looks at {metric}, which the daemon doesn't tell");
        }
    }
    // The rules that it has loaded itself were evaluated without an error.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let groups = prometheus.ask("/api/v1/rules").unwrap();
        let rules = groups["groups"][0]["rules"].as_array().unwrap();
        let health: Vec<_> = rules.iter().map(|rule| rule["health"].as_str().unwrap()).collect();
        if health.iter().all(|health| *health == "ok") && health.len() == alerts().len() {
            break;
        }
        assert!(!health.contains(&"err") && Instant::now() < deadline, "{groups}");
        std::thread::sleep(Duration::from_millis(200));
    }
}
