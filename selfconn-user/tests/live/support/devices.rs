//! Network devices for tests: pairs of veth devices, whose addresses two sockets can share, and VRF devices.

use std::{
    fs,
    io::{self, Read as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::RawFd,
};

use socket2::{Socket, Type};

use super::netns::TestNetns;

// `include/uapi/linux/{netlink,rtnetlink,if_link,veth}.h` at v5.10.
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const NLM_F_REQUEST_ACK_CREATE_EXCL: u16 = 0x1 | 0x4 | 0x400 | 0x200;
const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_VRF_TABLE: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const IFF_UP: u32 = 1;

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn attribute(kind: u16, content: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + content.len()).unwrap();
    let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
    attribute.extend(content);
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    attribute
}

/// `struct ifinfomsg`: family and type are 0.
fn link(index: u32, flags: u32) -> Vec<u8> {
    words(&[0, index, flags, flags])
}

/// Sends a request to rtnetlink in the namespace of the calling thread, and waits for its answer.
fn request(kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
    let mut request = words(&[u32::try_from(16 + body.len()).unwrap()]);
    request.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
    request.extend(words(&[0, 0]));
    request.extend(body);
    let mut socket = Socket::new(libc::AF_NETLINK.into(), Type::RAW, None)?;
    socket.send(&request)?;
    let mut reply = [0; 1_024];
    let length = socket.read(&mut reply)?;
    assert!(length >= 20, "{length} bytes are too short for a netlink reply");
    // struct nlmsgerr: the negative errno follows the header.
    match i32::from_ne_bytes(reply[16..20].try_into().unwrap()) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error)),
    }
}

/// The index of a device in the namespace of the calling thread.
fn index_of(name: &str) -> u32 {
    let name = std::ffi::CString::new(name).unwrap();
    // SAFETY: the pointer is to a C string.
    let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
    assert_ne!(index, 0, "{name:?}: {}", io::Error::last_os_error());
    index
}

impl TestNetns {
    /// Makes two connected devices and brings them up. Returns their indices. An error on a kernel without veth.
    pub(crate) fn add_veth_pair(self, names: [&str; 2]) -> io::Result<[u32; 2]> {
        add_veth(names[0], names[1], None)?;
        let indices = names.map(index_of);
        for index in indices {
            request(RTM_NEWLINK, NLM_F_REQUEST_ACK, &link(index, IFF_UP))?;
        }
        Ok(indices)
    }

    /// Makes a VRF device with this routing table, and brings it up. Returns its index. An error on a kernel without
    /// VRF.
    pub(crate) fn add_vrf(self, name: &str, table: u32) -> io::Result<u32> {
        add_device(name, b"vrf", &attribute(IFLA_VRF_TABLE, &table.to_ne_bytes()))?;
        let index = index_of(name);
        request(RTM_NEWLINK, NLM_F_REQUEST_ACK, &link(index, IFF_UP))?;
        Ok(index)
    }

    /// Gives a device an address that is usable at once.
    pub(crate) fn add_device_address(self, index: u32, address: IpAddr) {
        let (family, octets, prefix) = match address {
            IpAddr::V4(address) => (libc::AF_INET, Ipv4Addr::octets(&address).to_vec(), 24),
            IpAddr::V6(address) => (libc::AF_INET6, Ipv6Addr::octets(&address).to_vec(), 64),
        };
        // struct ifaddrmsg: family, prefix length, flags, scope; index.
        let mut body = vec![u8::try_from(family).unwrap(), prefix, IFA_F_NODAD, 0];
        body.extend(words(&[index]));
        for kind in [IFA_LOCAL, IFA_ADDRESS] {
            body.extend(attribute(kind, &octets));
        }
        request(RTM_NEWADDR, NLM_F_REQUEST_ACK_CREATE_EXCL, &body).unwrap();
    }

    /// Makes a device here, whose peer is in the namespace with this descriptor. The device vanishes with its peer,
    /// when the other namespace ends.
    pub(crate) fn add_device_with_peer_in(self, name: &str, netns: RawFd) -> io::Result<()> {
        add_veth(name, "peer", Some(netns))
    }

    /// True if this namespace has a device with this name.
    pub(crate) fn has_device(self, name: &str) -> bool {
        let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        devices.lines().any(|line| line.trim_start().starts_with(&format!("{name}:")))
    }
}

fn add_veth(name: &str, peer: &str, peer_netns: Option<RawFd>) -> io::Result<()> {
    let mut peer = [link(0, 0), name_of(peer)].concat();
    if let Some(netns) = peer_netns {
        peer.extend(attribute(IFLA_NET_NS_FD, &netns.to_ne_bytes()));
    }
    add_device(name, b"veth", &attribute(VETH_INFO_PEER, &peer))
}

fn name_of(name: &str) -> Vec<u8> {
    attribute(IFLA_IFNAME, &[name.as_bytes(), b"\0"].concat())
}

fn add_device(name: &str, kind: &[u8], data: &[u8]) -> io::Result<()> {
    let info = [attribute(IFLA_INFO_KIND, kind), attribute(IFLA_INFO_DATA, data)].concat();
    let body = [link(0, 0), name_of(name), attribute(IFLA_LINKINFO, &info)].concat();
    request(RTM_NEWLINK, NLM_F_REQUEST_ACK_CREATE_EXCL, &body)
}

/// Binds a socket to a device: only packets through it reach the socket.
pub(crate) fn bind_device(socket: &Socket, name: &str) {
    socket.bind_device(Some(name.as_bytes())).unwrap();
}
