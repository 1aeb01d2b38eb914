//! Connections that must not be reported. Each test makes one real self-connection at the end, to show that
//! the daemon works.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use socket2::{Domain, Socket, Type};

use crate::support::{
    client::{run_self_connection, socket},
    daemon::{TestDaemon, hook_variants, is_event},
    netns::TestNetns,
};

/// Runs `work` and then makes a self-connection. Only the self-connection may be reported.
fn assert_only_self_connection_is_reported(work: impl Fn()) {
    assert_only_self_connection_is_reported_in(TestNetns::enter_new(), work);
}

fn assert_only_self_connection_is_reported_in(net: TestNetns, work: impl Fn()) {
    for variant in hook_variants() {
        let mut daemon = TestDaemon::shared(&variant, &["--states"]);
        work();
        let port = run_self_connection(Ipv4Addr::LOCALHOST.into());
        daemon.expect(1, is_event("closed", net.inode));
        let (events, _) = daemon.stop();
        for event in events.iter().filter(|event| event["netns"] == net.inode) {
            assert_eq!(event["port"], port, "{variant:?} reported {event}");
        }
        assert_eq!(
            events.iter().filter(|event| is_event("established", net.inode)(event)).count(),
            1,
            "{variant:?}"
        );
    }
}

fn connect_and_close(server: SocketAddr) {
    let listener = TcpListener::bind(server).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    drop(client);
    drop(accepted);
}

#[test]
fn an_ordinary_loopback_connection_is_not_reported() {
    assert_only_self_connection_is_reported(|| {
        connect_and_close(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        connect_and_close(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0));
        connect_and_close(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
        connect_and_close(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0));
    });
}

#[test]
fn a_refused_connect_to_a_local_address_is_not_reported() {
    assert_only_self_connection_is_reported(|| {
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        TcpStream::connect(closed).unwrap_err();
    });
}

/// Connects `from`:P to `to`:P, with one port P on both sides.
fn connect_with_equal_ports(from: IpAddr, to: IpAddr) {
    let listener = TcpListener::bind(SocketAddr::new(to, 0)).unwrap();
    let server = listener.local_addr().unwrap();
    let client = socket(from);
    client.bind(&SocketAddr::new(from, server.port()).into()).unwrap();
    client.connect(&server.into()).unwrap();
    let (accepted, peer) = listener.accept().unwrap();
    assert_eq!(peer.port(), server.port());
    drop((client, accepted));
}

#[test]
fn equal_ports_of_two_ipv4_addresses_are_not_reported() {
    assert_only_self_connection_is_reported(|| {
        connect_with_equal_ports(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 0, 0, 2).into());
    });
}

#[test]
fn equal_ports_of_two_ipv6_addresses_are_not_reported() {
    // Both IPv4 fields of the tracepoint record are 0.0.0.0 here.
    let net = TestNetns::enter_new();
    let (one, other) = (Ipv6Addr::LOCALHOST, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    net.add_address_v6(other);
    assert_only_self_connection_is_reported_in(net, || {
        connect_with_equal_ports(one.into(), other.into());
        connect_with_equal_ports(other.into(), one.into());
    });
}

#[test]
fn equal_ports_of_two_v4_mapped_addresses_are_not_reported() {
    let mapped = |last| Ipv4Addr::new(127, 0, 0, last).to_ipv6_mapped();
    assert_only_self_connection_is_reported(|| connect_with_equal_ports(mapped(1).into(), mapped(2).into()));
}

#[test]
fn a_listen_on_an_unbound_socket_is_not_reported() {
    // All its ports and addresses are zero, and so equal.
    assert_only_self_connection_is_reported(|| {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let server = Socket::new(domain, Type::STREAM, None).unwrap();
            server.listen(1).unwrap();
            drop(server);
        }
    });
}

#[test]
fn a_udp_datagram_to_the_same_socket_is_not_reported() {
    assert_only_self_connection_is_reported(|| {
        let own = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        own.connect(own.local_addr().unwrap()).unwrap();
        own.send(b"data for oneself").unwrap();
        let mut received = [0; 32];
        assert_eq!(own.recv(&mut received).unwrap(), 16);
    });
}
