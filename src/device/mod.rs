//! The device: the only room that knows virtio and vhost-user. Every VM has a socket; each connection to it is a
//! [`session`], whose virtqueues ([`ring`]) run on a few shared [`worker`]s, which carry out [`blk`] requests on the
//! VM's pages in the store.

#![deny(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "guests choose the numbers here")]
#![cfg_attr(
    test,
    allow(clippy::indexing_slicing, clippy::arithmetic_side_effects, reason = "tests may fail")
)]

pub mod attached;
pub mod balloon;
pub mod blk;
pub mod chain;
pub mod complaints;
pub mod connections;
pub mod dirty_log;
pub mod disk;
pub mod doorbell;
pub mod fetches;
pub mod guest_memory;
pub mod handed;
pub mod inflight;
pub mod latency;
pub mod memory_share;
pub mod memory_table;
pub mod prefetch;
pub mod ring;
pub mod roster;
pub mod segments;
mod serving;
pub mod session;
pub mod signals;
pub mod space;
pub mod stream;
pub mod view;
pub mod vm;
pub mod worker;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::store::state::StateId;
use crate::threads::{self, Role};
use disk::Disk;
use session::Session;
use vm::DeviceVm;
use worker::Worker;

/// What to do about a VMM that keeps its guest's memory to itself.
const HOW_TO_SHARE: &str = "start QEMU with `-object memory-backend-memfd,id=memory,size=…,share=on -machine \
                            memory-backend=memory`, cloud-hypervisor with `--memory size=…,shared=on`; see `ballast vm args`";

/// What all VMs share: the workers, and the state that their pages are in.
pub struct Device {
    workers: Arc<Vec<Worker>>,
    state_id: StateId,
    store_deadline_ms: AtomicU64,
    sessions: AtomicU64,
}

impl Device {
    /// Starts `workers` worker threads, which keep looking at their rings for `poll` after the last request. A store
    /// that finds no room waits for it for `store_deadline`; zero means not at all.
    ///
    /// # Errors
    /// When a thread can't be started, or signals can't be handled.
    pub fn start(
        workers: usize,
        poll: Duration,
        store_deadline: Duration,
        state_id: StateId,
    ) -> io::Result<Self> {
        signals::install()?;
        signals::interrupt::start_guard()?;
        let workers =
            (0..workers.max(1)).map(|index| Worker::start(index, poll)).collect::<io::Result<_>>()?;
        let device = Self {
            workers: Arc::new(workers),
            state_id,
            store_deadline_ms: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
        };
        device.set_store_deadline(store_deadline);
        Ok(device)
    }

    /// Changes how long stores wait for room, for the VMMs that attach from now on.
    pub fn set_store_deadline(&self, store_deadline: Duration) {
        let ms = u64::try_from(store_deadline.as_millis()).unwrap_or(u64::MAX);
        self.store_deadline_ms.store(ms, Ordering::Relaxed);
    }

    /// Lets stores that wait for room try again, now that there is some: for whoever made it. Costs a read per worker
    /// when none waits.
    pub fn wake_waiting(&self) {
        self.workers.iter().for_each(Worker::wake_waiting);
    }

    /// Returns when every worker has passed a turn. A worker that hangs is waited for.
    pub fn pass_turns(&self) {
        for worker in self.workers.iter() {
            // One that is gone has ended the process.
            let _ = worker.pass_turn();
        }
    }

    /// Accepts VMMs on a VM's socket, on a thread of its own, until the VM is removed and the socket is shut or somebody
    /// connects once more.
    ///
    /// # Errors
    /// When the thread can't be started.
    pub fn listen(
        self: &Arc<Self>,
        listener: impl Into<Arc<UnixListener>>,
        vm: Arc<DeviceVm>,
    ) -> io::Result<()> {
        let (device, of) = (Arc::clone(self), Arc::clone(&vm));
        let is_over = {
            let vm = Arc::clone(&vm);
            move || vm.is_removed()
        };
        serving::accept(listener.into(), "accept", vm, is_over, move |stream| device.attach(stream, &of))
    }

    fn attach(self: &Arc<Self>, stream: UnixStream, vm: &Arc<DeviceVm>) -> io::Result<()> {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let disk = Disk {
            number,
            vm: Arc::clone(vm),
            workers: Arc::clone(&self.workers),
            store_deadline: Duration::from_millis(self.store_deadline_ms.load(Ordering::Relaxed)),
            state_id: self.state_id,
        };
        let session = Session::new(disk).map_err(io::Error::other)?;
        vm.begin_session(number, &stream)?;
        let vm_of_thread = Arc::clone(vm);
        let spawned = threads::spawn(format!("session-{}", vm.name()), Role::Session, move || {
            serving::serve(stream, session, &vm_of_thread, vm_of_thread.connections());
            vm_of_thread.end_session(number);
        });
        if spawned.is_err() {
            vm.end_session(number);
        }
        spawned.map(|_| ())
    }
}
