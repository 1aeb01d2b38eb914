//! A network namespace for one test.

use std::{
    fs,
    io::{self, Read as _},
    mem::{MaybeUninit, size_of},
    net::{Ipv4Addr, Ipv6Addr, SocketAddrV6, UdpSocket},
    os::{
        fd::{AsFd as _, AsRawFd as _},
        unix::fs::MetadataExt as _,
    },
    thread,
    time::{Duration, Instant},
};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};
use socket2::{Domain, Socket, Type};

use super::{daemon::DEADLINE, daemon_pool, machine};

/// The network namespace that the calling thread is in from now on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TestNetns {
    /// Its inode, as in the field `netns` of events.
    pub(crate) inode: u64,
}

impl TestNetns {
    /// Moves the calling thread into a new network namespace with `lo` up. Threads and processes that it
    /// starts from now on are in this namespace, too. The test has the machine for itself from now on.
    pub(crate) fn enter_new() -> Self {
        machine::occupy();
        daemon_pool::begin_test();
        Self::enter_new_in_helper()
    }

    /// The same in a helper process, whose test has the machine.
    pub(crate) fn enter_new_in_helper() -> Self {
        // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.expect("a network namespace: run as root");
        let mut request = request("lo");
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        ioctl(libc::SIOCSIFFLAGS, &mut request);
        Self { inode: fs::metadata("/proc/thread-self/ns/net").unwrap().ino() }
    }

    /// Calls `work` on a thread in a new network namespace. If nothing that `work` returns keeps it, the
    /// namespace ends. For helper processes.
    pub(crate) fn with_new_in_helper<T: Send>(work: impl FnOnce(Self) -> T + Send) -> T {
        thread::scope(|scope| scope.spawn(|| work(Self::enter_new_in_helper())).join().unwrap())
    }

    /// Moves the calling thread into the network namespace of a process.
    pub(crate) fn enter_of_process(pid: u32) -> Self {
        let namespace = fs::File::open(format!("/proc/{pid}/ns/net")).unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
        Self { inode: namespace.metadata().unwrap().ino() }
    }

    /// Gives `lo` an address that is not a loopback address.
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
        // SAFETY: on an IPv6 socket this request takes a pointer to a struct in6_ifreq.
        let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &raw mut request) };
        assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        // The address cannot be used until the kernel's duplicate address detection is done.
        let until = Instant::now() + DEADLINE;
        while UdpSocket::bind(SocketAddrV6::new(address, 0, 0, 1)).is_err() {
            assert!(Instant::now() < until, "{address} stays tentative");
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sets a sysctl below `net.ipv4` of this namespace.
    pub(crate) fn set_sysctl(self, name: &str, value: &str) {
        fs::write(format!("/proc/sys/net/ipv4/{name}"), value).unwrap();
    }

    /// Enables receive packet steering (RPS) on `lo` to every CPU. The calling thread gets a mount namespace
    /// of its own for that, because sysfs shows the network namespace in which it was mounted.
    pub(crate) fn enable_rps(self) {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        // SAFETY: as above: the flag FILES is not set.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None).unwrap();
        let cpus = (1_u64 << thread::available_parallelism().unwrap().get()) - 1;
        fs::write("/sys/class/net/lo/queues/rx-0/rps_cpus", format!("{cpus:x}")).unwrap();
    }

    /// Delays each packet on `lo` by one millisecond with the queueing discipline netem. Returns an error on
    /// a kernel without netem. The effects of a packet then happen in a softirq, independent of the task that
    /// sent it.
    pub(crate) fn add_netem_delay(self) -> io::Result<()> {
        // `include/uapi/linux/{netlink,rtnetlink,pkt_sched}.h`.
        const RTM_NEWQDISC: u16 = 36;
        const NLM_F_REQUEST_ACK_CREATE: u16 = 0x1 | 0x4 | 0x400;
        const TC_H_ROOT: u32 = u32::MAX;
        const TCA_KIND: u16 = 1;
        const TCA_OPTIONS: u16 = 2;
        const TCA_NETEM_LATENCY64: u16 = 10;
        const LOOPBACK: u32 = 1;
        let attribute = |kind: u16, content: &[u8]| {
            let length = u16::try_from(4 + content.len()).unwrap();
            let mut attribute = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
            attribute.extend(content);
            attribute.resize(attribute.len().next_multiple_of(4), 0);
            attribute
        };
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<_>>();
        // struct tc_netem_qopt: latency (given in nanoseconds below), limit in packets, loss, gap, duplicate,
        // jitter.
        let mut options = words(&[0, 100_000, 0, 0, 0, 0]);
        options.extend(attribute(TCA_NETEM_LATENCY64, &1_000_000_i64.to_ne_bytes()));
        // struct tcmsg: family, interface, handle, parent, info.
        let mut body = words(&[0, LOOPBACK, 0, TC_H_ROOT, 0]);
        body.extend(attribute(TCA_KIND, b"netem\0"));
        body.extend(attribute(TCA_OPTIONS, &options));
        let mut request = words(&[u32::try_from(16 + body.len()).unwrap()]);
        request.extend([RTM_NEWQDISC.to_ne_bytes(), NLM_F_REQUEST_ACK_CREATE.to_ne_bytes()].concat());
        request.extend(words(&[0, 0]));
        request.extend(body);
        let mut socket = Socket::new(libc::AF_NETLINK.into(), Type::RAW, None)?;
        socket.send(&request)?;
        let mut reply = [0; 256];
        let length = socket.read(&mut reply)?;
        assert!(length >= 20, "{length} bytes are too short for a netlink reply");
        // struct nlmsgerr: the negative errno follows the header.
        match i32::from_ne_bytes(reply[16..20].try_into().unwrap()) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        }
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: a C struct of integers and bytes, for which all zero is a valid value.
    let mut request: libc::ifreq = unsafe { MaybeUninit::zeroed().assume_init() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(number: libc::Ioctl, request: &mut libc::ifreq) {
    const _: () = assert!(size_of::<libc::sockaddr_in>() == size_of::<libc::sockaddr>());
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    // SAFETY: both request numbers in use take a pointer to a struct ifreq.
    let outcome = unsafe { libc::ioctl(socket.as_raw_fd(), number, request) };
    assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
}
