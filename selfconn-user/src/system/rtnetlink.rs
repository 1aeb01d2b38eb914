//! rtnetlink: the loopback devices of a network namespace, and the filters on their egress. Each call is about the
//! namespace of the calling thread.

use std::{
    io::{self, Read as _},
    os::fd::{AsRawFd as _, BorrowedFd},
};

use socket2::{Domain, Protocol, Socket, Type};

/// `AF_NETLINK` and `NETLINK_ROUTE`, include/linux/socket.h and include/uapi/linux/netlink.h at v5.10.
const AF_NETLINK: i32 = 16;
const NETLINK_ROUTE: i32 = 0;

/// `include/uapi/linux/netlink.h` at v5.10.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// `include/uapi/linux/rtnetlink.h` at v5.10.
const RTM_GETLINK: u16 = 18;
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_GETTFILTER: u16 = 46;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;

/// `include/uapi/linux/if_link.h` and `if_arp.h` at v5.10.
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const ARPHRD_LOOPBACK: u16 = 772;

/// `include/uapi/linux/pkt_cls.h` and `pkt_sched.h` at v5.10.
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
const TC_H_CLSACT: u32 = 0xffff_fff1;
const CLSACT_HANDLE: u32 = 0xffff_0000;
const EGRESS: u32 = 0xffff_fff3;
const INGRESS: u32 = 0xffff_fff2;

/// `ETH_P_ALL`, network byte order.
const ALL_PROTOCOLS: u32 = 0x0003_u16.to_be() as u32;

/// Length of `struct nlmsghdr`, `struct ifinfomsg` and `struct tcmsg`.
const HEADER_LEN: usize = 16;
const IFINFO_LEN: usize = 16;
const TCMSG_LEN: usize = 20;

/// Maximum number of filters of a device that are listed. Who has a network namespace of his own can add any number.
const MAX_FILTERS: usize = 1_024;

/// A device through which packets leave that come back to this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopDevice {
    pub index: u32,
    pub name: String,
}

/// A BPF filter on the egress of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    pub name: String,
    handle: u32,
    /// Priority and protocol.
    info: u32,
}

impl Filter {
    /// Filters with a lower one run earlier.
    #[must_use]
    pub fn priority(&self) -> u16 {
        (self.info >> 16) as u16
    }
}

/// The loopback device, and after it the VRF devices.
///
/// # Errors
/// If the kernel refuses to list devices.
pub fn loop_devices() -> io::Result<Vec<LoopDevice>> {
    let mut devices = Vec::new();
    dump(RTM_GETLINK, &[0; IFINFO_LEN], |message| {
        let (Some(kind), Some(index)) = (word::<2>(message, 2), word::<4>(message, 4)) else { return };
        let attributes = message.get(IFINFO_LEN..).unwrap_or_default();
        let info = attribute(attributes, IFLA_LINKINFO).unwrap_or_default();
        let is_vrf = attribute(info, IFLA_INFO_KIND).is_some_and(|kind| text(kind) == "vrf");
        if is_vrf || u16::from_ne_bytes(kind) == ARPHRD_LOOPBACK {
            let name = text(attribute(attributes, IFLA_IFNAME).unwrap_or_default());
            devices.push(LoopDevice { index: u32::from_ne_bytes(index), name });
        }
    })?;
    // Index 1 is the loopback device's (LOOPBACK_IFINDEX in include/net/flow.h at v5.10).
    devices.sort_unstable_by_key(|device| device.index);
    Ok(devices)
}

