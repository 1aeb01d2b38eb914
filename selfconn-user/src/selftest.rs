//! A self-connection of our own, by which the hooks are proven to see: one socket in a network namespace that nothing
//! else is in and nothing leads to, connected to itself again and again.
//!
//! A socket stays in the namespace that it was made in, and keeps it. So making it takes privileges, once; using it takes
//! none, no thread and no step into another namespace.

use std::{
    fs,
    io::{self, Read as _},
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::MetadataExt as _,
    panic, thread,
};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use selfconn_ebpf::Transition;
use socket2::{Domain, Protocol, Socket, Type};

/// Where it is connected. Nobody else's server is there, in no namespace: the self-tests of other daemons are known by
/// it, and left out like our own.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(127, 83, 67, 84);
const PORT: u16 = 50_883;

/// A message that brings `lo` up, `struct nlmsghdr` and `struct ifinfomsg`: RTM_NEWLINK with IFF_UP set and changed
/// (include/uapi/linux/rtnetlink.h at v5.10). `lo` is 1 in every namespace.
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 5;
const LOOPBACK: u32 = 1;
const IFF_UP: u32 = 1;
const NLMSG_ERROR: u16 = 2;

/// `AF_NETLINK` and `NETLINK_ROUTE`.
const AF_NETLINK: i32 = 16;
const NETLINK_ROUTE: i32 = 0;

/// The socket.
#[derive(Debug)]
pub struct SelfTest {
    socket: Socket,
    netns: u32,
    uid: u32,
}

impl SelfTest {
    /// Makes the namespace and the socket.
    ///
    /// # Errors
    /// In words, when this process may not.
    pub fn prepare() -> Result<Self, String> {
        let make = || {
            // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
            loopback_up()?;
            let netns = fs::metadata("/proc/thread-self/ns/net")?.ino();
            let socket = Socket::new(Domain::IPV4, Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
            // By its number, so that it is kept from one time to the next.
            socket.bind(&SocketAddrV4::new(ADDRESS, PORT).into())?;
            let uid = rustix::process::getuid().as_raw();
            Ok(Self { socket, netns: u32::try_from(netns).unwrap_or(0), uid })
        };
        let made = thread::scope(|scope| {
            let thread = thread::Builder::new().name("namespace".to_owned()).spawn_scoped(scope, make)?;
            thread.join().unwrap_or_else(|cause| panic::resume_unwind(cause))
        });
        made.map_err(|error: io::Error| {
            format!(
                "a network namespace for it: {error}: it needs CAP_SYS_ADMIN and CAP_NET_ADMIN at the start"
            )
        })
    }

    /// Connects it to itself. On a calm host that is done when this returns, but it need not be.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn connect(&self) -> io::Result<()> {
        const EINPROGRESS: i32 = 115;
        match self.socket.connect(&SocketAddrV4::new(ADDRESS, PORT).into()) {
            Err(error) if error.raw_os_error() != Some(EINPROGRESS) => Err(error),
            _ => Ok(()),
        }
    }

    /// Resets it, so that it can be connected again. Nothing is left of it, not even TIME_WAIT.
    pub fn disconnect(&self) {
        if let Err(error) = rustix::net::connect_unspec(&self.socket) {
            log::debug!("the self-test's socket can't be disconnected: {error}");
        }
    }

    /// Whether this is about it.
    #[must_use]
    pub fn owns(&self, t: &Transition) -> bool {
        match t.netns {
            // Without BTF no namespace is known.
            0 => is_marked(t, self.uid),
            netns => netns == self.netns,
        }
    }
}

/// Whether this is about the self-test of another daemon, which is no news either. The mark is the address, and who uses
/// it: root, or the user that this daemon runs as. Anybody else's socket there is told like any other.
#[must_use]
pub fn is_marked(t: &Transition, own_uid: u32) -> bool {
    t.addr == ADDRESS.to_ipv6_mapped().octets()
        && t.port == PORT
        // The second witness's last record may have no opener any more.
        && (t.opener.at_ns == 0 || [0, own_uid].contains(&t.opener.uid))
}

/// In the calling thread's namespace.
fn loopback_up() -> io::Result<()> {
    let mut socket = Socket::new(Domain::from(AF_NETLINK), Type::RAW, Some(Protocol::from(NETLINK_ROUTE)))?;
    socket.send(&message())?;
    let mut answer = [0; 128];
    let len = socket.read(&mut answer)?;
    match errno(&answer[..len]) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(errno)),
        None => Err(io::Error::new(io::ErrorKind::InvalidData, "rtnetlink gave an answer that is cut off")),
    }
}

fn message() -> Vec<u8> {
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    // Sequence, port, family and type.
    message.extend([0; 12]);
    for word in [LOOPBACK, IFF_UP, IFF_UP] {
        message.extend(word.to_ne_bytes());
    }
    message
}

/// What the acknowledgement says.
fn errno(answer: &[u8]) -> Option<i32> {
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    let code = i32::from_ne_bytes(*answer.get(16..)?.first_chunk()?);
    (kind == NLMSG_ERROR).then_some(code.saturating_neg())
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{Opener, Task};

    use super::*;

    fn transition(addr: Ipv4Addr, port: u16, uid: u32, dialled_ns: u64, netns: u32) -> Transition {
        Transition {
            at_ns: 2,
            sock: 1,
            cookie: 0,
            bytes_sent: 0,
            bytes_retrans: 0,
            bytes_received: 0,
            addr: addr.to_ipv6_mapped().octets(),
            netns,
            ifindex: 0,
            snd_una: 0,
            rcv_nxt: 0,
            error: 0,
            port,
            family: 2,
            old: 3,
            new: 1,
            witness: 0,
            has_counters: 1,
            is_owned: 0,
            current: Task::UNKNOWN,
            opener: Opener { at_ns: dialled_ns, uid, ..Opener::UNKNOWN },
        }
    }

    #[test]
    fn only_root_and_the_same_user_can_hide_a_socket_and_only_at_one_address() {
        let elsewhere = Ipv4Addr::new(127, 0, 0, 1);
        for (addr, port, uid, dialled_ns, is_one) in [
            (ADDRESS, PORT, 0, 1, true),
            (ADDRESS, PORT, 65_534, 1, true),
            (ADDRESS, PORT, 1_000, 1, false),
            (ADDRESS, PORT, 0, 0, true),
            (ADDRESS, PORT + 1, 0, 1, false),
            (elsewhere, PORT, 0, 1, false),
        ] {
            let t = transition(addr, port, uid, dialled_ns, 7);
            assert_eq!(is_marked(&t, 65_534), is_one, "{addr} {port} {uid} {dialled_ns}");
        }
    }

    #[test]
    fn what_was_acknowledged_is_told_from_what_was_refused() {
        assert_eq!(message().len(), 32);
        let answer = |kind: u16, code: i32| {
            let mut answer = vec![0; 20];
            answer[4..6].copy_from_slice(&kind.to_ne_bytes());
            answer[16..20].copy_from_slice(&code.to_ne_bytes());
            answer
        };
        assert_eq!(errno(&answer(NLMSG_ERROR, 0)), Some(0));
        assert_eq!(errno(&answer(NLMSG_ERROR, -1)), Some(1));
        assert_eq!(errno(&answer(3, 0)), None);
        assert_eq!(errno(&answer(NLMSG_ERROR, 0)[..18]), None);
        assert_eq!(errno(&[]), None);
    }
}
