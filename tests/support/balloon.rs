//! A balloon in this process, and guest memory whose holes can be looked for.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ballast::device::balloon::{Balloon as Device, Look};
use ballast::frontend::{Balloon, Memory, Options};
use ballast::page::PAGE_SIZE_U64;
use rustix::fs::SeekFrom;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Host;

/// For what happens at once, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// The features' bits: statistics, deflate on OOM, poison, reporting.
pub const ALL: [u32; 4] = [1, 2, 4, 5];
/// Where the second region of a guest's memory is.
pub const SECOND: u64 = 1 << 32;
/// Pages of each region.
pub const REGION_PAGES: u32 = 4096;

/// A host with a balloon for its VM.
pub struct Ballooned {
    pub host: Host,
    pub device: Arc<Device>,
    socket: PathBuf,
}

impl Ballooned {
    pub fn start() -> Self {
        let host = Host::start(&["web1", "web2"]);
        let socket = host.dir.path().join("balloon.sock");
        let device = listen(&host, &socket);
        Self { host, device, socket }
    }

    /// Puts another in its place that knows nothing of it, as a daemon does after its predecessor was killed; `prepare`
    /// has it before any VMM.
    pub fn successor(&mut self, prepare: impl FnOnce(&Device)) {
        std::fs::remove_file(&self.socket).unwrap();
        let device = Arc::new(Device::new(Arc::clone(&self.host.vms[0])));
        prepare(&device);
        device.listen(UnixListener::bind(&self.socket).unwrap()).unwrap();
        self.device = device;
    }

    pub fn attach(&self, memory: &Memory, options: Options) -> Balloon {
        Balloon::attach(&self.socket, memory.clone(), options).unwrap()
    }

    /// With every feature, and as many queues as Linux has then.
    pub fn attach_linux(&self, memory: &Memory) -> Balloon {
        self.attach(memory, Options::for_balloon(4, &ALL))
    }

    /// Waits until what is known of the balloon is so.
    pub fn until(&self, what: &str, is_so: impl Fn(&Look) -> bool) -> Look {
        let start = Instant::now();
        loop {
            let look = self.device.look();
            if is_so(&look) {
                return look;
            }
            assert!(start.elapsed() < PATIENCE, "not {what}: {look:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn listen(host: &Host, socket: &PathBuf) -> Arc<Device> {
    let device = Arc::new(Device::new(Arc::clone(&host.vms[0])));
    device.listen(UnixListener::bind(socket).unwrap()).unwrap();
    device
}

/// Two regions of [`REGION_PAGES`] each.
pub fn memory() -> Memory {
    let bytes = REGION_PAGES as usize * 4096;
    Memory::with_regions(&[(0, bytes), (SECOND, bytes)]).unwrap()
}

/// The number of a page of the second region.
pub fn second(page: u32) -> u32 {
    u32::try_from(SECOND / PAGE_SIZE_U64).unwrap() + page
}

/// The guest writes to a page.
pub fn touch(memory: &Memory, page: u32, byte: u8) {
    let at = vm_memory::GuestAddress(u64::from(page) * PAGE_SIZE_U64);
    memory.write(at, &[byte; 4096]).unwrap();
}

/// What a page's file has there: `None` for a hole. Nothing is backed by looking.
pub fn content(memory: &Memory, page: u32) -> Option<u8> {
    let map = memory.map();
    let at = u64::from(page) * PAGE_SIZE_U64;
    let region = map.find_region(vm_memory::GuestAddress(at)).unwrap();
    let (file, offset) = (region.file_offset().unwrap().file(), at - region.start_addr().0);
    let data = rustix::fs::seek(file, SeekFrom::Data(offset)).unwrap_or(u64::MAX);
    if data >= offset + PAGE_SIZE_U64 {
        return None;
    }
    let mut bytes = [0; 4096];
    file.read_exact_at(&mut bytes, offset).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
    Some(bytes[0])
}
