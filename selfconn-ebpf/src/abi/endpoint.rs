//! Where a socket is: one type for the programs, the records and user space.

use core::net::{IpAddr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::tcp::family;

/// An address, a port and a network namespace: where a self-connection is, where a connection attempt goes, or
/// what a `bind()` requests.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
pub struct Endpoint {
    /// The address, network byte order; IPv4 as v4-mapped. The source and the destination of a self-connection
    /// are equal.
    pub addr: [u32; 4],
    /// Inode of the network namespace. 0: unknown.
    pub netns: u32,
    /// The port, host byte order. Of a connection attempt: the destination port.
    pub port: u16,
    /// One of [`family`]: the family of the socket. 0: either.
    pub family: u16,
}

impl Endpoint {
    /// `ip` of a v4-mapped address and of the same IPv4 address are equal; `is_ipv6` tells them apart.
    #[must_use]
    pub fn new(netns: u32, ip: IpAddr, port: u16, is_ipv6: bool) -> Self {
        let octets = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let family = if is_ipv6 { family::INET6 } else { family::INET };
        Self { addr: transmute!(octets), netns, port, family: family.into() }
    }

    /// The address. A v4-mapped address is an IPv4 address here.
    #[must_use]
    pub fn ip(&self) -> IpAddr {
        let octets: [u8; 16] = transmute!(self.addr);
        Ipv6Addr::from(octets).to_canonical()
    }

    /// True if the socket is an IPv6 socket, also with a v4-mapped address.
    #[must_use]
    pub const fn is_ipv6(&self) -> bool {
        self.family == family::INET6 as u16
    }

    /// Inode of the network namespace. `None`: unknown.
    #[must_use]
    pub fn known_netns(&self) -> Option<u32> {
        (self.netns != 0).then_some(self.netns)
    }

    /// True if the address is an IPv6 address of a link. Only such a socket has an interface.
    #[must_use]
    pub fn is_link_local(&self) -> bool {
        matches!(self.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local())
    }

    /// The same address, port and namespace for sockets of either family.
    #[inline(always)]
    #[must_use]
    pub const fn any_family(&self) -> Self {
        Self { family: 0, ..*self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_survives_the_conversion_and_families_are_distinguished() {
        for (text, is_ipv6) in [("127.0.0.1", false), ("127.0.0.1", true), ("::1", true), ("fe80::1", true)] {
            let ip: IpAddr = text.parse().unwrap();
            let endpoint = Endpoint::new(7, ip, 40_000, is_ipv6);
            assert_eq!((endpoint.ip(), endpoint.is_ipv6()), (ip, is_ipv6));
            assert_eq!(endpoint.any_family(), Endpoint::new(7, ip, 40_000, !is_ipv6).any_family());
        }
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(Endpoint::new(7, mapped, 1, true), Endpoint::new(7, mapped.to_canonical(), 1, true));
    }
}
