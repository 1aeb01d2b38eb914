//! Refused connects in a port range that is so wide that they hardly ever hit their own port.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use serde_json::Value;

use super::{
    client::{set_own_port_range, socket},
    daemon::is_event,
    netns::TestNetns,
};

/// The range is so wide that some hundred attempts hardly ever hit, whatever the range of the host is.
pub(crate) const WIDE_PORT_RANGE: &str = "32768 60999";

pub(crate) fn enter_wide_range_netns() -> TestNetns {
    let net = TestNetns::enter_new();
    net.set_sysctl("ip_local_port_range", WIDE_PORT_RANGE);
    net
}

pub(crate) fn at(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port)
}

/// Makes this many refused connects. In a wide range about one in a hundred runs hits itself; that connect is
/// repeated.
pub(crate) fn connect_refused(target: SocketAddr, count: usize) {
    connect_refused_from(target, count, None);
}

/// The same, by sockets with a port range of their own.
pub(crate) fn connect_refused_from(target: SocketAddr, count: usize, own_range: Option<(u16, u16)>) {
    let connect = || {
        let client = socket(target.ip());
        if let Some(range) = own_range {
            assert!(set_own_port_range(&client, range), "{}", io::Error::last_os_error());
        }
        client.connect(&target.into()).map(|()| client)
    };
    for _ in 0..count {
        while let Ok(hit) = connect() {
            hit.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

pub(crate) fn is_at_risk(port: u16, net: TestNetns) -> impl Fn(&Value) -> bool {
    move |event| is_event("at_risk", net.inode)(event) && event["port"] == port
}
