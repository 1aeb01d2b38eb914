//! Clients that connect to themselves, and the checks of how they are reported.

use std::{
    fs,
    io::{Read as _, Write as _},
    mem::size_of_val,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
    os::fd::AsRawFd as _,
};

use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// A user without privileges.
pub(crate) const NOBODY: u32 = 65_534;

/// The calling thread becomes this user; other threads of the process do not.
pub(crate) fn become_user(uid: u32) {
    let uid = rustix::fs::Uid::from_raw(uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
}

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

/// A self-connection, and a socket that is bound to its port at every address, so that each bind of the port fails.
/// Returns both, and the port.
pub(crate) fn hold_port_at_every_address() -> ([Socket; 2], u16) {
    let sharing = |address: SocketAddr| {
        let socket = socket(address.ip());
        socket.set_reuse_address(true).unwrap();
        socket.bind(&address.into()).unwrap();
        socket
    };
    let everywhere = sharing((Ipv4Addr::UNSPECIFIED, 0).into());
    let port = everywhere.local_addr().unwrap().as_socket().unwrap().port();
    let connection = sharing((Ipv4Addr::LOCALHOST, port).into());
    connection.connect(&connection.local_addr().unwrap()).unwrap();
    ([everywhere, connection], port)
}

/// A socket whose `connect()` to itself has returned, and whose SYN the first send will send. The namespace must
/// allow TCP Fast Open without a cookie.
pub(crate) fn deferred_connect_to_self(address: IpAddr) -> Socket {
    let socket = socket(address);
    enable_fastopen_connect(&socket);
    socket.bind(&SocketAddr::new(address, 0).into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    let (mut info, mut length) = ([0_u8; 8], 8);
    // SAFETY: the option writes at most `length` bytes, and the first one is the state.
    let outcome = unsafe {
        let info = info.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info, &raw mut length)
    };
    assert_eq!(outcome, 0);
    assert_eq!(info[0], selfconn_ebpf::state::SYN_SENT, "the SYN is not deferred");
    socket
}

/// `connect()` returns at once if it may, and the first send sends the SYN with data.
pub(crate) fn enable_fastopen_connect(socket: &Socket) {
    let on: libc::c_int = 1;
    // SAFETY: this option takes a pointer to an int and its size.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_FASTOPEN_CONNECT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    assert_eq!(outcome, 0);
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

/// Sets the first and the last port that `connect()` chooses for this socket: `IP_LOCAL_PORT_RANGE`,
/// include/uapi/linux/in.h at v6.3. False: this kernel does not have the option.
pub(crate) fn set_own_port_range(socket: &Socket, (low, high): (u16, u16)) -> bool {
    const IP_LOCAL_PORT_RANGE: libc::c_int = 51;
    let range = u32::from(high) << 16 | u32::from(low);
    // SAFETY: the option takes a pointer to a 32-bit number.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            IP_LOCAL_PORT_RANGE,
            (&raw const range).cast(),
            size_of_val(&range) as libc::socklen_t,
        )
    };
    outcome == 0
}

pub(crate) fn own_comm() -> String {
    fs::read_to_string("/proc/self/comm").unwrap().trim_end().to_owned()
}

pub(crate) fn own_thread_comm() -> String {
    fs::read_to_string("/proc/thread-self/comm").unwrap().trim_end().to_owned()
}

/// Checks that the calling thread is reported as the opener.
#[track_caller]
pub(crate) fn assert_opened_by_this_thread(event: &Value) {
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

/// Connects to a server with a full accept queue. Their SYNs are dropped, so the connects stay in flight.
pub(crate) fn unanswered_connects(count: usize) -> (TcpListener, Vec<Socket>) {
    unanswered_connects_to((Ipv4Addr::LOCALHOST, 0).into(), count)
}

/// As [`unanswered_connects`], to a server at this address.
pub(crate) fn unanswered_connects_to(server: SocketAddr, count: usize) -> (TcpListener, Vec<Socket>) {
    let listener = socket(server.ip());
    // The port may still be in TIME_WAIT.
    listener.set_reuse_address(true).unwrap();
    listener.bind(&server.into()).unwrap();
    listener.listen(0).unwrap();
    let server = listener.local_addr().unwrap();
    let connect = |_| {
        let client = socket(Ipv4Addr::LOCALHOST.into());
        client.set_nonblocking(true).unwrap();
        let _ = client.connect(&server);
        client
    };
    (listener.into(), (0..count).map(connect).collect())
}

/// True if it is still connected to itself.
pub(crate) fn is_connected(socket: &Socket) -> bool {
    socket.peer_addr().is_ok()
}

/// Checks that the socket was destroyed: the program gets ECONNABORTED.
#[track_caller]
pub(crate) fn assert_aborted(mut socket: &Socket) {
    // The read waits for the error. The port is released a moment before the socket is in CLOSE.
    let received = socket.read(&mut [0; 8]).map_err(|error| error.kind());
    assert_eq!(received, Err(std::io::ErrorKind::ConnectionAborted));
    assert!(!is_connected(socket));
}
