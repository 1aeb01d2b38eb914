//! Names of network devices. Only from within a network namespace its devices can be asked for without netlink
//! traffic; the answer is immediate (`dev_ifname`, net/core/dev_ioctl.c at v5.10).

use std::{
    collections::HashMap,
    fs, io,
    os::{fd::OwnedFd, unix::fs::MetadataExt as _},
    sync::Arc,
};

use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice::index_to_name, socket_with};
use selfconn_ebpf::Endpoint;

/// The devices of one network namespace.
#[derive(Debug)]
pub struct NetDevices {
    /// A socket stays in the namespace where it was made.
    socket: OwnedFd,
    /// Inode of the namespace.
    netns: u32,
}

impl NetDevices {
    /// Those of the network namespace that the calling thread is in.
    ///
    /// # Errors
    /// If there is no `/proc`, or no socket can be made.
    pub fn of_current_netns() -> io::Result<Self> {
        let inode = fs::metadata("/proc/thread-self/ns/net")?.ino();
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket, netns: u32::try_from(inode).map_err(io::Error::other)? })
    }

    /// The name of the device that the socket of this endpoint is bound to. `None`: it is bound to none, it is in
    /// another namespace, or the device is gone.
    #[must_use]
    pub fn name(&self, endpoint: &Endpoint) -> Option<Arc<str>> {
        let ifindex = endpoint.device().filter(|_| endpoint.netns == self.netns)?;
        index_to_name(&self.socket, ifindex).ok().map(Arc::from)
    }
}

/// Names of devices by the inode of their network namespace and their number.
#[derive(Debug, Default)]
pub(super) struct DeviceNames(HashMap<(u32, u32), Arc<str>>);

impl DeviceNames {
    /// Looks up the devices of these sockets, which are in the network namespace that the calling thread is in.
    pub(super) fn look_up<'a>(&mut self, endpoints: impl Iterator<Item = &'a Endpoint>) {
        let mut devices = None;
        for endpoint in endpoints {
            let Some(ifindex) = endpoint.device() else { continue };
            let key = (endpoint.netns, ifindex);
            if self.0.contains_key(&key) {
                continue;
            }
            let devices = devices.get_or_insert_with(NetDevices::of_current_netns);
            let name = devices.as_ref().ok().and_then(|devices| devices.name(endpoint));
            self.0.extend(name.map(|name| (key, name)));
        }
    }

    pub(super) fn get(&self, endpoint: &Endpoint) -> Option<Arc<str>> {
        self.0.get(&(endpoint.netns, endpoint.device()?)).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_has_its_name_only_in_its_own_namespace() {
        let devices = NetDevices::of_current_netns().unwrap();
        let at = |netns, ifindex| Endpoint { netns, ifindex, ..Endpoint::UNKNOWN };
        let lo = devices.name(&at(devices.netns, 1));
        assert_eq!(lo.as_deref(), Some("lo"));
        for endpoint in [at(devices.netns + 1, 1), at(devices.netns, 0), at(devices.netns, i32::MAX as u32)] {
            assert_eq!(devices.name(&endpoint), None, "{endpoint:?}");
        }
        let mut names = DeviceNames::default();
        names.look_up([at(devices.netns, 1)].iter());
        assert_eq!(names.get(&at(devices.netns, 1)).as_deref(), Some("lo"));
        assert_eq!(names.get(&at(devices.netns, 0)), None);
    }
}
