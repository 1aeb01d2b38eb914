//! The accidental self-connection: a client connects to a closed port of the ephemeral range until the kernel
//! chooses that port as the source port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::support::{
    client::{assert_opened_by_this_thread, connect_until_self, socket},
    daemon::{TestDaemon, is_event, lossless_variants},
    netns::TestNetns,
    retries::{PREEMPTED, for_each_variant_retrying},
};

/// The range is so small that a port with the parity of its low end is hit within some hundred attempts.
const PORT_RANGE: &str = "40000 40199";
const MAX_ATTEMPTS: usize = 20_000;

#[test]
fn a_port_chosen_by_connect_is_ephemeral_and_has_its_opener() {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    for_each_variant_retrying(PREEMPTED, |variant| {
        for (address, port) in
            [(IpAddr::from(Ipv4Addr::LOCALHOST), 40_100), (Ipv6Addr::LOCALHOST.into(), 40_102)]
        {
            let daemon = TestDaemon::shared(variant, &[]);
            let target = SocketAddr::new(address, port);
            let connection =
                connect_until_self(target, MAX_ATTEMPTS).expect("an even port of the range is hit");
            // No TIME_WAIT, which would block this port in the next round.
            connection.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            drop(connection);
            let (established, _) = daemon.only_pair(net.inode)?;
            assert_opened_by_this_thread(&established);
            assert_eq!(established["cause"], "ephemeral", "{variant:?}");
            assert_eq!(established["port"], port);
            assert_eq!(established["addr"], address.to_string());
        }
        Ok(())
    });
}

#[test]
fn a_client_that_retries_on_one_socket_is_named_as_opener() {
    // After a refused connect inet_sport still has the source port of that attempt.
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", PORT_RANGE);
    let target = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 40_104);
    for variant in lossless_variants() {
        let mut daemon = TestDaemon::shared(&variant, &[]);
        let connection = socket(target.ip());
        (0..MAX_ATTEMPTS)
            .find(|_| connection.connect(&target.into()).is_ok())
            .expect("an even port of the range is hit");
        connection.set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(connection);
        let established = daemon.expect(1, is_event("established", net.inode)).remove(0);
        assert_opened_by_this_thread(&established);
        assert_eq!(established["cause"], "ephemeral", "{variant:?}: {established}");
        daemon.expect(1, is_event("closed", net.inode));
        daemon.stop();
    }
}
