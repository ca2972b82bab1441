//! The description of the control API against what a running daemon answers: every answer is of the schema that its path
//! and status have, down to the last name in it, and every schema is met by one.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ballast::frontend::{Device, Memory, Options};
use serde_json::{Value, json};
use support::daemon::Daemon;
use support::page_of;

const CONFIG: &str = "workers = 2\n[pool]\nmax = \"64MiB\"\npressure = false\n\
    [[vm]]\nname = \"web1\"\nsize = \"16MiB\"\n[[vm]]\nname = \"web2\"\nsize = \"16MiB\"\n";

/// One request as curl would send it: the status and the body.
fn request(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: b\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), serde_json::from_str(body).unwrap())
}

/// The description, and which of its schemas have been met.
struct Description {
    root: Value,
    met: BTreeSet<String>,
}

impl Description {
    fn check(&mut self, value: &Value, schema: &Value) -> Result<(), String> {
        if let Some(name) = schema["$ref"].as_str().and_then(|at| at.strip_prefix("#/components/schemas/")) {
            let schema = self.root["components"]["schemas"][name].clone();
            assert!(schema.is_object(), "there is no schema {name}");
            let checked = self.check(value, &schema).map_err(|err| format!("{name}: {err}"));
            if checked.is_ok() {
                self.met.insert(name.to_owned());
            }
            return checked;
        }
        if let Some(alternatives) = schema["oneOf"].as_array() {
            let errors: Vec<_> = alternatives.iter().filter_map(|one| self.check(value, one).err()).collect();
            let fit = alternatives.len() - errors.len();
            return if fit == 1 {
                Ok(())
            } else {
                Err(format!("{value} fits {fit} of {alternatives:?}: {errors:?}"))
            };
        }
        if let Some(words) = schema["enum"].as_array() {
            return words
                .contains(value)
                .then_some(())
                .ok_or_else(|| format!("{value} is none of {words:?}"));
        }
        self.check_type(value, schema)
    }

    fn check_type(&mut self, value: &Value, schema: &Value) -> Result<(), String> {
        let types = match &schema["type"] {
            Value::Array(types) => types.clone(),
            Value::Null => return Err(format!("a schema without a type: {schema}")),
            one => vec![one.clone()],
        };
        let found = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        if !types.iter().any(|one| one == found) {
            return Err(format!("{value} is a {found} and no {types:?}"));
        }
        match value {
            Value::Number(number) if schema["minimum"] == 0 && !number.is_u64() => {
                Err(format!("{number} is less than 0"))
            }
            Value::Array(items) => items.iter().try_for_each(|item| self.check(item, &schema["items"])),
            Value::Object(fields) => self.check_fields(fields, schema),
            _ => Ok(()),
        }
    }

    fn check_fields(
        &mut self,
        fields: &serde_json::Map<String, Value>,
        schema: &Value,
    ) -> Result<(), String> {
        for name in schema["required"].as_array().into_iter().flatten() {
            if !fields.contains_key(name.as_str().unwrap()) {
                return Err(format!("{name} is missing"));
            }
        }
        // Described as any object, it may have anything.
        let Some(known) = schema["properties"].as_object() else { return Ok(()) };
        for (name, value) in fields {
            let schema = known.get(name).ok_or_else(|| format!("{name} is not described"))?;
            self.check(value, schema).map_err(|err| format!("{name}: {err}"))?;
        }
        Ok(())
    }

    /// The schema of an answer; `path` is as in the description.
    fn of_answer(&self, method: &str, path: &str, status: u16) -> Value {
        let answers = &self.root["paths"][path][method.to_lowercase()]["responses"];
        let status = status.to_string();
        let answer = answers.get(&status).unwrap_or_else(|| &answers["default"]);
        answer["content"]["application/json"]["schema"].clone()
    }

    /// The schema of what is sent there.
    fn of_request(&self, method: &str, path: &str) -> Value {
        let operation = &self.root["paths"][path][method.to_lowercase()];
        operation["requestBody"]["content"]["application/json"]["schema"].clone()
    }
}

/// Method, path, what stands for its name, what is sent, the status.
type Asked<'a> = (&'a str, &'a str, &'a str, Value, u16);

