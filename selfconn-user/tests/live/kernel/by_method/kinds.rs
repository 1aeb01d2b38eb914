//! Every kind of TCP self-connection: other protocols above and below TCP, other ways to close, other
//! addresses.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, SocketAddrV6, TcpListener},
};

use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{
    client::{
        PAYLOAD, assert_opened_by_this_thread, connect_to_self, enable_fastopen_connect, run_self_connection,
        socket,
    },
    daemon::TestDaemon,
    netns::TestNetns,
    retries::{PREEMPTED, for_each_variant_retrying},
};

/// Runs `client` with each variant. `check` gets its only `established` and its only `closed` event.
fn for_each_method(net: TestNetns, client: impl Fn() -> u16, check: impl Fn(&Value, &Value)) {
    for_each_variant_retrying(PREEMPTED, |variant| {
        let daemon = TestDaemon::shared(variant, &[]);
        let port = client();
        let (established, closed) = daemon.only_pair(net.inode)?;
        assert_opened_by_this_thread(&established);
        assert_eq!(established["port"], port, "{variant:?}");
        assert_eq!(established["kernel_socket"], false, "a program made it: {variant:?}");
        check(&established, &closed);
        Ok(())
    });
}

#[test]
fn a_half_closed_connection_read_to_eof_ends_by_fin() {
    let client = || {
        let (mut socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.write_all(PAYLOAD).unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        let mut received = Vec::new();
        socket.read_to_end(&mut received).unwrap();
        assert_eq!(received, PAYLOAD);
        port
    };
    for_each_method(TestNetns::enter_new(), client, |_, closed| {
        assert_eq!(closed["how"], "fin", "{closed}");
        assert_eq!(closed["bytes_sent"], PAYLOAD.len(), "{closed}");
        assert_eq!(closed["bytes_received"], PAYLOAD.len(), "{closed}");
    });
}

#[test]
fn a_connection_closed_with_unread_data_ends_by_rst() {
    let client = || {
        let (mut socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.write_all(PAYLOAD).unwrap();
        port
    };
    for_each_method(TestNetns::enter_new(), client, |_, closed| {
        assert_eq!(closed["how"], "rst", "{closed}");
        assert_eq!(closed["port_blocked_until"], Value::Null);
        assert_eq!(closed["bytes_sent"], PAYLOAD.len());
    });
}

#[test]
fn a_close_without_room_for_a_time_wait_says_nothing_about_the_port() {
    let net = TestNetns::enter_new();
    for (max_entries, has_time_wait) in [("0", false), ("1000", true)] {
        net.set_sysctl("tcp_max_tw_buckets", max_entries);
        for_each_method(
            net,
            || run_self_connection(Ipv4Addr::LOCALHOST.into()),
            |_, closed| {
                assert_eq!(closed["how"], "fin", "{closed}");
                assert_eq!(
                    closed["port_blocked_until"].is_string(),
                    has_time_wait,
                    "{max_entries}: {closed}"
                );
                let port = u16::try_from(closed["port"].as_u64().unwrap()).unwrap();
                let bound = TcpListener::bind((Ipv4Addr::LOCALHOST, port));
                assert_eq!(bound.is_err(), has_time_wait, "{max_entries}: {bound:?}");
            },
        );
    }
}

#[test]
fn an_mptcp_socket_is_reported_once_by_its_subflow() {
    let net = TestNetns::enter_new();
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
fn a_fast_open_connection_is_reported() {
    let client = || {
        let mut socket = socket(Ipv4Addr::LOCALHOST.into());
        enable_fastopen_connect(&socket);
        socket.bind(&SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0).into()).unwrap();
        let own = socket.local_addr().unwrap();
        socket.connect(&own).unwrap();
        socket.write_all(PAYLOAD).unwrap();
        let mut received = [0; PAYLOAD.len()];
        socket.read_exact(&mut received).unwrap();
        own.as_socket().unwrap().port()
    };
    for_each_method(TestNetns::enter_new(), client, |established, closed| {
        assert_eq!(established["isn"], established["peer_isn"], "{established}");
        assert_eq!(closed["bytes_received"], PAYLOAD.len(), "{closed}");
    });
}

#[test]
fn a_link_local_address_is_reported_with_its_interface() {
    let net = TestNetns::enter_new();
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

/// Binds the unspecified address and connects to it. The kernel uses a loopback address for both.
fn connect_unspecified(any: SocketAddr) -> u16 {
    let socket = socket(any.ip());
    socket.bind(&any.into()).unwrap();
    let port = socket.local_addr().unwrap().as_socket().unwrap().port();
    socket.connect(&SocketAddr::new(any.ip(), port).into()).unwrap();
    port
}

#[test]
fn connecting_to_0_0_0_0_is_a_self_connection() {
    let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0);
    for_each_method(
        TestNetns::enter_new(),
        || connect_unspecified(any),
        |established, _| {
            assert_eq!(established["addr"], "127.0.0.1", "{established}");
        },
    );
}

#[test]
fn connecting_to_the_unspecified_ipv6_address_is_a_self_connection() {
    let any = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0);
    for_each_method(
        TestNetns::enter_new(),
        || connect_unspecified(any),
        |established, _| {
            assert_eq!(established["addr"], "::1", "{established}");
        },
    );
}
