//! Self-connections of every kind that TCP has: other protocols above and below, other ends, other addresses.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6},
};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    client::{WORDS, assert_opened_here, connect_to_self, socket},
    daemon::{Daemon, for_each_variant, of},
    net::Net,
};

/// Runs `client` under each method; `check` gets its `established` and its `closed`, of which there is one each.
fn for_each_method(net: Net, client: impl Fn() -> u16, check: impl Fn(&Value, &Value)) {
    for_each_variant(|variant| {
        let mut daemon = Daemon::shared(variant, &[]);
        let port = client();
        daemon.expect(1, of("closed", net.inode));
        let (events, _) = daemon.stop();
        let all = |kind| events.iter().filter(|event| of(kind, net.inode)(event)).collect::<Vec<_>>();
        let (established, closed) = (all("established"), all("closed"));
        assert_eq!((established.len(), closed.len()), (1, 1), "{variant:?}: {events:#?}");
        assert_opened_here(established[0]);
        assert_eq!(established[0]["port"], port, "{variant:?}");
        check(established[0], closed[0]);
    });
}

#[test]
fn half_closed_and_read_to_the_end() {
    let client = || {
        let (mut socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.write_all(WORDS).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut heard = Vec::new();
        socket.read_to_end(&mut heard).unwrap();
        assert_eq!(heard, WORDS);
        port
    };
    for_each_method(Net::private(), client, |_, closed| {
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["bytes_sent"], WORDS.len(), "{closed}");
        assert_eq!(closed["bytes_received"], WORDS.len(), "{closed}");
    });
}

#[test]
fn closed_with_its_own_words_unread() {
    let client = || {
        let (mut socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.write_all(WORDS).unwrap();
        port
    };
    for_each_method(Net::private(), client, |_, closed| {
        assert_eq!(closed["how"], "rst", "{closed}");
        assert_eq!(closed["port_blocked_until"], Value::Null);
        assert_eq!(closed["bytes_sent"], WORDS.len());
    });
}

#[test]
fn a_multipath_socket_is_told_once_by_its_subflow() {
    let net = Net::private();
    let mptcp = || Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP));
    if let Err(error) = mptcp() {
        println!("this kernel has no MPTCP: {error}");
        return;
    }
    let client = || {
        let socket = mptcp().unwrap();
        socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
        let own = socket.local_addr().unwrap();
        socket.connect(&own).unwrap();
        own.as_socket().unwrap().port()
    };
    for_each_method(net, client, |_, _| {});
}

#[test]
fn fast_open_is_told_like_any_other() {
    let client = || {
        let mut socket = socket(Ipv4Addr::LOCALHOST.into());
        let on: libc::c_int = 1;
        // SAFETY: the option takes a pointer to an int and its size.
        let outcome = unsafe {
            libc::setsockopt(
                std::os::fd::AsRawFd::as_raw_fd(&socket),
                libc::IPPROTO_TCP,
                libc::TCP_FASTOPEN_CONNECT,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        assert_eq!(outcome, 0);
        socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
        let own = socket.local_addr().unwrap();
        socket.connect(&own).unwrap();
        socket.write_all(WORDS).unwrap();
        let mut heard = [0; WORDS.len()];
        socket.read_exact(&mut heard).unwrap();
        own.as_socket().unwrap().port()
    };
    for_each_method(Net::private(), client, |established, closed| {
        assert_eq!(established["isn"], established["peer_isn"], "{established}");
        assert_eq!(closed["bytes_received"], WORDS.len(), "{closed}");
    });
}

#[test]
fn a_link_local_address_has_its_interface() {
    let net = Net::private();
    let own = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x5e1f);
    net.add_address_v6(own);
    let client = || {
        let socket = socket(own.into());
        socket.bind(&SocketAddrV6::new(own, 0, 0, 1).into()).unwrap();
        let bound = socket.local_addr().unwrap();
        socket.connect(&bound).unwrap();
        bound.as_socket().unwrap().port()
    };
    for_each_method(net, client, |established, closed| {
        for event in [established, closed] {
            assert_eq!(event["addr"], own.to_string(), "{event}");
            assert_eq!(event["ifindex"], 1, "lo: {event}");
        }
    });
}

/// Binds the unspecified address and dials it: the kernel takes a loopback address for both.
fn unspecified(any: SocketAddr) -> u16 {
    let socket = socket(any.ip());
    socket.bind(&any.into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    socket.connect(&SocketAddr::new(any.ip(), port).into()).unwrap();
    port
}

#[test]
fn dialling_0_0_0_0_is_dialling_oneself() {
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    for_each_method(
        Net::private(),
        || unspecified(any),
        |established, _| {
            assert_eq!(established["addr"], "127.0.0.1", "{established}");
        },
    );
}

#[test]
fn dialling_the_unspecified_ipv6_address_is_dialling_oneself() {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
    for_each_method(
        Net::private(),
        || unspecified(any),
        |established, _| {
            assert_eq!(established["addr"], "::1", "{established}");
        },
    );
}
