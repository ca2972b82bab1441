//! A VMM in the test's process, as far as its socket: a QMP monitor as QEMU 7.2 has it, or cloud-hypervisor's REST API. It has
//! a VM in which nothing takes time, and does to a request whatever a script says instead of answering it.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

/// What a script has the VMM do, one after the other.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends this, whatever it is.
    Send(String),
    /// Waits for as long before it goes on.
    Wait(Duration),
    /// Says nothing until the client has hung up.
    Hang,
    /// Hangs up.
    HangUp,
    /// Answers as if there were no script.
    Answer,
}

/// The VM behind the socket.
#[derive(Clone, Debug)]
pub struct FakeVm {
    pub configured_bytes: u64,
    pub actual_bytes: u64,
    /// Its guest gives up no more than leaves it this, for as long as that stands here.
    pub least_bytes: u64,
    /// What it was told last, if it was told.
    pub told_bytes: Option<u64>,
    /// In the VMM's words.
    pub state: &'static str,
    /// In QEMU's words; "" for none.
    pub migration: &'static str,
    pub balloon: bool,
    /// What the guest has said of itself; the time when it did stands in `updated_seconds`.
    pub stats: Value,
    pub updated_seconds: u64,
    pub polling_seconds: u64,
    /// Every request, by the name that a script has for it.
    pub asked: Vec<String>,
}

impl FakeVm {
    fn tell(&mut self, bytes: u64) {
        self.told_bytes = Some(bytes);
        self.actual_bytes = bytes.min(self.configured_bytes).max(self.least_bytes);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Qmp,
    Rest,
}

struct Shared {
    kind: Kind,
    vm: Mutex<FakeVm>,
    scripts: Mutex<HashMap<String, VecDeque<Script>>>,
    ended: Mutex<bool>,
}

/// Steps, by the number that the request has.
type Script = Box<dyn FnOnce(u64) -> Vec<Step> + Send>;

/// A VMM that listens. Dropping it is its end, and its socket's.
pub struct FakeVmm {
    path: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl FakeVmm {
    /// A QEMU.
    pub fn qmp(path: &Path) -> Self {
        Self::start(path, Kind::Qmp, "running")
    }

    /// A cloud-hypervisor.
    pub fn rest(path: &Path) -> Self {
        Self::start(path, Kind::Rest, "Running")
    }

    fn start(path: &Path, kind: Kind, state: &'static str) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).expect("a socket");
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
        let vm = FakeVm {
            configured_bytes: 512 << 20,
            actual_bytes: 512 << 20,
            least_bytes: 0,
            told_bytes: None,
            state,
            migration: "",
            balloon: true,
            stats: json!({}),
            updated_seconds: now,
            polling_seconds: 0,
            asked: Vec::new(),
        };
        let (vm, scripts, ended) = (Mutex::new(vm), Mutex::default(), Mutex::new(false));
        let shared = Arc::new(Shared { kind, vm, scripts, ended });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if *of_thread.ended.lock().expect("a lock") {
                    return;
                }
                let (stream, shared) = (stream.expect("a client"), Arc::clone(&of_thread));
                // It ends with its client, who hung up for no news.
                std::thread::spawn(move || drop(shared.serve(&stream)));
            }
        });
        Self { path: path.to_owned(), shared, thread: Some(thread) }
    }

    /// Has the next request of this name answered by a script; several come in turn. A command of QMP is called by its name,
    /// and by the object's path or the property that it is about; the greeting is "greeting".
    pub fn script(&self, request: &str, steps: impl FnOnce(u64) -> Vec<Step> + Send + 'static) {
        let mut scripts = self.shared.scripts.lock().expect("a lock");
        scripts.entry(request.to_owned()).or_default().push_back(Box::new(steps));
    }

    /// From now on it answers everything.
    pub fn forget_scripts(&self) {
        self.shared.scripts.lock().expect("a lock").clear();
    }

    /// What the configuration calls it.
    pub fn name(&self) -> &'static str {
        match self.shared.kind {
            Kind::Qmp => "qemu",
            Kind::Rest => "cloud-hypervisor",
        }
    }

    /// The VM, to be looked at and changed.
    pub fn vm(&self) -> MutexGuard<'_, FakeVm> {
        self.shared.vm.lock().expect("a lock")
    }
}

impl Drop for FakeVmm {
    fn drop(&mut self) {
        *self.shared.ended.lock().expect("a lock") = true;
        let _ = UnixStream::connect(&self.path);
        let _ = std::fs::remove_file(&self.path);
        let thread = self.thread.take().expect("it was started");
        if !std::thread::panicking() {
            thread.join().expect("the VMM is well");
        }
    }
}

/// Ends a connection.
struct Ended;

impl From<std::io::Error> for Ended {
    fn from(_: std::io::Error) -> Self {
        Self
    }
}

