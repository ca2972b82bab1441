//! The commands' side of the control socket: a blocking facade over hyper, one connection a request. Says in its
//! errors which socket was tried and what to do.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

use super::api::{
    CHECK_PATH, CheckOrder, CheckStatus, Clearing, ErrorBody, NewVm, POOL_PATH, PoolChange, PoolStatus,
    RELOAD_PATH, REPORT_PATH, ReloadReport, Reloading, Removal, Report, Reporting, STATUS_PATH, Status,
    VMS_PATH, VmChange, VmDetails, VmList, VmRemoved, VmStatus,
};

/// A clear of a VM with millions of pages takes seconds; a daemon that says nothing for this long is stuck.
const ANSWER_WAIT: Duration = Duration::from_secs(60);
/// A status of thousands of VMs has a few megabytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why the daemon gave no answer, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "no daemon answers on {}: start it with \"ballast serve\", or name its socket with --socket or its configuration with --config",
        socket.display()
    )]
    NotRunning {
        /// The socket that was tried.
        socket: PathBuf,
    },
    /// Somebody listens, and the system doesn't let us connect.
    #[error(
        "the daemon's socket {} can't be opened: be root, the daemon's user or in its control_group",
        socket.display()
    )]
    Connect {
        /// The socket that was tried.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The daemon said no.
    #[error("{message}")]
    Refused {
        /// The HTTP status.
        status: u16,
        /// The daemon's reason.
        message: String,
    },
    /// Something else than a Ballast daemon answered, or it ended amid its answer.
    #[error(
        "the answer on {} is not a Ballast daemon's: {message}; name its control socket with --socket",
        socket.display()
    )]
    Protocol {
        /// The socket that was tried.
        socket: PathBuf,
        /// What was wrong with the answer.
        message: String,
    },
    /// No answer in time.
    #[error(
        "the daemon on {} gave no answer in {} s: ask again, and look at its log if that goes on",
        socket.display(),
        ANSWER_WAIT.as_secs()
    )]
    Silent {
        /// The socket that was tried.
        socket: PathBuf,
    },
}

/// A client of the daemon that listens on one socket.
#[derive(Debug)]
pub struct Client {
    socket: PathBuf,
    runtime: Runtime,
}