/// Makes the queueing discipline to which filters are attached. False: the device has it already.
///
/// # Errors
/// If the kernel refuses, such as without the module `sch_ingress`.
pub fn add_clsact(device: u32) -> io::Result<bool> {
    const EEXIST: i32 = 17;
    let attributes = with_attribute(Vec::new(), TCA_KIND, b"clsact\0");
    let message = [&tcmsg(device, CLSACT_HANDLE, TC_H_CLSACT, 0)[..], &attributes].concat();
    match change(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_EXCL, &message) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes that queueing discipline unless it has a filter.
///
/// # Errors
/// If the kernel refuses.
pub fn remove_unused_clsact(device: u32) -> io::Result<()> {
    if count_filters(device, EGRESS)? + count_filters(device, INGRESS)? > 0 {
        return Ok(());
    }
    let attributes = with_attribute(Vec::new(), TCA_KIND, b"clsact\0");
    let message = [&tcmsg(device, CLSACT_HANDLE, TC_H_CLSACT, 0)[..], &attributes].concat();
    change(RTM_DELQDISC, 0, &message)
}

/// Attaches a program as a filter. Among the filters of the same priority it is the first one, because the kernel
/// inserts a new one at the head (`cls_bpf_change`, net/sched/cls_bpf.c at v5.10).
///
/// # Errors
/// If the kernel refuses, such as without the module `cls_bpf`.
pub fn add_filter(device: u32, program: BorrowedFd<'_>, name: &str, priority: u16) -> io::Result<()> {
    let options = with_attribute(Vec::new(), TCA_BPF_FD, &program.as_raw_fd().cast_unsigned().to_ne_bytes());
    let options = with_attribute(options, TCA_BPF_NAME, format!("{name}\0").as_bytes());
    let options = with_attribute(options, TCA_BPF_FLAGS, &TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes());
    let attributes = with_attribute(Vec::new(), TCA_KIND, b"bpf\0");
    let attributes = with_attribute(attributes, TCA_OPTIONS, &options);
    let info = u32::from(priority) << 16 | ALL_PROTOCOLS;
    let message = [&tcmsg(device, 0, EGRESS, info)[..], &attributes].concat();
    change(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_EXCL, &message)
}

/// The BPF filters on the egress of a device, in the order in which they run: the first [`MAX_FILTERS`].
///
/// # Errors
/// If the kernel refuses to list them.
pub fn filters(device: u32) -> io::Result<Vec<Filter>> {
    let mut filters = Vec::new();
    dump(RTM_GETTFILTER, &tcmsg(device, 0, EGRESS, 0), |message| {
        let (Some(handle), Some(info)) = (word::<4>(message, 8), word::<4>(message, 16)) else { return };
        let attributes = message.get(TCMSG_LEN..).unwrap_or_default();
        let options = attribute(attributes, TCA_OPTIONS).unwrap_or_default();
        let handle = u32::from_ne_bytes(handle);
        // Each priority has an entry of its own, with handle 0.
        if handle != 0 && filters.len() < MAX_FILTERS {
            let name = text(attribute(options, TCA_BPF_NAME).unwrap_or_default());
            filters.push(Filter { name, handle, info: u32::from_ne_bytes(info) });
        }
    })?;
    Ok(filters)
}

/// Removes a filter.
///
/// # Errors
/// If the kernel refuses.
pub fn remove_filter(device: u32, filter: &Filter) -> io::Result<()> {
    let attributes = with_attribute(Vec::new(), TCA_KIND, b"bpf\0");
    let message = [&tcmsg(device, filter.handle, EGRESS, filter.info)[..], &attributes].concat();
    change(RTM_DELTFILTER, 0, &message)
}

fn count_filters(device: u32, parent: u32) -> io::Result<usize> {
    let mut count = 0;
    dump(RTM_GETTFILTER, &tcmsg(device, 0, parent, 0), |_| count += 1)?;
    Ok(count)
}

/// `struct tcmsg`.
fn tcmsg(device: u32, handle: u32, parent: u32, info: u32) -> [u8; TCMSG_LEN] {
    let mut message = [0; TCMSG_LEN];
    for (word, to) in [0, device, handle, parent, info].into_iter().zip(message.chunks_exact_mut(4)) {
        to.copy_from_slice(&u32::to_ne_bytes(word));
    }
    message
}

fn with_attribute(mut attributes: Vec<u8>, kind: u16, content: &[u8]) -> Vec<u8> {
    let len = u16::try_from(4 + content.len()).unwrap_or(u16::MAX);
    attributes.extend(len.to_ne_bytes());
    attributes.extend(kind.to_ne_bytes());
    attributes.extend(content);
    attributes.resize(attributes.len().next_multiple_of(4), 0);
    attributes
}

/// The content of the first attribute of this kind.
fn attribute(mut attributes: &[u8], kind: u16) -> Option<&[u8]> {
    const NLA_TYPE_MASK: u16 = 0x3fff;
    loop {
        let len = usize::from(u16::from_ne_bytes(word(attributes, 0)?));
        let content = attributes.get(4..len)?;
        if u16::from_ne_bytes(word(attributes, 2)?) & NLA_TYPE_MASK == kind {
            return Some(content);
        }
        attributes = attributes.get(len.next_multiple_of(4)..)?;
    }
}

fn word<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A text that ends with NUL.
fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Sends a request. Returns the socket from which the response is read.
fn send(kind: u16, flags: u16, message: &[u8]) -> io::Result<Socket> {
    let socket = Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_ROUTE)))?;
    let len = u32::try_from(HEADER_LEN + message.len()).unwrap_or(u32::MAX);
    let mut request = Vec::with_capacity(HEADER_LEN + message.len());
    request.extend(len.to_ne_bytes());
    request.extend(kind.to_ne_bytes());
    request.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence number and port id.
    request.extend([0; 8]);
    request.extend(message);
    socket.send(&request)?;
    Ok(socket)
}

