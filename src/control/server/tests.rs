//! The server over a real socket, with a host that answers by the name it is asked for.

use std::os::unix::net::UnixStream;
use std::time::Instant;

use hyper::body::Bytes;
use serde_json::Value;

use super::super::api::{
    CHECK_PATH, CheckOrder, CheckState, CheckStatus, ClearError, Clearing, Exposition, NewVm, OPENAPI_PATH,
    POOL_PATH, PoolChange, PoolStatus, RELOAD_PATH, REPORT_PATH, ReloadReport, Reloading, Removal, Report,
    Reporting, STATUS_PATH, SetError, Status, VMS_PATH, VmChange, VmDetails, VmRemoved, VmStatus,
};
use super::super::check;
use super::super::client::{Client, ClientError};
use super::super::socket;
use super::*;
use crate::store::codec::Compressor;

struct FakeHost;

impl Host for FakeHost {
    fn status(&self) -> Status {
        let vms = vec![VmStatus { name: "web1".to_owned(), stores: 7, ..VmStatus::default() }];
        Status { version: "1".to_owned(), vms, ..Status::default() }
    }

    fn metrics(&self, exposition: Exposition) -> String {
        format!("{exposition:?}\n")
    }

    fn vm(&self, name: &str) -> Result<VmDetails, SetError> {
        self.add_vm(name, NewVm::default())
    }

    fn add_vm(&self, name: &str, vm: NewVm) -> Result<VmDetails, SetError> {
        match name {
            "web1" => Ok(VmDetails {
                status: VmStatus { size_bytes: vm.size_bytes, ..VmStatus::default() },
                ..VmDetails::default()
            }),
            "idle" => Err(SetError::Conflict { message: "it is there".to_owned() }),
            _ => Err(SetError::Unknown { name: name.to_owned(), known: known() }),
        }
    }

    fn remove_vm(&self, name: &str, removal: Removal) -> Result<VmRemoved, SetError> {
        let Removal { force, runtime } = removal;
        Ok(VmRemoved { removed: name.to_owned(), dropped_pages: force.into(), returns: runtime })
    }

    fn reload(&self, reloading: Reloading) -> Result<ReloadReport, SetError> {
        Ok(ReloadReport { check: reloading.check, ..ReloadReport::default() })
    }

    fn clear_vm(&self, name: &str, clearing: Clearing) -> Result<(), ClearError> {
        match name {
            "web1" if clearing.force => Ok(()),
            "idle" => Ok(()),
            "web1" => Err(ClearError::Connected { name: name.to_owned() }),
            "bad" => Err(ClearError::Failed { message: "the disk is on fire".to_owned() }),
            _ => Err(ClearError::Unknown { name: name.to_owned(), known: known() }),
        }
    }

    fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, SetError> {
        match name {
            "web1" => Ok(VmStatus {
                name: name.to_owned(),
                limit_bytes: change.limit_bytes.unwrap_or(1),
                weight: change.weight.unwrap_or(2),
                writeback: change.writeback.unwrap_or(true),
                ..VmStatus::default()
            }),
            "idle" => Err(SetError::Invalid { message: "too much".to_owned() }),
            "bad" => Err(SetError::Failed { message: "the disk is on fire".to_owned() }),
            _ => Err(SetError::Unknown { name: name.to_owned(), known: known() }),
        }
    }

    fn release_vm(&self, name: &str) -> Result<VmStatus, SetError> {
        self.set_vm(name, VmChange { weight: Some(77), ..VmChange::default() })
    }

    fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, SetError> {
        let compressor = format!("{:?} {}", change.compressor, change.recompress);
        Ok(PoolStatus { compressor, ..PoolStatus::default() })
    }

    fn begin_check(&self, order: CheckOrder) -> Result<CheckStatus, SetError> {
        match order.vm.as_deref() {
            None => Ok(CheckStatus { number: 1, rate_bytes: order.rate_bytes, ..CheckStatus::default() }),
            Some("bad") => Err(SetError::Invalid { message: "too slow".to_owned() }),
            Some(name) => Err(SetError::Unknown { name: name.to_owned(), known: known() }),
        }
    }

    fn check(&self) -> Option<CheckStatus> {
        Some(CheckStatus { number: 1, state: CheckState::Done, bad_pages: 2, ..CheckStatus::default() })
    }

    fn report(&self, Reporting { vm, sample_pages }: Reporting) -> Result<Report, SetError> {
        match vm.as_deref() {
            Some("idle") => Err(SetError::Conflict { message: "another".to_owned() }),
            _ => Ok(Report { compressor: format!("{vm:?} {sample_pages:?}"), ..Report::default() }),
        }
    }
}

fn known() -> Vec<String> {
    vec!["idle".to_owned(), "web1".to_owned()]
}

