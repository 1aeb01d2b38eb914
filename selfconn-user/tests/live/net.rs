//! A network namespace of the test's own.

use std::{
    fs,
    mem::{MaybeUninit, size_of},
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    time::{Duration, Instant},
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use socket2::{Domain, Socket, Type};

use crate::daemon::DEADLINE;

/// The namespace that the calling thread is in from now on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Net {
    /// Its inode, as events have it.
    pub(crate) inode: u64,
}

impl Net {
    /// Moves the calling thread into a new network namespace with `lo` up. Threads and processes that it starts from
    /// now on are in it, too.
    pub(crate) fn private() -> Self {
        // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace: run as root");
        let mut request = request("lo");
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        ioctl(libc::SIOCSIFFLAGS, &mut request);
        Self { inode: fs::metadata("/proc/thread-self/ns/net").unwrap().ino() }
    }

    /// Gives `lo` an address that isn't a loopback address.
    pub(crate) fn add_address(self, address: Ipv4Addr) {
        let mut request = request("lo:1");
        let sockaddr = libc::sockaddr_in {
            sin_family: libc::AF_INET as libc::sa_family_t,
            sin_port: 0,
            sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
            sin_zero: [0; 8],
        };
        // SAFETY: both are C structs of integers, of the same size.
        request.ifr_ifru.ifru_addr =
            unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(sockaddr) };
        ioctl(libc::SIOCSIFADDR, &mut request);
    }

    /// Gives `lo` an IPv6 address.
    pub(crate) fn add_address_v6(self, address: Ipv6Addr) {
        /// `include/uapi/linux/ipv6.h`.
        #[repr(C)]
        struct In6Ifreq {
            addr: [u8; 16],
            prefix_len: u32,
            ifindex: i32,
        }
        let mut request = In6Ifreq { addr: address.octets(), prefix_len: 128, ifindex: 1 };
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, None).unwrap();
        // SAFETY: on an IPv6 socket this number takes a pointer to a struct in6_ifreq.
        let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw mut request) };
        assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
        // Until the kernel is sure that nobody else has it, it can't be used.
        let until = Instant::now() + DEADLINE;
        while UdpSocket::bind(SocketAddrV6::new(address, 0, 0, 1)).is_err() {
            assert!(Instant::now() < until, "{address} stays tentative");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sets a sysctl below `net.ipv4` of this namespace.
    pub(crate) fn sysctl(self, name: &str, value: &str) {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
    }

    /// Has packets received on `lo` steered to every CPU. The calling thread gets a mount namespace of its own for it,
    /// for sysfs shows the namespace that it was mounted in.
    pub(crate) fn steer(self) {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        // SAFETY: as above.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
        let cpus = (1_u64 << std::thread::available_parallelism().unwrap().get()) - 1;
        fs::write("/sys/class/net/lo/queues/rx-0/rps_cpus", format!("{cpus:x}")).unwrap();
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: a C struct of integers and bytes, for which all zero is a value.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(number: libc::Ioctl, request: &mut libc::ifreq) {
    const _: () = assert!(size_of::<libc::sockaddr_in>() == size_of::<libc::sockaddr>());
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    // SAFETY: both numbers that come here take a pointer to a struct ifreq.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), number, request) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
}
