//! Where a socket is: one type for the programs, the records and user space.

use core::net::{IpAddr, Ipv6Addr};

use zerocopy::{FromBytes, Immutable, IntoBytes, transmute};

use super::tcp::family;

/// An address, a port, a bound device and a network namespace: where a self-connection is, where a connection
/// attempt goes, or what a `bind()` requests. Two sockets can have equal addresses and ports if they are bound to
/// different devices (`inet_match`, include/net/inet_hashtables.h at v6.12).
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable)]
pub struct Endpoint {
    /// The address, network byte order; IPv4 as v4-mapped. The source and the destination of a self-connection
    /// are equal.
    pub addr: [u32; 4],
    /// Cookie of the network namespace, which identifies it until the next boot. Before v5.14, where user space
    /// can't ask for it, a [random number](hashed_netns) of the namespace instead. 0: unknown.
    pub netns_cookie: u64,
    /// Inode of the network namespace. The kernel gives it to another namespace when this one has ended. 0:
    /// unknown.
    pub netns: u32,
    /// The device that the socket is bound to (`sk_bound_dev_if`): by SO_BINDTODEVICE, by a VRF, or because the
    /// address is link-local. 0: none.
    pub ifindex: u32,
    /// The port, host byte order. Of a connection attempt: the destination port.
    pub port: u16,
    /// One of [`family`]: the family of the socket. 0: either.
    pub family: u16,
    /// Always zero.
    pub padding: u32,
}

impl Endpoint {
    /// Nothing is known.
    pub const UNKNOWN: Self =
        Self { addr: [0; 4], netns_cookie: 0, netns: 0, ifindex: 0, port: 0, family: 0, padding: 0 };

    /// An endpoint without a device, in the namespace with this inode. A v4-mapped address and the same IPv4
    /// address differ only in `is_ipv6`.
    #[must_use]
    pub fn new(netns: u32, ip: IpAddr, port: u16, is_ipv6: bool) -> Self {
        let octets = match ip {
            IpAddr::V4(ip) => ip.to_ipv6_mapped().octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        let family = if is_ipv6 { family::INET6 } else { family::INET };
        Self { addr: transmute!(octets), netns, port, family: family.into(), ..Self::UNKNOWN }
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

    /// The device that the socket is bound to. `None`: none.
    #[must_use]
    pub fn device(&self) -> Option<u32> {
        (self.ifindex != 0).then_some(self.ifindex)
    }

    /// True if the address is an IPv6 address of a link. Such a socket is always bound to a device.
    #[must_use]
    pub fn is_link_local(&self) -> bool {
        matches!(self.ip(), IpAddr::V6(ip) if ip.is_unicast_link_local())
    }

    /// True if both are in the same network namespace. If the cookie of one of them is unknown, or only
    /// [random](hashed_netns), the inodes decide.
    #[must_use]
    pub const fn is_in_netns_of(&self, other: &Self) -> bool {
        let (one, two) = (self.netns_cookie, other.netns_cookie);
        let are_comparable = one != 0 && two != 0 && is_hashed(one) == is_hashed(two);
        self.netns == other.netns && (!are_comparable || one == two)
    }

    /// The key of this endpoint among sockets from the kernel's socket table: for either family, because an IPv4
    /// socket and an IPv6 socket with a v4-mapped address can't have the same endpoint at the same time, and
    /// without a number that only the programs know.
    #[must_use]
    pub const fn table_key(&self) -> Self {
        let netns_cookie = if is_hashed(self.netns_cookie) { 0 } else { self.netns_cookie };
        Self { netns_cookie, ..self.any_family() }
    }

    /// As [`Self::table_key`], in a table that has no devices, such as that of procfs.
    #[must_use]
    pub const fn deviceless_key(&self) -> Self {
        Self { ifindex: 0, ..self.table_key() }
    }

    /// The same address, port and namespace for sockets of either family.
    #[inline(always)]
    #[must_use]
    pub const fn any_family(&self) -> Self {
        Self { family: 0, ..*self }
    }
}

/// What [`Endpoint::netns_cookie`] is on a kernel whose cookies user space can't ask for: the random number that the
/// kernel mixes into the hashes of this namespace (`net->hash_mix`, `setup_net`, net/core/net_namespace.c at v5.10).
#[inline(always)]
#[must_use]
pub const fn hashed_netns(hash_mix: u32) -> u64 {
    HASHED | hash_mix as u64
}

/// The upper half of [`hashed_netns`]. Cookies count up from 1, and down from 2^64 if an interrupt asks for one
/// (`gen_cookie_next`, include/linux/cookie.h at v5.14).
const HASHED: u64 = 0x4000_0000 << 32;

const fn is_hashed(netns_cookie: u64) -> bool {
    netns_cookie >> 32 == HASHED >> 32
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
        let at = |netns, netns_cookie| Endpoint { netns, netns_cookie, ..Endpoint::UNKNOWN };
        for (one, two, is_same) in [
            (at(1, 5), at(1, 5), true),
            // Another namespace with the inode of one that has ended.
            (at(1, 5), at(1, 6), false),
            (at(1, hashed_netns(5)), at(1, hashed_netns(6)), false),
            (at(1, 0), at(1, hashed_netns(6)), true),
            (at(1, 5), at(1, 0), true),
            (at(1, 0), at(2, 0), false),
        ] {
            assert_eq!(
                (one.is_in_netns_of(&two), two.is_in_netns_of(&one)),
                (is_same, is_same),
                "{one:?} {two:?}"
            );
        }
        assert_eq!(at(1, hashed_netns(5)).table_key(), at(1, 0));
        assert_eq!(at(1, 5).table_key(), at(1, 5));
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(Endpoint::new(7, mapped, 1, true), Endpoint::new(7, mapped.to_canonical(), 1, true));
    }
}