impl Shared {
    fn serve(&self, stream: &UnixStream) -> Result<(), Ended> {
        let mut reader = BufReader::new(stream);
        if self.kind == Kind::Rest {
            let (request, body) = read_request(&mut reader)?;
            return self.act(stream, &request, 0, || self.rest_answer(&request, &body));
        }
        let version = json!({ "qemu": { "micro": 22, "minor": 2, "major": 7 }, "package": "" });
        let greeting = json!({ "QMP": { "version": version, "capabilities": ["oob"] } });
        self.act(stream, "greeting", 0, || format!("{greeting}\r\n"))?;
        let mut line = String::new();
        while reader.read_line(&mut line)? > 0 {
            let command: Value = serde_json::from_str(&line).expect("a whole command a line");
            line.clear();
            let name = command["execute"].as_str().expect("a command");
            let id = command["id"].as_u64().expect("a number");
            let about = ["property", "path"].into_iter().find_map(|key| command["arguments"][key].as_str());
            let request = about.map_or_else(|| name.to_owned(), |about| format!("{name} {about}"));
            self.act(stream, &request, id, || {
                let mut answer = self.qmp_answer(name, &command["arguments"]);
                answer["id"] = command["id"].clone();
                format!("{answer}\r\n")
            })?;
        }
        Ok(())
    }

    /// Answers, or does what the script says.
    fn act(
        &self,
        mut stream: &UnixStream,
        request: &str,
        id: u64,
        answer: impl Fn() -> String,
    ) -> Result<(), Ended> {
        self.vm.lock().expect("a lock").asked.push(request.to_owned());
        let script = self.scripts.lock().expect("a lock").get_mut(request).and_then(VecDeque::pop_front);
        for step in script.map_or_else(|| vec![Step::Answer], |script| script(id)) {
            match step {
                Step::Send(text) => stream.write_all(text.as_bytes())?,
                Step::Wait(wait) => std::thread::sleep(wait),
                Step::Answer => stream.write_all(answer().as_bytes())?,
                Step::HangUp => return Err(Ended),
                Step::Hang => {
                    while stream.read(&mut [0; 4096])? > 0 {}
                    return Err(Ended);
                }
            }
        }
        Ok(())
    }

    fn qmp_answer(&self, command: &str, arguments: &Value) -> Value {
        let mut vm = self.vm.lock().expect("a lock");
        let property = arguments["property"].as_str().unwrap_or_default();
        let has_balloon = vm.balloon;
        let refused = |class: &str, desc: &str| json!({ "error": { "class": class, "desc": desc } });
        let returned = match command {
            "query-status" => json!({ "status": vm.state, "running": vm.state == "running" }),
            "query-migrate" if vm.migration.is_empty() => json!({}),
            "query-migrate" => json!({ "status": vm.migration }),
            "query-memory-size-summary" => json!({ "base-memory": vm.configured_bytes, "plugged-memory": 0 }),
            "query-balloon" | "balloon" if !has_balloon => {
                return refused("DeviceNotActive", "No balloon device has been activated");
            }
            "query-balloon" => json!({ "actual": vm.actual_bytes }),
            "balloon" => {
                let target = arguments["value"].as_u64().expect("a size");
                vm.tell(target);
                json!({})
            }
            "qom-list" if has_balloon && arguments["path"] == "/machine/peripheral-anon" => {
                json!([{ "name": "type", "type": "string" },
                       { "name": "device[3]", "type": "child<virtio-balloon-pci>" }])
            }
            "qom-list" => json!([{ "name": "type", "type": "string" }]),
            "qom-get" if property == "guest-stats" => {
                json!({ "last-update": vm.updated_seconds, "stats": vm.stats })
            }
            "qom-get" => json!(vm.polling_seconds),
            "qom-set" => {
                assert_eq!(arguments["path"], "/machine/peripheral-anon/device[3]");
                vm.polling_seconds = arguments["value"].as_u64().expect("a number");
                json!({})
            }
            "qmp_capabilities" => json!({}),
            other => return refused("CommandNotFound", &format!("The command {other} has not been found")),
        };
        json!({ "return": returned })
    }

    fn rest_answer(&self, request: &str, body: &str) -> String {
        let mut vm = self.vm.lock().expect("a lock");
        match request {
            "GET /api/v1/vm.info" => {
                let balloon = vm.balloon.then(|| json!({ "size": 0, "deflate_on_oom": true }));
                let config = json!({ "memory": { "size": vm.configured_bytes, "shared": true, "zones": null },
                                     "balloon": balloon, "cpus": {} });
                answer_of(
                    "200 OK",
                    &json!({ "config": config, "state": vm.state, "memory_actual_size": vm.actual_bytes,
                             "device_tree": {} })
                    .to_string(),
                )
            }
            "PUT /api/v1/vm.resize" => {
                let wanted: Value = serde_json::from_str(body).expect("JSON");
                let balloon_bytes = wanted["desired_balloon"].as_u64().expect("a size");
                let target = vm.configured_bytes - balloon_bytes;
                vm.tell(target);
                "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n".to_owned()
            }
            "GET /api/v1/vm.balloon-stats" if vm.stats.as_object().is_some_and(|stats| !stats.is_empty()) => {
                let balloon_bytes = vm.configured_bytes - vm.actual_bytes;
                answer_of(
                    "200 OK",
                    &json!({ "balloon_actual": balloon_bytes, "stats": vm.stats }).to_string(),
                )
            }
            _ => answer_of("404 Not Found", "[\"Not Found\"]"),
        }
    }
}

/// An answer of cloud-hypervisor's.
pub fn answer_of(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    )
}

/// One request: its method and path, and its body.
fn read_request(reader: &mut impl BufRead) -> Result<(String, String), Ended> {
    let (mut request, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(Ended);
        }
        let line = line.trim_end();
        if request.is_empty() {
            request = line.strip_suffix(" HTTP/1.1").expect("HTTP/1.1").to_owned();
        } else if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        } else if line.is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok((request, String::from_utf8(body).expect("a text")))
}