fn started() -> (tempfile::TempDir, PathBuf, Server) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("control.sock");
    let access = Access::of_control(None).unwrap();
    let listener = socket::Sockets::of_group(access.gid()).listen(&path).unwrap();
    let server = Server::start(listener, access, Arc::new(FakeHost)).unwrap();
    (dir, path, server)
}

/// The HTTP status and the message of a refusal.
fn refused<T: std::fmt::Debug>(outcome: Result<T, ClientError>) -> (u16, String) {
    match outcome.unwrap_err() {
        ClientError::Refused { status, message } => (status, message),
        other => panic!("{other}"),
    }
}

#[test]
fn the_client_gets_the_status_that_the_host_gave() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    assert_eq!(client.status().unwrap(), FakeHost.status());
    assert_eq!(client.status().unwrap().vms[0].stores, 7);
}

#[test]
fn a_clear_ends_as_the_host_says() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    client.clear_vm("idle", Clearing::default()).unwrap();
    client.clear_vm("web1", Clearing { force: true }).unwrap();
    let refusal = |name: &str| refused(client.clear_vm(name, Clearing::default()));
    let (status, message) = refusal("web1");
    assert!(status == 409 && message.contains("power it off"), "{message}");
    assert_eq!(refusal("bad"), (500, "the disk is on fire".to_owned()));
    for name in ["nobody", "../status", "a b/\u{e9}?x"] {
        let (status, message) = refusal(name);
        assert!(status == 404 && message.contains("idle, web1"), "{message}");
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
}

#[test]
fn a_change_goes_to_the_host_and_its_answer_comes_back() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    let change = VmChange { weight: Some(7), ..VmChange::default() };
    let vm = client.set_vm("web1", change.clone()).unwrap();
    assert_eq!((vm.limit_bytes, vm.weight, vm.writeback), (1, 7, true));
    let pool =
        client.set_pool(PoolChange { recompress: true, ..PoolChange::to(Compressor::Zstd(3)) }).unwrap();
    assert_eq!(pool.compressor, "Some(Zstd(3)) true");
    assert_eq!(refused(client.set_vm("idle", change.clone())), (400, "too much".to_owned()));
    assert_eq!(refused(client.set_vm("bad", change.clone())), (500, "the disk is on fire".to_owned()));
    for name in ["nobody", "clear/", "a b/\u{e9}?x"] {
        let (status, message) = refused(client.set_vm(name, change.clone()));
        assert!(status == 404 && message.contains("idle, web1"), "{message}");
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
}

#[test]
fn a_report_is_of_what_was_asked_for() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    let ask = |vm: Option<&str>, sample_pages| {
        client.report(&Reporting { vm: vm.map(str::to_owned), sample_pages }).map(|report| report.compressor)
    };
    assert_eq!(ask(None, None).unwrap(), "None None");
    assert_eq!(ask(None, Some(7)).unwrap(), "None Some(7)");
    assert_eq!(ask(Some("a&b=c d/\u{e9}?"), Some(7)).unwrap(), "Some(\"a&b=c d/\u{e9}?\") Some(7)");
    assert_eq!(refused(ask(Some("idle"), None)), (409, "another".to_owned()));
    for (query, part) in [("sample_pages=-1", "sample_pages"), ("vn=web1", "did you mean `vm`?")] {
        let (status, answer) =
            client.request("GET", &format!("{REPORT_PATH}?{query}"), Bytes::new()).unwrap();
        let answer: ErrorBody = serde_json::from_slice(&answer).unwrap();
        assert!(status == 400 && answer.error.contains(part), "{status}: {}", answer.error);
    }
}

