//! The compression ratio of a run, which only the back end knows: asked of the Ballast daemon whose devices it drives, on
//! its control socket. Another back end has none.

use std::path::{Path, PathBuf};

use super::Error;
use crate::config::CONTROL_SOCKET_NAME;
use crate::control::api::{Status, VmStatus};
use crate::control::client::Client;
use crate::page::PAGE_SIZE_U64;

/// A device's own name has this many bytes at most, and a VM's may have more.
const DEVICE_ID_BYTES: usize = 20;

/// Whom to ask.
pub(super) struct Daemon {
    client: Client,
    /// The sockets of the VMs' devices.
    sockets: Vec<PathBuf>,
}

impl Daemon {
    /// The daemon whose devices are at `sockets`: it listens on `control`, which somebody named and so has to answer, or
    /// else beside the first device's socket, if there is one at all.
    pub(super) fn of(sockets: &[PathBuf], control: Option<&Path>) -> Result<Option<Self>, Error> {
        let beside =
            || sockets.first().map_or_else(PathBuf::new, |socket| socket.with_file_name(CONTROL_SOCKET_NAME));
        let client = Client::new(control.map_or_else(beside, Path::to_owned)).map_err(Error::EventLoop)?;
        match client.status() {
            Ok(_) => Ok(Some(Self { client, sockets: sockets.to_owned() })),
            Err(err) if control.is_some() => Err(Error::Control(err)),
            Err(_) => Ok(None),
        }
    }

    /// Bytes of the VMs' pages in memory for each byte of the pool that they take; `device_ids` in the order of the
    /// sockets. `None` unless all of them are the daemon's.
    pub(super) fn ratio(&self, device_ids: &[Option<String>]) -> Option<f64> {
        let status = self.client.status().ok()?;
        let (mut stored_bytes, mut pool_bytes) = (0, 0);
        for (socket, device_id) in self.sockets.iter().zip(device_ids) {
            let vm = find(&status, socket, device_id.as_deref()?)?;
            stored_bytes += vm.stored_pages * PAGE_SIZE_U64;
            pool_bytes += vm.pool_bytes;
        }
        (pool_bytes > 0).then(|| stored_bytes as f64 / pool_bytes as f64)
    }
}

/// The VM whose device calls itself `device_id`. Where the names of several begin like that, the socket's decides.
fn find<'s>(status: &'s Status, socket: &Path, device_id: &str) -> Option<&'s VmStatus> {
    let is_it = |vm: &&VmStatus| {
        let mut id = format!("ballast-{}", vm.name);
        id.truncate(DEVICE_ID_BYTES);
        id == device_id
    };
    let mut alike = status.vms.iter().filter(is_it);
    match (alike.clone().count(), socket.file_stem()) {
        (1, _) => alike.next(),
        (_, name) => alike.find(|vm| Some(vm.name.as_ref()) == name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_found_by_what_its_device_says() {
        let vm = |name: &str| VmStatus { name: name.to_owned(), ..VmStatus::default() };
        let vms = vec![vm("web1"), vm("web10"), vm("a-long-name-1"), vm("a-long-name-2")];
        let status = Status { vms, ..Status::default() };
        let found = |socket: &str, id| find(&status, socket.as_ref(), id).map(|vm| vm.name.as_str());
        assert_eq!(found("/run/link", "ballast-web1"), Some("web1"));
        assert_eq!(found("/run/a-long-name-2.sock", "ballast-a-long-name-"), Some("a-long-name-2"));
        assert_eq!(found("/run/link", "ballast-a-long-name-"), None);
        assert_eq!(found("/run/web1.sock", "another"), None);
    }
}
