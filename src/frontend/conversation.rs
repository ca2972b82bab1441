//! The conversation with a back end: what [`Device`] says to it, in which order, at the start and after a
//! reconnect. The orders are those of QEMU's `vhost-user-blk` and cloud-hypervisor's `vu_common_ctrl`.

use std::os::fd::AsRawFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{GuestMemoryBackend, GuestRegionMmap};

use super::Error;
use super::blk::{BlkConfig, CONFIG_BYTES, CONFIG_LENGTH};
use super::device::{Device, Inflight, InflightDescription, open};
use super::negotiation::MemoryMessages;

impl Device {
    pub(super) fn reattach(&mut self) -> Result<(), Error> {
        self.connection = Some(open(&self.path, &self.options)?);
        if self.options.manners.is_cloud_hypervisor() {
            let features = self.protocol_features;
            let frontend = self.frontend()?;
            frontend.set_owner().map_err(Error::message("SET_OWNER"))?;
            frontend.get_features().map_err(Error::message("GET_FEATURES"))?;
            self.take_protocol_features(features)?;
        } else {
            self.negotiate()?;
        }
        // What stopped orderly before has a base of its own; what was running is found in the ring.
        self.start_rings()
    }

    pub(super) fn negotiate(&mut self) -> Result<(), Error> {
        let wanted = self.options.clone();
        let frontend = self.frontend()?;
        frontend.set_owner().map_err(Error::message("SET_OWNER"))?;
        let offered = frontend.get_features().map_err(Error::message("GET_FEATURES"))?;
        if offered & (1 << VIRTIO_F_VERSION_1) == 0 {
            return Err(Error::Missing { feature: "VIRTIO_F_VERSION_1" });
        }
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Error::Missing { feature: "VHOST_USER_F_PROTOCOL_FEATURES" });
        }
        let protocol = frontend.get_protocol_features();
        let protocol = protocol.map_err(Error::message("GET_PROTOCOL_FEATURES"))? & wanted.protocol_features;
        self.features = offered & wanted.features;
        self.take_protocol_features(protocol)?;
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let queues = self.frontend()?.get_queue_num().map_err(Error::message("GET_QUEUE_NUM"))?;
            if queues < u64::from(wanted.queues) {
                return Err(Error::Queues { offered: queues, wanted: wanted.queues });
            }
        } else if wanted.queues > 1 {
            return Err(Error::Queues { offered: 1, wanted: wanted.queues });
        }
        Ok(())
    }

    pub(super) fn take_protocol_features(
        &mut self,
        features: VhostUserProtocolFeatures,
    ) -> Result<(), Error> {
        self.protocol_features = features;
        let frontend = self.frontend()?;
        frontend.set_protocol_features(features).map_err(Error::message("SET_PROTOCOL_FEATURES"))?;
        if features.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            // From here on every message is answered, so a refusal is seen where it happens.
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(())
    }

    pub(super) fn read_config(&mut self) -> Result<(), Error> {
        if !self.protocol_features.contains(VhostUserProtocolFeatures::CONFIG) {
            return Err(Error::Missing { feature: "VHOST_USER_PROTOCOL_F_CONFIG" });
        }
        let (space, offset) = ([0; CONFIG_BYTES], self.options.manners.config_offset());
        let (_, answer) = self
            .frontend()?
            .get_config(offset, CONFIG_LENGTH, VhostUserConfigFlags::WRITABLE, &space)
            .map_err(Error::message("GET_CONFIG"))?;
        self.config = BlkConfig::parse(&answer, self.features)?;
        self.config_space = answer;
        Ok(())
    }

    /// Features, memory, in-flight region and rings, in the order of the VMM whose manners these are.
    pub(super) fn start_rings(&mut self) -> Result<(), Error> {
        let features = self.features;
        self.frontend()?.set_features(features).map_err(Error::message("SET_FEATURES"))?;
        if self.options.manners.is_cloud_hypervisor() {
            self.send_memory()?;
            for index in 0..self.vrings.len() {
                let size = self.vrings[index].place.size();
                self.frontend()?.set_vring_num(index, size).map_err(Error::message("SET_VRING_NUM"))?;
            }
            self.send_inflight()?;
        } else {
            self.send_inflight()?;
            self.send_memory()?;
        }
        for index in 0..self.vrings.len() {
            self.start_ring(index)?;
        }
        if self.logged {
            self.start_log()?;
        }
        for index in 0..self.vrings.len() {
            self.enable_ring(index, true)?;
        }
        Ok(())
    }

    pub(super) fn start_ring(&mut self, index: usize) -> Result<(), Error> {
        let cloud_hypervisor = self.options.manners.is_cloud_hypervisor();
        let Some((frontend, _)) = &self.connection else {
            return Err(Error::Usage("the device is not connected"));
        };
        let vring = &mut self.vrings[index];
        let resumed =
            || if cloud_hypervisor { vring.place.available_index() } else { vring.place.used_index() };
        let base = vring.stopped_at.unwrap_or_else(resumed);
        let (desc_table_addr, avail_ring_addr, used_ring_addr) = vring.place.user_addresses();
        let size = vring.place.size();
        let addresses = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr,
            used_ring_addr,
            avail_ring_addr,
            log_addr: None,
        };
        if cloud_hypervisor {
            frontend.set_vring_addr(index, &addresses).map_err(Error::message("SET_VRING_ADDR"))?;
            frontend.set_vring_base(index, base).map_err(Error::message("SET_VRING_BASE"))?;
            frontend.set_vring_call(index, &vring.call).map_err(Error::message("SET_VRING_CALL"))?;
            frontend.set_vring_kick(index, &vring.kick).map_err(Error::message("SET_VRING_KICK"))?;
        } else {
            frontend.set_vring_num(index, size).map_err(Error::message("SET_VRING_NUM"))?;
            frontend.set_vring_base(index, base).map_err(Error::message("SET_VRING_BASE"))?;
            frontend.set_vring_addr(index, &addresses).map_err(Error::message("SET_VRING_ADDR"))?;
            frontend.set_vring_kick(index, &vring.kick).map_err(Error::message("SET_VRING_KICK"))?;
            frontend.set_vring_call(index, &vring.call).map_err(Error::message("SET_VRING_CALL"))?;
        }
        vring.stopped_at = None;
        Ok(())
    }

    /// Gets an in-flight region the first time, and gives the back end the one that is kept.
    pub(super) fn send_inflight(&mut self) -> Result<(), Error> {
        if !self.protocol_features.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD) {
            return Ok(());
        }
        let (queues, queue_size) = (self.options.queues, self.options.queue_size);
        if self.inflight.is_none() {
            let wish = VhostUserInflight::new(0, 0, queues, queue_size);
            let answer = self.frontend()?.get_inflight_fd(&wish);
            let (got, file) = answer.map_err(Error::message("GET_INFLIGHT_FD"))?;
            let description = InflightDescription {
                bytes: got.mmap_size,
                offset: got.mmap_offset,
                queues: got.num_queues,
                queue_size: got.queue_size,
            };
            self.inflight = Some(Inflight { description, file });
        }
        if let (Some(inflight), Some((frontend, _))) = (&self.inflight, &mut self.connection) {
            let (message, fd) = (inflight.description.message(), inflight.file.as_raw_fd());
            frontend.set_inflight_fd(&message, fd).map_err(Error::message("SET_INFLIGHT_FD"))?;
        }
        Ok(())
    }

    pub(super) fn send_memory(&mut self) -> Result<(), Error> {
        let map = self.memory.map();
        let regions = map.iter().map(region_info).collect::<Result<Vec<_>, _>>()?;
        let slots = self.options.memory_messages == MemoryMessages::Slots;
        let frontend = self.frontend()?;
        if !slots {
            frontend.set_mem_table(&regions).map_err(Error::message("SET_MEM_TABLE"))?;
            return Ok(());
        }
        for region in &regions {
            frontend.add_mem_region(region).map_err(Error::message("ADD_MEM_REG"))?;
        }
        Ok(())
    }
}

pub(super) fn region_info(region: &GuestRegionMmap) -> Result<VhostUserMemoryRegionInfo, Error> {
    VhostUserMemoryRegionInfo::from_guest_region(region).map_err(Error::message("a memory region"))
}
