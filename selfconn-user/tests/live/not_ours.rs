//! What must not be reported. Each test makes one real self-connection at the end, so that silence is not blindness.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use socket2::{Domain, Socket, Type};

use crate::{
    client::{socket, talk_to_self},
    daemon::{Daemon, of, variants},
    net::Net,
};

/// Does `work` and then connects to itself; nothing but the latter may be reported.
fn only_the_last_is_reported(work: impl Fn()) {
    only_the_last_is_reported_in(Net::private(), work);
}

fn only_the_last_is_reported_in(net: Net, work: impl Fn()) {
    for variant in variants() {
        let mut daemon = Daemon::shared(&variant, &["--states"]);
        work();
        let port = talk_to_self(Ipv4Addr::LOCALHOST.into());
        daemon.expect(1, of("closed", net.inode));
        let (events, _) = daemon.stop();
        for event in events.iter().filter(|event| event["netns"] == net.inode) {
            assert_eq!(event["port"], port, "{variant:?} reported {event}");
        }
        assert_eq!(
            events.iter().filter(|event| of("established", net.inode)(event)).count(),
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
fn an_ordinary_loopback_connection() {
    only_the_last_is_reported(|| {
        connect_and_close(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0));
        connect_and_close(SocketAddr::new(Ipv6Addr::LOCALHOST.into(), 0));
        connect_and_close(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), 0));
        connect_and_close(SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), 0));
    });
}

#[test]
fn a_refused_dial_to_ones_own_address() {
    only_the_last_is_reported(|| {
        let closed = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        TcpStream::connect(closed).unwrap_err();
    });
}

/// Connects `from`:P to `to`:P, with one port P on both sides.
fn equal_ports(from: IpAddr, to: IpAddr) {
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
fn equal_ports_of_two_ipv4_addresses() {
    only_the_last_is_reported(|| equal_ports(Ipv4Addr::LOCALHOST.into(), Ipv4Addr::new(127, 0, 0, 2).into()));
}

#[test]
fn equal_ports_of_two_ipv6_addresses() {
    // Both v4 fields of the tracepoint's record are 0.0.0.0 here.
    let net = Net::private();
    let (one, other) = (Ipv6Addr::LOCALHOST, Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
    net.add_address_v6(other);
    only_the_last_is_reported_in(net, || {
        equal_ports(one.into(), other.into());
        equal_ports(other.into(), one.into());
    });
}

#[test]
fn equal_ports_of_two_mapped_addresses() {
    let mapped = |last| Ipv4Addr::new(127, 0, 0, last).to_ipv6_mapped();
    only_the_last_is_reported(|| equal_ports(mapped(1).into(), mapped(2).into()));
}

#[test]
fn a_listen_on_an_unbound_socket() {
    // Its ports and addresses are all zero, and so equal.
    only_the_last_is_reported(|| {
        for domain in [Domain::IPV4, Domain::IPV6] {
            let server = Socket::new(domain, Type::STREAM, None).unwrap();
            server.listen(1).unwrap();
            drop(server);
        }
    });
}

#[test]
fn a_datagram_to_oneself() {
    only_the_last_is_reported(|| {
        let own = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        own.connect(own.local_addr().unwrap()).unwrap();
        own.send(b"words to oneself").unwrap();
        let mut heard = [0; 32];
        assert_eq!(own.recv(&mut heard).unwrap(), 16);
    });
}
