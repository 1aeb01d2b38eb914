//! The accident: a client that dials a closed port of the range until the kernel picks that port as its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::{
    client::{assert_opened_here, dial_until_self, socket},
    daemon::{Daemon, for_each_variant, of, steady_variants},
    net::Net,
};

/// So small a range that a port of its low end's parity is hit within some hundred dials.
const RANGE: &str = "40000 40199";
const LIMIT: usize = 20_000;

#[test]
fn a_port_that_connect_chose_is_ephemeral_and_has_its_dialler() {
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    for_each_variant(|variant| {
        for (address, port) in
            [(IpAddr::from(Ipv4Addr::LOCALHOST), 40_100), (Ipv6Addr::LOCALHOST.into(), 40_102)]
        {
            let mut daemon = Daemon::shared(variant, &[]);
            let target = SocketAddr::new(address, port);
            let connection = dial_until_self(target, LIMIT).expect("an even port of the range is hit");
            // No TIME_WAIT, which would keep the next round from this port.
            connection.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            drop(connection);
            daemon.expect(1, of("closed", net.inode));
            let (events, _) = daemon.stop();
            let established: Vec<_> =
                events.iter().filter(|event| of("established", net.inode)(event)).collect();
            assert_eq!(established.len(), 1, "{variant:?}: {events:#?}");
            assert_opened_here(established[0]);
            assert_eq!(established[0]["cause"], "ephemeral", "{variant:?}");
            assert_eq!(established[0]["port"], port);
            assert_eq!(established[0]["addr"], address.to_string());
        }
    });
}

#[test]
fn a_client_that_dials_again_on_one_socket_is_known_too() {
    // After a refused dial inet_sport still has the last attempt's port.
    let net = Net::private();
    net.sysctl("ip_local_port_range", RANGE);
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 40_104);
    for variant in steady_variants() {
        let mut daemon = Daemon::shared(&variant, &[]);
        let connection = socket(target.ip());
        (0..LIMIT)
            .find(|_| connection.connect(&target.into()).is_ok())
            .expect("an even port of the range is hit");
        connection.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(connection);
        let established = daemon.expect(1, of("established", net.inode)).remove(0);
        assert_opened_here(&established);
        assert_eq!(established["cause"], "ephemeral", "{variant:?}: {established}");
        daemon.expect(1, of("closed", net.inode));
        daemon.stop();
    }
}