fn asked() -> Vec<Asked<'static>> {
    const VM: &str = "/api/v1/vms/{name}";
    let nothing = || Value::Null;
    let change = json!({"limit_bytes": 8 << 20, "reserve_bytes": 4096, "weight": 7, "writeback": true,
        "clear_after_seconds": 86_400, "squeeze": {"vmm": "none"}, "runtime": true});
    let observe = json!({"squeeze_mode": "observe", "runtime": true});
    let squeeze = json!({"vmm": "qemu", "socket": "/run/vms/db.qmp", "mode": "fixed", "to_bytes": 1 << 30,
        "min_bytes": 1 << 29, "max_bytes": 2_u64 << 30, "promotion_rate": "0.5%"});
    let vm = json!({"size_bytes": 1 << 20, "squeeze": squeeze, "limit_bytes": 2 << 20, "reserve_bytes": 0, "weight": 7, "writeback": false,
        "queues": 2, "migration": "same-host", "label": "swap", "uuid": "00112233-4455-6677-8899-aabbccddeeff",
        "clear_after_seconds": 0, "runtime": false});
    vec![
        ("GET", "/api/v1/status", "", nothing(), 200),
        ("GET", "/api/v1/openapi.json", "", nothing(), 200),
        ("GET", "/api/v1/check", "", nothing(), 404),
        ("POST", "/api/v1/check", "", json!({"vm": "web1", "rate_bytes": 1 << 30}), 200),
        ("POST", "/api/v1/check", "", json!({"rate_bytes": 1}), 400),
        ("GET", "/api/v1/check", "", nothing(), 200),
        ("GET", "/api/v1/report", "?sample_pages=9", nothing(), 200),
        ("GET", "/api/v1/report", "?vm=nobody", nothing(), 404),
        ("GET", "/api/v1/report", "?sample_pages=8193", nothing(), 400),
        (
            "POST",
            "/api/v1/pool",
            "",
            json!({"compressor": "zstd:3", "recompress": true, "runtime": true}),
            200,
        ),
        ("POST", "/api/v1/pool", "", json!({"forget": true}), 200),
        ("POST", "/api/v1/pool", "", json!({}), 400),
        ("PUT", VM, "db", vm.clone(), 201),
        ("PUT", VM, "db", vm, 409),
        ("GET", "/api/v1/vms", "", nothing(), 200),
        ("GET", VM, "db", nothing(), 200),
        ("POST", VM, "db", observe, 200),
        ("POST", VM, "web1", json!({"squeeze_mode": "auto"}), 400),
        ("GET", VM, "nobody", nothing(), 404),
        ("POST", VM, "web1", change, 200),
        ("POST", VM, "web1", json!({"forget": true}), 200),
        ("POST", VM, "web1", json!({"weight": 0}), 400),
        ("POST", "/api/v1/vms/{name}/release", "web1", nothing(), 200),
        ("POST", "/api/v1/vms/{name}/clear", "web1", nothing(), 409),
        ("POST", "/api/v1/vms/{name}/clear", "web2", nothing(), 200),
        ("DELETE", VM, "web1?force=true", nothing(), 409),
        ("DELETE", VM, "db?runtime=false&force=false", nothing(), 200),
        ("POST", "/api/v1/reload", "?check=true", nothing(), 200),
        ("POST", "/api/v1/reload", "?check=1", nothing(), 400),
    ]
}

/// Waits until the balloon of a VM that was added was looked at.
fn await_balloon(daemon: &Daemon, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while daemon.vm(name)["balloon"].is_null() {
        assert!(Instant::now() < deadline, "nobody looks at the balloon of {name}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn what_a_daemon_answers_is_what_the_description_says() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = dir.path().join("writeback");
    let config = format!("{CONFIG}[writeback]\npath = {file:?}\nsize = \"64MiB\"\n");
    let mut daemon = Daemon::start(dir.path(), &config);
    // One VM that is not served, and something to tell of the others.
    daemon.configure(&config.replace("web2", "web3"));
    daemon.restart();
    daemon.configure(&config.replace("web2", "web4").replace("16MiB", "32MiB"));
    let memory = Memory::with_bytes(16 << 20).unwrap();
    let mut device = Device::connect(daemon.socket("web1"), memory, Options::default()).unwrap();
    let mut queue = device.start().unwrap().remove(0);
    queue.write_pages(10, &[page_of(2, 1), page_of(2, 2)]).unwrap();
    queue.read_pages(10, 2).unwrap();

    let socket = daemon.socket("control");
    let (_, root) = request(&socket, "GET", "/api/v1/openapi.json", "");
    let mut description = Description { root, met: BTreeSet::new() };
    let mut operations = BTreeSet::new();
    for (method, path, name, sent, status) in asked() {
        let url =
            if path.contains("{name}") { path.replace("{name}", name) } else { format!("{path}{name}") };
        // Behind the name, not amid the path.
        let url = match url.split_once('?') {
            Some((before, after)) if after.contains('/') => panic!("{before} {after}"),
            _ => url,
        };
        let body = if sent.is_null() { String::new() } else { sent.to_string() };
        let (found, answer) = request(&socket, method, &url, &body);
        assert_eq!(found, status, "{method} {url} {body}: {answer}");
        let schema = description.of_answer(method, path, status);
        description.check(&answer, &schema).unwrap_or_else(|err| panic!("{method} {url}: {err}"));
        if !sent.is_null() && status < 300 {
            let schema = description.of_request(method, path);
            description.check(&sent, &schema).unwrap_or_else(|err| panic!("{method} {url}, sent: {err}"));
        }
        operations.insert((path, method.to_lowercase()));
        if status == 201 {
            await_balloon(&daemon, name);
        }
    }
    // A text that is no JSON; tests/metrics looks at it.
    operations.insert(("/metrics", "get".to_owned()));
    for (path, described) in description.root["paths"].as_object().unwrap() {
        for method in described.as_object().unwrap().keys() {
            assert!(operations.contains(&(path.as_str(), method.clone())), "{method} {path} was not asked");
        }
    }
    let all: BTreeSet<String> =
        description.root["components"]["schemas"].as_object().unwrap().keys().cloned().collect();
    let without_psi = (!Path::new("/proc/pressure/memory").exists()).then_some("MemoryPressure");
    let unmet: Vec<_> =
        all.difference(&description.met).filter(|name| Some(&***name) != without_psi).collect();
    assert_eq!(unmet, ["BadPage"], "pages that are bad are another test's");
}