impl Client {
    /// A client of the control socket at `socket`; connects when something is asked.
    ///
    /// # Errors
    /// When the event loop can't be made.
    pub fn new(socket: impl Into<PathBuf>) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { socket: socket.into(), runtime })
    }

    /// The socket that this client asks.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The daemon as it is now.
    ///
    /// # Errors
    /// When there is no daemon, or it gave no such answer.
    pub fn status(&self) -> Result<Status, ClientError> {
        self.get(STATUS_PATH)
    }

    /// All VMs.
    ///
    /// # Errors
    /// When there is no daemon, or it gave no such answer.
    pub fn vms(&self) -> Result<VmList, ClientError> {
        self.get(VMS_PATH)
    }

    /// All that is known of one VM.
    ///
    /// # Errors
    /// When there is no daemon, or no such VM.
    pub fn vm(&self, name: &str) -> Result<VmDetails, ClientError> {
        self.get(&vm_path(name))
    }

    /// Adds a VM; gives it as it is then.
    ///
    /// # Errors
    /// When there is no daemon, a VM of that name, or what it is to be isn't allowed.
    pub fn add_vm(&self, name: &str, vm: &NewVm) -> Result<VmDetails, ClientError> {
        self.send("PUT", &vm_path(name), vm)
    }

    /// Removes a VM.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, or something stands against it.
    pub fn remove_vm(&self, name: &str, removal: Removal) -> Result<VmRemoved, ClientError> {
        let Removal { force, runtime } = removal;
        let path = format!("{}?force={force}&runtime={runtime}", vm_path(name));
        let body = self.expect_success("DELETE", &path, Bytes::new())?;
        self.parse(&body)
    }

    /// Has the daemon read its configuration again, or say what that would change.
    ///
    /// # Errors
    /// When there is no daemon, or the configuration is refused.
    pub fn reload(&self, Reloading { check }: Reloading) -> Result<ReloadReport, ClientError> {
        let body = self.expect_success("POST", &format!("{RELOAD_PATH}?check={check}"), Bytes::new())?;
        self.parse(&body)
    }

    /// Changes a VM's share of the pool; gives the VM as it is then.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, or the change isn't allowed.
    pub fn set_vm(&self, name: &str, change: VmChange) -> Result<VmStatus, ClientError> {
        self.set(&vm_path(name), &change)
    }

    /// Changes what new pages are compressed with; gives the pool as it is then.
    ///
    /// # Errors
    /// When there is no daemon, or it went wrong.
    pub fn set_pool(&self, change: PoolChange) -> Result<PoolStatus, ClientError> {
        self.set(POOL_PATH, &change)
    }

    /// Drops all pages of a VM, powered off unless that is to be forced.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, or the VM is connected.
    pub fn clear_vm(&self, name: &str, Clearing { force }: Clearing) -> Result<(), ClientError> {
        let path = format!("{}/clear?force={force}", vm_path(name));
        self.expect_success("POST", &path, Bytes::new()).map(drop)
    }

    /// Lets a quarantined VM's VMM attach again; gives the VM as it is then.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, or it is out of service.
    pub fn release_vm(&self, name: &str) -> Result<VmStatus, ClientError> {
        let path = format!("{}/release", vm_path(name));
        let body = self.expect_success("POST", &path, Bytes::new())?;
        self.parse(&body)
    }

    /// Begins to look at stored pages.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, or the rate isn't allowed.
    pub fn begin_check(&self, order: &CheckOrder) -> Result<CheckStatus, ClientError> {
        self.set(CHECK_PATH, order)
    }

    /// How far the check is that was begun last.
    ///
    /// # Errors
    /// When there is no daemon, or none was begun.
    pub fn check(&self) -> Result<CheckStatus, ClientError> {
        self.get(CHECK_PATH)
    }

    /// What stored pages are like.
    ///
    /// # Errors
    /// When there is no daemon, no such VM, the sample isn't allowed, or another report is being made.
    pub fn report(&self, Reporting { vm, sample_pages }: &Reporting) -> Result<Report, ClientError> {
        let vm = vm.as_ref().map(|name| format!("vm={}", escape(name)));
        let sample = sample_pages.map(|pages| format!("sample_pages={pages}"));
        let wanted: Vec<_> = vm.into_iter().chain(sample).collect();
        self.get(&format!("{REPORT_PATH}?{}", wanted.join("&")))
    }

    fn get<S: DeserializeOwned>(&self, path: &str) -> Result<S, ClientError> {
        let body = self.expect_success("GET", path, Bytes::new())?;
        self.parse(&body)
    }

    fn set<S: DeserializeOwned>(&self, path: &str, change: &impl Serialize) -> Result<S, ClientError> {
        self.send("POST", path, change)
    }

    fn send<S: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        change: &impl Serialize,
    ) -> Result<S, ClientError> {
        let change = serde_json::to_vec(change).map_err(|error| self.protocol(&error))?;
        let body = self.expect_success(method, path, change.into())?;
        self.parse(&body)
    }

    fn parse<T: DeserializeOwned>(&self, body: &Bytes) -> Result<T, ClientError> {
        serde_json::from_slice(body).map_err(|error| self.protocol(&error))
    }

    fn expect_success(&self, method: &str, path: &str, body: Bytes) -> Result<Bytes, ClientError> {
        let (status, body) = self.request(method, path, body)?;
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let error: ErrorBody = self.parse(&body)?;
        Err(ClientError::Refused { status, message: error.error })
    }

    /// One request; gives the status and the body of whatever was answered.
    pub(super) fn request(&self, method: &str, path: &str, body: Bytes) -> Result<(u16, Bytes), ClientError> {
        self.runtime.block_on(async {
            let answer = tokio::time::timeout(ANSWER_WAIT, self.exchange(method, path, body)).await;
            answer.unwrap_or_else(|_| Err(ClientError::Silent { socket: self.socket.clone() }))
        })
    }

    async fn exchange(&self, method: &str, path: &str, body: Bytes) -> Result<(u16, Bytes), ClientError> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.unconnected(error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.protocol(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "ballast")
            .header("connection", "close")
            .body(Full::new(body))
            .map_err(|error| self.protocol(&error))?;
        let response = sender.send_request(request).await.map_err(|error| self.protocol(&error))?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        Ok((status, body.map_err(|error| self.protocol(&error))?.to_bytes()))
    }

    fn unconnected(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning { socket },
            _ => ClientError::Connect { socket, source },
        }
    }

    fn protocol(&self, error: &dyn ToString) -> ClientError {
        ClientError::Protocol { socket: self.socket.clone(), message: error.to_string() }
    }
}

fn vm_path(name: &str) -> String {
    format!("{VMS_PATH}/{}", escape(name))
}

/// A text as one segment of a path: whatever the user typed, the daemon is asked for exactly that name.
fn escape(segment: &str) -> String {
    use std::fmt::Write;
    segment.bytes().fold(String::new(), |mut path, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            path.push(char::from(byte));
        } else {
            // Writing to a string can't fail.
            let _ = write!(path, "%{byte:02X}");
        }
        path
    })
}
