//! Clients that connect to themselves, and the checks of how they are reported.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, SocketAddrV6},
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// The data that a client sends to itself.
pub(crate) const PAYLOAD: &[u8] = b"data sent to self";

/// A new TCP socket of an address's family.
pub(crate) fn socket(address: IpAddr) -> Socket {
    Socket::new(Domain::for_address(SocketAddr::new(address, 0)), Type::STREAM, None).unwrap()
}

/// The textbook client: binds a port that the kernel chooses and connects to it. Returns the socket and its
/// port.
pub(crate) fn connect_to_self(address: IpAddr) -> (Socket, u16) {
    let socket = socket(address);
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), own);
    (socket, own.as_socket().unwrap().port())
}

/// Makes a self-connection, sends data through it and closes it in order. Returns the port.
pub(crate) fn run_self_connection(address: IpAddr) -> u16 {
    let (mut socket, port) = connect_to_self(address);
    socket.write_all(PAYLOAD).unwrap();
    let mut received = [0; PAYLOAD.len()];
    socket.read_exact(&mut received).unwrap();
    assert_eq!(received, PAYLOAD);
    port
}

/// Connects to a closed port, with a new socket each time, until it connects to itself. `None` after `limit`
/// attempts.
pub(crate) fn connect_until_self(target: SocketAddr, limit: usize) -> Option<Socket> {
    (0..limit).find_map(|_| {
        let socket = socket(target.ip());
        socket.connect(&target.into()).ok().map(|()| socket)
    })
}

/// `fe80::…%scope` as a socket address.
#[expect(dead_code, reason = "for the link-local rows")]
pub(crate) fn scoped(address: std::net::Ipv6Addr, port: u16, scope: u32) -> SocketAddr {
    SocketAddrV6::new(address, port, 0, scope).into()
}

pub(crate) fn own_comm() -> String {
    fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned()
}

pub(crate) fn own_thread_comm() -> String {
    fs::read_to_string("/proc/thread-self/comm").unwrap().trim_end().to_owned()
}

/// True if another process was named as the opener of a connection that this process opened.
static WRONG_OPENER_SEEN: AtomicBool = AtomicBool::new(false);

pub(crate) fn wrong_opener_seen() -> bool {
    WRONG_OPENER_SEEN.load(Ordering::Relaxed)
}

/// Checks that the calling thread is reported as the opener.
#[track_caller]
pub(crate) fn assert_opened_by_this_thread(event: &Value) {
    if !event["pid"].is_null() && event["pid"] != std::process::id() {
        WRONG_OPENER_SEEN.store(true, Ordering::Relaxed);
    }
    assert_eq!(event["pid"], std::process::id(), "{event}");
    assert_eq!(
        event["tid"].as_i64(),
        Some(rustix::thread::gettid().as_raw_nonzero().get().into()),
        "{event}"
    );
    assert_eq!(event["comm"], own_comm(), "{event}");
    assert_eq!(event["thread_comm"], own_thread_comm(), "{event}");
    assert_eq!(event["uid"], 0, "{event}");
    assert_eq!(event["owner"], "witnessed", "{event}");
}