/// Requests a change, and waits for its acknowledgement.
fn change(kind: u16, flags: u16, message: &[u8]) -> io::Result<()> {
    let mut socket = send(kind, NLM_F_ACK | flags, message)?;
    let mut response = vec![0; 4_096];
    let len = socket.read(&mut response)?;
    for (kind, content) in messages(&response[..len]) {
        if kind == NLMSG_ERROR {
            return outcome(content);
        }
    }
    Err(truncated())
}

/// Requests a list, and calls `each` for the content of every message.
fn dump(kind: u16, message: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let mut socket = send(kind, NLM_F_DUMP, message)?;
    // The kernel fills at most this much at once (`netlink_dump`, net/netlink/af_netlink.c at v5.10).
    let mut response = vec![0; 32 << 10];
    loop {
        let len = socket.read(&mut response)?;
        if len == 0 {
            return Err(truncated());
        }
        for (kind, content) in messages(&response[..len]) {
            match kind {
                NLMSG_DONE => return Ok(()),
                NLMSG_ERROR => return outcome(content),
                _ => each(content),
            }
        }
    }
}

/// The kind and the content of each message.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = u32::from_ne_bytes(word(bytes, 0)?) as usize;
        let kind = u16::from_ne_bytes(word(bytes, 4)?);
        let content = bytes.get(HEADER_LEN..len)?;
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, content))
    })
}

/// `struct nlmsgerr` begins with the negative errno.
fn outcome(content: &[u8]) -> io::Result<()> {
    match word(content, 0).map(i32::from_ne_bytes) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno.saturating_neg())),
        None => Err(truncated()),
    }
}

fn truncated() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "rtnetlink sent a truncated response")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_found_in_any_order_and_a_damaged_one_ends_the_list() {
        let inner = with_attribute(Vec::new(), IFLA_INFO_KIND, b"vrf\0");
        let list = with_attribute(Vec::new(), IFLA_IFNAME, b"blue\0");
        // Nested attributes have a flag in their kind.
        let list = with_attribute(list, IFLA_LINKINFO | 0x8000, &inner);
        assert_eq!(attribute(&list, IFLA_IFNAME).map(text).as_deref(), Some("blue"));
        let info = attribute(&list, IFLA_LINKINFO).unwrap();
        assert_eq!(attribute(info, IFLA_INFO_KIND).map(text).as_deref(), Some("vrf"));
        assert_eq!(attribute(&list, 99), None);
        for len in 0..list.len() {
            assert_eq!(attribute(&list[..len], 99), None, "{len}");
        }
        assert_eq!(attribute(&[0; 8], 1), None, "an attribute of length zero");
    }

    #[test]
    fn messages_end_at_a_truncated_one() {
        let message = |kind: u16, content: &[u8]| {
            let len = (HEADER_LEN + content.len()) as u32;
            [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], content].concat()
        };
        let two = [message(NLMSG_ERROR, &0_i32.to_ne_bytes()), message(7, b"abcd")].concat();
        let kinds = |bytes| messages(bytes).map(|(kind, _)| kind).collect::<Vec<_>>();
        assert_eq!(kinds(&two), [NLMSG_ERROR, 7]);
        assert_eq!(kinds(&two[..two.len() - 1]), [NLMSG_ERROR]);
        assert!(kinds(&[0; 16]).is_empty());
        assert!(outcome(&0_i32.to_ne_bytes()).is_ok() && outcome(&[1]).is_err());
        assert_eq!(outcome(&(-17_i32).to_ne_bytes()).unwrap_err().raw_os_error(), Some(17));
    }
}
