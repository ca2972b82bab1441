//! The devices of a run: connected, their queues started and stopped, and connected again if that is wanted. All of them
//! share one guest memory, as if one VMM had them all, so that the pages to store lie there once.

use std::time::Duration;

use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::{BenchArgs, Error};
use crate::frontend::{self, BlkConfig, Device, Memory, Options, Queue};

/// Beside its requests, what a queue's rings take at most, in bytes.
const RING_BYTES_MAX: usize = 64 << 10;

/// All devices, in the order of their sockets.
pub(super) struct Fleet {
    devices: Vec<Device>,
    /// How long a back end that has gone is waited for, if it is.
    reconnect: Option<Duration>,
}

/// Bytes of guest memory that the queues need.
pub(super) fn memory_bytes(args: &BenchArgs) -> usize {
    let options = options(args);
    let requests_bytes = usize::from(options.depth) * (options.data_bytes + 4096);
    args.lanes() * (requests_bytes + RING_BYTES_MAX) + (4 << 20)
}

impl Fleet {
    /// Connects to all of the sockets.
    pub(super) fn connect(args: &BenchArgs, memory: &Memory) -> Result<Self, Error> {
        raise_open_files();
        let mut devices = Vec::with_capacity(args.sockets.len());
        for socket in &args.sockets {
            let fewer = |offered| Error::Queues { socket: socket.clone(), offered, queues: args.queues };
            let failed = |source| match source {
                frontend::Error::Connect { .. } => Error::Connect { socket: socket.clone(), source },
                frontend::Error::Queues { offered, .. } => fewer(offered),
                source => Error::Frontend { sockets: socket.display().to_string(), source },
            };
            let device = Device::connect(socket, memory.clone(), options(args)).map_err(failed)?;
            // The driver goes by this, whatever the socket's protocol allows.
            if device.config().queues < args.queues {
                return Err(fewer(u64::from(device.config().queues)));
            }
            let keeps = device.protocol_features().contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD);
            if args.reconnect.is_some() && !keeps {
                return Err(Error::NoInflight { socket: socket.clone() });
            }
            devices.push(device);
        }
        Ok(Self { devices, reconnect: args.reconnect })
    }

    /// Pages on the smallest device.
    pub(super) fn device_pages(&self) -> u64 {
        self.devices.iter().map(|device| device.config().pages()).min().unwrap_or(0)
    }

    /// What all devices can do.
    pub(super) fn config(&self) -> BlkConfig {
        let mut configs = self.devices.iter().map(Device::config);
        let mut least = configs.next().copied().unwrap_or_default();
        for config in configs {
            least.discard_sectors_max = least.discard_sectors_max.min(config.discard_sectors_max);
            least.write_zeroes_sectors_max =
                least.write_zeroes_sectors_max.min(config.write_zeroes_sectors_max);
        }
        least
    }

    /// Starts all queues: one of each VM, then the next of each.
    pub(super) fn start(&mut self, args: &BenchArgs) -> Result<Vec<Queue>, frontend::Error> {
        let mut of_vms = Vec::with_capacity(self.devices.len());
        for device in &mut self.devices {
            of_vms.push(device.start()?.into_iter());
        }
        let mut queues = Vec::with_capacity(args.lanes());
        for _ in 0..args.queues {
            queues.extend(of_vms.iter_mut().filter_map(Iterator::next));
        }
        Ok(queues)
    }

    /// Connects those again whose back end has gone, if that is wanted, and has it carry out what was in flight; whether
    /// there were any.
    pub(super) fn mend(&mut self) -> Result<bool, frontend::Error> {
        let Some(within) = self.reconnect else { return Ok(false) };
        let mut mended = false;
        for device in self.devices.iter_mut().filter(|device| !device.is_connected()) {
            device.reconnect(within)?;
            mended = true;
        }
        Ok(mended)
    }

    /// Stops all queues.
    pub(super) fn stop(&mut self) -> Result<(), frontend::Error> {
        let Some(within) = self.reconnect else {
            return self.devices.iter_mut().try_for_each(|device| device.stop().map(drop));
        };
        self.devices.iter_mut().try_for_each(|device| {
            // It may go at any moment, this one as well.
            let stopped = device.stop().or_else(|_| {
                device.reconnect(within)?;
                device.stop()
            });
            stopped.map(drop)
        })
    }
}

fn options(args: &BenchArgs) -> Options {
    let lanes = u16::try_from(args.lanes()).unwrap_or(u16::MAX);
    let depth = args.qd.div_ceil(lanes.max(1));
    // Four descriptors a request; 128 at least, QEMU's default, and so 1024 at most, what every back end takes.
    let queue_size = (depth * 4).next_power_of_two().max(128);
    Options {
        depth,
        queue_size,
        queues: args.queues,
        data_bytes: usize::try_from(args.block_size.0).unwrap_or(1 << 20),
        ..Options::default()
    }
}

/// A VM takes some ten descriptors here. Where not so many are allowed, the first that is missing says so.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

#[cfg(test)]
mod tests {
    use super::super::args::tests::parse;
    use super::*;

    #[test]
    fn queues_have_room_for_every_request_in_flight() {
        for (sockets, qd, depth) in
            [("s", 1, 1), ("s", 33, 33), ("s", 256, 256), ("a b c", 32, 11), ("a b", 1, 1)]
        {
            let args = parse(&format!("bench {sockets} --qd {qd}")).unwrap();
            let options = options(&args);
            assert_eq!(options.depth, depth);
            assert!(options.queue_size.is_power_of_two() && options.queue_size / depth >= 3, "{qd}");
        }
    }

    #[test]
    fn memory_is_enough_for_all_queues() {
        for line in ["bench a", "bench a b --queues 4 --qd 256", "bench a --qd 256 --block-size 1MiB"] {
            let args = parse(line).unwrap();
            let memory = Memory::with_bytes(memory_bytes(&args)).unwrap();
            let fd = || vmm_sys_util::eventfd::EventFd::new(0).unwrap();
            for _ in 0..args.lanes() {
                frontend::Queue::new(&memory, &options(&args), true, fd(), fd()).unwrap();
            }
        }
    }
}
