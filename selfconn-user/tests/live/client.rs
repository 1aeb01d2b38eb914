//! Clients that connect to themselves, and what they must be reported as.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, SocketAddrV6},
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// What is written to oneself.
pub(crate) const WORDS: &[u8] = b"words to oneself";

/// A new TCP socket of an address's family.
pub(crate) fn socket(address: IpAddr) -> Socket {
    Socket::new(Domain::for_address(SocketAddr::new(address, 0)), Type::STREAM, None).unwrap()
}

/// The textbook client: binds a port the kernel chooses, and connects to it. The socket and its port.
pub(crate) fn connect_to_self(address: IpAddr) -> (Socket, u16) {
    let socket = socket(address);
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    assert_eq!(socket.peer_addr().unwrap(), own);
    (socket, own.as_socket().unwrap().port())
}

/// Writes to itself, reads it back, and closes in order. The port.
pub(crate) fn talk_to_self(address: IpAddr) -> u16 {
    let (mut socket, port) = connect_to_self(address);
    socket.write_all(WORDS).unwrap();
    let mut heard = [0; WORDS.len()];
    socket.read_exact(&mut heard).unwrap();
    assert_eq!(heard, WORDS);
    port
}

/// Dials a closed port, with a new socket each time, until it answers itself; `None` after `limit` dials.
pub(crate) fn dial_until_self(target: SocketAddr, limit: usize) -> Option<Socket> {
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

/// This process's name.
pub(crate) fn own_comm() -> String {
    fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned()
}

/// The calling thread's name.
pub(crate) fn own_thread_comm() -> String {
    fs::read_to_string("/proc/thread-self/comm").unwrap().trim_end().to_owned()
}

/// Whether another process was named as the opener of what this one opened.
static WAS_MISNAMED: AtomicBool = AtomicBool::new(false);

pub(crate) fn was_misnamed() -> bool {
    WAS_MISNAMED.load(Ordering::Relaxed)
}

/// Checks that the calling thread is named as the opener.
#[track_caller]
pub(crate) fn assert_opened_here(event: &Value) {
    if !event["pid"].is_null() && event["pid"] != std::process::id() {
        WAS_MISNAMED.store(true, Ordering::Relaxed);
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
