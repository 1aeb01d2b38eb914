//! The kernel's rules of which socket may not bind a port because of another one: `inet_bind_conflict` and
//! `inet_rcv_saddr_equal` in net/ipv4/inet_connection_sock.c, the same at v5.10 and v6.12 for a bind that names its
//! port. A live test compares them with the kernel's answers.

use std::net::IpAddr;

use selfconn_ebpf::{BindOptions, Endpoint};

/// A socket that has a port, or requests it.
#[derive(Clone, Copy, Debug)]
pub struct BindParty {
    /// Its address and port. An unspecified address stands for all addresses.
    pub endpoint: Endpoint,
    pub options: BindOptions,
    /// The user that owns it. `None`: it does not matter (TIME_WAIT), or it is unknown.
    pub uid: Option<u32>,
}

/// What the kernel takes an address of a socket for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of an IPv4 socket, or v4-mapped.
    V4,
    /// `::`.
    AnyV6,
    /// Any other address of an IPv6 socket.
    V6,
}

/// True if the kernel refuses `requested` because a self-connection is `held`. If an option decides that is not known
/// of `held`, it counts as not set, but for IPV6_V6ONLY: then no refusal is proven.
#[must_use]
pub fn refuses(held: &BindParty, requested: &BindParty) -> bool {
    held.endpoint.is_in_netns_of(&requested.endpoint)
        && held.endpoint.port == requested.endpoint.port
        && is_same_device(held, requested)
        && !shares(held, requested)
        && overlaps(held, requested)
}

/// Sockets that are bound to different devices don't compete.
fn is_same_device(held: &BindParty, requested: &BindParty) -> bool {
    match (held.endpoint.device(), requested.endpoint.device()) {
        (Some(held), Some(requested)) => held == requested,
        _ => true,
    }
}

/// True if both have SO_REUSEADDR (the self-connection does not listen), or both have SO_REUSEPORT and the same
/// owner. An entry in TIME_WAIT has no owner.
fn shares(held: &BindParty, requested: &BindParty) -> bool {
    let share_port = held.options.has_reuseport() && requested.options.has_reuseport();
    held.options.has_reuse() && requested.options.has_reuse()
        || share_port && held.uid.is_none_or(|uid| Some(uid) == requested.uid)
}

/// True if both can be reached at one address.
fn overlaps(held: &BindParty, requested: &BindParty) -> bool {
    let is_held_v6_proven_open = || held.options.is_ipv6only() == Some(false);
    match (kind(&held.endpoint), kind(&requested.endpoint)) {
        // An IPv6 socket with a v4-mapped address may have IPV6_V6ONLY only if it was set after bind().
        (Kind::V4, Kind::V4) => {
            (requested.endpoint.ip().is_unspecified() || held.endpoint.ip() == requested.endpoint.ip())
                && !(held.endpoint.is_ipv6() && held.options.is_ipv6only() == Some(true))
        }
        (Kind::V4, Kind::AnyV6) => requested.options.is_ipv6only() == Some(false),
        (Kind::V4, Kind::V6) => false,
        // For IPv4 sockets, the kernel takes an IPv6 address for 127.0.0.6 (`LOOPBACK4_IPV6`), unless the socket has
        // IPV6_V6ONLY. So does 0.0.0.0, but not ::ffff:0.0.0.0.
        (_, Kind::V4) => {
            !requested.endpoint.is_ipv6()
                && requested.endpoint.ip().is_unspecified()
                && is_held_v6_proven_open()
        }
        (_, Kind::AnyV6) => true,
        (_, Kind::V6) => held.endpoint.addr == requested.endpoint.addr,
    }
}

fn kind(endpoint: &Endpoint) -> Kind {
    match endpoint.ip() {
        IpAddr::V4(_) => Kind::V4,
        IpAddr::V6(ip) if ip.is_unspecified() => Kind::AnyV6,
        IpAddr::V6(_) => Kind::V6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: BindOptions = BindOptions::new(false, false, false);
    const REUSE: BindOptions = BindOptions::new(true, false, false);
    const REUSEPORT: BindOptions = BindOptions::new(false, true, false);
    const V6ONLY: BindOptions = BindOptions::new(false, false, true);

    /// `::ffff:a.b.c.d` is an address of an IPv6 socket.
    fn party(ip: &str, options: BindOptions) -> BindParty {
        let is_ipv6 = ip.contains(':');
        BindParty { endpoint: Endpoint::new(1, ip.parse().unwrap(), 80, is_ipv6), options, uid: Some(7) }
    }

    #[test]
    fn addresses_families_and_ipv6_v6only_decide_as_in_the_kernel() {
        const REQUESTED: [(&str, BindOptions); 9] = [
            ("0.0.0.0", PLAIN),
            ("127.0.0.1", PLAIN),
            ("127.0.0.2", PLAIN),
            ("::", PLAIN),
            ("::", V6ONLY),
            ("::1", V6ONLY),
            ("::2", V6ONLY),
            ("::ffff:127.0.0.1", PLAIN),
            ("::ffff:0.0.0.0", PLAIN),
        ];
        for (held, options, expected) in [
            ("127.0.0.1", PLAIN, "xx.x...xx"),
            // An IPv4 socket has no such option.
            ("127.0.0.1", BindOptions::UNKNOWN, "xx.x...xx"),
            ("::ffff:127.0.0.1", PLAIN, "xx.x...xx"),
            ("::ffff:127.0.0.1", V6ONLY, "...x....."),
            ("::1", PLAIN, "x..xxx..."),
            ("::1", V6ONLY, "...xxx..."),
            ("::1", BindOptions::UNKNOWN, "...xxx..."),
        ] {
            let held = party(held, options);
            let got: String = REQUESTED
                .iter()
                .map(|(ip, options)| if refuses(&held, &party(ip, *options)) { 'x' } else { '.' })
                .collect();
            assert_eq!(got, expected, "{held:?}");
        }
    }

    #[test]
    fn both_must_have_reuseaddr_or_reuseport_and_then_one_owner() {
        for (held, requested, refused) in [
            (PLAIN, PLAIN, true),
            (PLAIN, REUSE, true),
            (REUSE, PLAIN, true),
            (REUSE, REUSE, false),
            (REUSEPORT, REUSEPORT, false),
            (REUSEPORT, REUSE, true),
            (BindOptions::UNKNOWN, REUSE, true),
        ] {
            let (held, requested) = (party("127.0.0.1", held), party("0.0.0.0", requested));
            assert_eq!(refuses(&held, &requested), refused, "{held:?} {requested:?}");
        }
        let port = party("127.0.0.1", REUSEPORT);
        assert!(refuses(&port, &BindParty { uid: Some(8), ..port }), "another owner");
        assert!(!refuses(&BindParty { uid: None, ..port }, &BindParty { uid: Some(8), ..port }), "TIME_WAIT");
    }

    #[test]
    fn another_port_device_or_namespace_is_out_of_the_way() {
        let at = |change: fn(&mut Endpoint)| {
            let mut party = party("127.0.0.1", PLAIN);
            change(&mut party.endpoint);
            party
        };
        let (free, on_2) = (at(|_| ()), at(|endpoint| endpoint.ifindex = 2));
        for (held, requested, refused) in [
            (free, free, true),
            (free, on_2, true),
            (on_2, free, true),
            (on_2, on_2, true),
            (on_2, at(|endpoint| endpoint.ifindex = 3), false),
            (free, at(|endpoint| endpoint.port = 81), false),
            (free, at(|endpoint| endpoint.netns = 2), false),
        ] {
            assert_eq!(refuses(&held, &requested), refused, "{held:?} {requested:?}");
        }
    }
}
