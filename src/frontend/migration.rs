//! What a VMM does while it migrates its guest: it asks the back end to note which pages of guest memory it writes, and
//! takes the notes, again and again, until the rings are stopped.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};
use vm_memory::{Address, GuestMemoryBackend};

use super::Error;
use super::device::Device;
use crate::page::PAGE_SIZE_U64;

const PAGES_PER_BYTE: u64 = 8;

impl Device {
    /// Has the back end log from now on what it writes to guest memory: SET_LOG_BASE, then LOG_ALL in SET_FEATURES.
    ///
    /// # Errors
    /// When the back end does not offer that, or refuses.
    pub fn start_log(&mut self) -> Result<(), Error> {
        if !self.protocol_features.contains(VhostUserProtocolFeatures::LOG_SHMFD) {
            return Err(Error::Missing { feature: "VHOST_USER_PROTOCOL_F_LOG_SHMFD" });
        }
        let pages = self.memory.map().last_addr().raw_value() / PAGE_SIZE_U64 + 1;
        let bytes = pages.div_ceil(PAGES_PER_BYTE);
        let failed =
            |source: rustix::io::Errno| Error::Descriptor { action: "make a log", source: source.into() };
        let file = File::from(memfd_create("dirty-log", MemfdFlags::CLOEXEC).map_err(failed)?);
        ftruncate(&file, bytes).map_err(failed)?;
        let region =
            VhostUserDirtyLogRegion { mmap_size: bytes, mmap_offset: 0, mmap_handle: file.as_raw_fd() };
        self.frontend()?.set_log_base(0, Some(region)).map_err(Error::message("SET_LOG_BASE"))?;
        self.log = Some(file);
        self.set_logged(true)
    }

    /// Has it log no more.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn stop_log(&mut self) -> Result<(), Error> {
        self.set_logged(false)
    }

    fn set_logged(&mut self, logged: bool) -> Result<(), Error> {
        let log_all = if logged { VhostUserVirtioFeatures::LOG_ALL.bits() } else { 0 };
        let features = self.features | log_all;
        self.logged = logged;
        self.frontend()?.set_features(features).map_err(Error::message("SET_FEATURES"))
    }

    /// The numbers of the pages that were logged since the last time, in order; the log is empty afterwards.
    ///
    /// # Errors
    /// When nothing was ever logged, or the log can't be read.
    pub fn take_logged(&mut self) -> Result<Vec<u64>, Error> {
        let file = self.log.as_ref().ok_or(Error::Usage("no log was started"))?;
        let failed = |source| Error::Descriptor { action: "read a log", source };
        let length = file.metadata().map_err(failed)?.len();
        let mut pages = Vec::new();
        for at in 0..length {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).map_err(failed)?;
            if byte != [0] {
                // Whoever logs meanwhile is not waited for: rings are quiet when this is asked.
                file.write_all_at(&[0], at).map_err(failed)?;
                let bits = (0..PAGES_PER_BYTE).filter(|bit| byte[0] >> bit & 1 == 1);
                pages.extend(bits.map(|bit| at * PAGES_PER_BYTE + bit));
            }
        }
        Ok(pages)
    }
}