#[test]
fn a_body_that_is_no_change_is_refused_with_the_reason() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    for (path, body, part) in [
        ("/api/v1/vms/web1", "", "EOF"),
        ("/api/v1/vms/web1", "{", "EOF"),
        ("/api/v1/vms/web1", "7", "invalid type"),
        ("/api/v1/vms/web1", r#"{"limit": 1}"#, "`limit_bytes`"),
        ("/api/v1/vms/web1", r#"{"wieght": 1}"#, "did you mean `weight`?"),
        (POOL_PATH, r#"{"compressor": "lz4", "forget": true}"#, "`forget`"),
        ("/api/v1/vms/web1", r#"{"weight": -1}"#, "-1"),
        (POOL_PATH, "{}", "`compressor`"),
        (POOL_PATH, r#"{"compressor": "gzip"}"#, "is not a compressor"),
    ] {
        let (given, answer) = client.request("POST", path, body.to_owned().into()).unwrap();
        let answer: ErrorBody = serde_json::from_slice(&answer).unwrap();
        assert!(given == 400 && answer.error.contains(part), "{given}: {}", answer.error);
    }
}

#[test]
fn vms_come_and_go_as_the_host_says() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    assert_eq!(client.vms().unwrap().vms, FakeHost.status().vms);
    let vm = NewVm { size_bytes: 7, ..NewVm::default() };
    assert_eq!(client.add_vm("web1", &vm).unwrap().status.size_bytes, 7);
    assert_eq!(refused(client.add_vm("idle", &vm)), (409, "it is there".to_owned()));
    assert_eq!(refused(client.vm("nobody")).0, 404);
    let removed = client.remove_vm("a b", Removal { force: true, runtime: false }).unwrap();
    assert_eq!(removed, VmRemoved { removed: "a b".to_owned(), dropped_pages: 1, returns: false });
    assert!(client.reload(Reloading { check: true }).unwrap().check);
    let (status, body) = client.request("DELETE", "/api/v1/vms/a?froce=true", Bytes::new()).unwrap();
    let error: ErrorBody = serde_json::from_slice(&body).unwrap();
    assert!(status == 400 && error.error.contains("did you mean `force`?"), "{}", error.error);
}

/// Whether the server knows a path, and whether it knows the method there.
fn answers(client: &Client, method: &str, path: &str) -> bool {
    let (status, body) = client.request(method, path, Bytes::new()).unwrap();
    let said = String::from_utf8_lossy(&body);
    status != 405 && !said.contains("there is nothing at this path")
}

#[test]
fn the_description_has_every_path_that_is_answered_and_no_other() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    let (status, body) = client.request("GET", OPENAPI_PATH, Bytes::new()).unwrap();
    let description: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((status, description["openapi"].as_str()), (200, Some("3.1.0")));
    let paths = description["paths"].as_object().unwrap();
    for path in [STATUS_PATH, POOL_PATH, CHECK_PATH, VMS_PATH, RELOAD_PATH, OPENAPI_PATH] {
        assert!(paths.contains_key(path), "{path}");
    }
    let methods = ["GET", "PUT", "POST", "DELETE", "PATCH", "OPTIONS"];
    let mut described = 0;
    for (path, operations) in paths {
        let operations = operations.as_object().unwrap();
        for method in methods {
            let is_described = operations.contains_key(&method.to_lowercase());
            described += usize::from(is_described);
            assert_eq!(
                answers(&client, method, &path.replace("{name}", "web1")),
                is_described,
                "{method} {path}"
            );
        }
        for (method, operation) in operations {
            assert!(operation["summary"].is_string(), "{method} {path} says what it is for");
            let answers = operation["responses"].as_object().unwrap();
            assert!(answers.keys().any(|status| status.starts_with('2')), "{method} {path}");
            assert!(answers.contains_key("default") || path == OPENAPI_PATH, "{method} {path}");
        }
    }
    assert_eq!(described, 15);
}

#[test]
fn a_body_that_is_too_long_is_refused() {
    let (_dir, path, _server) = started();
    // One byte too many: the server has read it all when it refuses it.
    let body = vec![b' '; CHANGE_BYTES_MAX + 1];
    let (status, answer) = Client::new(path).unwrap().request("POST", POOL_PATH, body.into()).unwrap();
    assert_eq!(status, 413);
    assert!(serde_json::from_slice::<ErrorBody>(&answer).is_ok());
}

#[test]
fn what_does_not_exist_is_a_json_error() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    for (method, path, status) in [("GET", "/", 404), ("POST", STATUS_PATH, 405), ("GET", POOL_PATH, 405)] {
        let (given, body) = client.request(method, path, Bytes::new()).unwrap();
        assert_eq!(given, status);
        assert!(serde_json::from_slice::<ErrorBody>(&body).is_ok());
    }
}

#[test]
fn a_dropped_server_is_gone_with_its_socket_even_if_a_client_stays_silent() {
    let (_dir, path, server) = started();
    let _silent = UnixStream::connect(&path).unwrap();
    let before = Instant::now();
    drop(server);
    assert!(before.elapsed() < Duration::from_secs(4));
    assert!(!path.exists());
    let error = Client::new(path.clone()).unwrap().status().unwrap_err();
    assert!(matches!(error, ClientError::NotRunning { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
}

#[test]
fn a_check_is_begun_and_followed_to_its_end() {
    let (_dir, path, _server) = started();
    let client = Client::new(path).unwrap();
    let mut shown = Vec::new();
    let order = CheckOrder { vm: None, rate_bytes: 7 };
    let status = check::run(&client, &order, |status| shown.push((status.state, status.rate_bytes))).unwrap();
    assert_eq!((status.state, status.bad_pages), (CheckState::Done, 2));
    assert_eq!(shown, [(CheckState::Running, 7), (CheckState::Done, 0)]);
    for (vm, status) in [("web3", 404), ("bad", 400)] {
        let order = CheckOrder { vm: Some(vm.to_owned()), rate_bytes: 7 };
        let refused = client.begin_check(&order);
        assert!(matches!(refused, Err(ClientError::Refused { status: found, .. }) if found == status));
    }
}
