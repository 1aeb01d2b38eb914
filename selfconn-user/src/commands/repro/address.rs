//! The address to connect to: its notation, and the check that it is an address of this host.
//!
//! A SYN from an address to itself must never leave the host, so this check comes before any connect.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::{Serialize, Serializer};
use socket2::{Domain, Socket, Type};

/// The address of the command line: a literal, optionally with `%INTERFACE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddressArg {
    ip: IpAddr,
    zone: Option<String>,
}

/// A checked address of this host, with the index of its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocalAddr {
    ip: IpAddr,
    scope_id: u32,
}

/// An endpoint of a connection, printed as `ADDR:PORT` in text and in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct EndpointText(pub(super) SocketAddr);

impl FromStr for AddressArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
        let (ip, zone) = match bare.split_once('%') {
            Some((ip, zone)) => (ip, Some(zone)),
            None => (bare, None),
        };
        if ip.parse::<u16>().is_ok() {
            return Err(format!("the port follows the address: 127.0.0.1 {ip}"));
        }
        let ip: IpAddr = ip.parse().map_err(|_| {
            "not a numeric IPv4 or IPv6 address such as 127.0.0.1, ::1 or fe80::1%eth0".to_owned()
        })?;
        match (ip, zone) {
            (IpAddr::V4(_), Some(_)) => Err("only an IPv6 address takes an %INTERFACE".to_owned()),
            (_, Some("")) => Err("the name of the interface is missing after %".to_owned()),
            (ip, zone) => Ok(Self { ip, zone: zone.map(str::to_owned) }),
        }
    }
}

impl fmt::Display for AddressArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.zone {
            Some(zone) => write!(f, "{}%{zone}", self.ip),
            None => write!(f, "{}", self.ip),
        }
    }
}

impl fmt::Display for EndpointText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Serialize for EndpointText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl LocalAddr {
    /// This address with the given port.
    pub(super) fn at(self, port: u16) -> SocketAddr {
        match self.ip {
            IpAddr::V4(ip) => (ip, port).into(),
            IpAddr::V6(ip) => SocketAddrV6::new(ip, port, 0, self.scope_id).into(),
        }
    }

    /// A new TCP socket of this address's family.
    pub(super) fn tcp_socket(self) -> Result<Socket> {
        self.socket(Type::STREAM).context("cannot create a TCP socket")
    }

    fn socket(self, kind: Type) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(self.at(0)), kind, None)?;
        if self.ip.is_ipv6() {
            // An IPv4-mapped address needs a dual-stack socket, also if net.ipv6.bindv6only is set.
            socket.set_only_v6(false)?;
        }
        Ok(socket)
    }

    /// The source address that the kernel chooses for an unbound `connect()` to this address. Connecting a
    /// UDP socket asks the routing table and sends no packet.
    pub(super) fn source(self) -> Result<IpAddr> {
        let connected_addr = || {
            let socket = self.socket(Type::DGRAM)?;
            socket.connect(&self.at(9).into())?;
            socket.local_addr()
        };
        let source = connected_addr().with_context(|| format!("no route to {self}"))?;
        Ok(source.as_socket().context("the kernel returned no source address")?.ip())
    }
}

impl fmt::Display for LocalAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip.fmt(f)
    }
}

/// Checks that the address belongs to this host, in the network namespace of this process.
pub(super) fn resolve_local(address: &AddressArg) -> Result<LocalAddr> {
    let ip = address.ip;
    if ip.is_unspecified() {
        bail!("{ip} stands for every address: use one address of this host, such as 127.0.0.1 or ::1");
    }
    let local = LocalAddr { ip, scope_id: scope_id(address)? };
    let bound = local.socket(Type::DGRAM).and_then(|socket| socket.bind(&local.at(0).into()));
    match bound {
        Ok(()) => {}
        // The address is local: bind() fails only because all ports are reserved or taken.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && ip.to_canonical().is_loopback() => {
            bail!("{address} is not up in this network namespace: run: ip link set lo up");
        }
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            bail!("{address} is not an address of this host: `ip address` lists the addresses of this host");
        }
        Err(error) => return Err(error).context(format!("cannot use {address}")),
    }
    if ip.to_canonical().is_multicast() {
        bail!("{address} is a multicast address: TCP needs a unicast address of this host");
    }
    if nonlocal_bind_is_enabled(ip) && !is_certainly_local(ip, local.source()?) {
        bail!(
            "{address} is not a known address of this host, and bind() proves nothing while ip_nonlocal_bind is set: \
             use an address that the host connects from, such as 127.0.0.1"
        );
    }
    Ok(local)
}

/// True if `ip_nonlocal_bind` is set. Then a successful `bind()` does not prove that the address is local.
fn nonlocal_bind_is_enabled(ip: IpAddr) -> bool {
    let family = if ip.to_canonical().is_ipv4() { "ipv4" } else { "ipv6" };
    fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind")).is_ok_and(|set| set.trim() != "0")
}

/// The kernel chooses only local addresses as source. All of 127.0.0.0/8 is local, whatever source the kernel
/// chooses.
fn is_certainly_local(ip: IpAddr, source: IpAddr) -> bool {
    source == ip || (source.to_canonical().is_loopback() && ip.to_canonical().is_loopback())
}

fn scope_id(address: &AddressArg) -> Result<u32> {
    let IpAddr::V6(ip) = address.ip else { return Ok(0) };
    if !ip.is_unicast_link_local() {
        return match &address.zone {
            None => Ok(0),
            Some(_) => bail!("{address}: only a link-local address (fe80::…) takes an %INTERFACE"),
        };
    }
    // /proc/net shows this network namespace; /sys can show another one.
    let table = fs::read_to_string("/proc/net/if_inet6").context("cannot read /proc/net/if_inet6")?;
    let interfaces: Vec<_> = table.lines().filter_map(parse_interface).filter(|row| row.0 == ip).collect();
    let names = || interfaces.iter().map(|row| format!("{ip}%{}", row.2)).collect::<Vec<_>>().join(" or ");
    match (&address.zone, interfaces.is_empty()) {
        (_, true) => {
            bail!("{address} is not an address of this host: `ip address` lists the addresses of this host")
        }
        (None, false) => bail!("{ip} is link-local and needs an interface: {}", names()),
        (Some(zone), false) => interfaces
            .iter()
            .find(|(_, index, name)| name == zone || zone.parse() == Ok(*index))
            .map(|row| row.1)
            .with_context(|| format!("{ip} is not on the interface {zone}: {}", names())),
    }
}

/// Parses a line of `/proc/net/if_inet6` into address, interface index and interface name.
fn parse_interface(line: &str) -> Option<(Ipv6Addr, u32, &str)> {
    let mut words = line.split_ascii_whitespace();
    let ip = u128::from_str_radix(words.next()?, 16).ok()?.into();
    let index = u32::from_str_radix(words.next()?, 16).ok()?;
    Some((ip, index, words.nth(3)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_literal_with_an_optional_interface() {
        let rows = [
            ("127.0.0.1", Some("127.0.0.1")),
            ("::1", Some("::1")),
            ("[::1]", Some("::1")),
            ("::ffff:127.0.0.1", Some("::ffff:127.0.0.1")),
            ("fe80::1%eth0", Some("fe80::1%eth0")),
            ("[fe80::1%2]", Some("fe80::1%2")),
            ("fe80::1%", None),
            ("127.0.0.1%lo", None),
            ("localhost", None),
            ("55555", None),
            ("127.0.0.1:80", None),
            ("", None),
        ];
        for (text, want) in rows {
            let got = text.parse::<AddressArg>().ok().map(|address| address.to_string());
            assert_eq!(got.as_deref(), want, "{text:?}");
        }
    }

    #[test]
    fn a_port_in_place_of_the_address_is_an_error_with_a_hint() {
        assert_eq!(
            "55555".parse::<AddressArg>(),
            Err("the port follows the address: 127.0.0.1 55555".to_owned())
        );
    }

    #[test]
    fn an_interface_row_is_parsed_into_address_index_and_name() {
        let row = "fe8000000000000000fc00fffe000001 1f 40 20 80     eth0";
        assert_eq!(parse_interface(row), Some(("fe80::fc:ff:fe00:1".parse().unwrap(), 31, "eth0")));
        assert_eq!(parse_interface("fe80 04 40"), None);
    }

    #[test]
    fn loopback_is_local_and_a_documentation_address_is_not() {
        let resolve = |text: &str| resolve_local(&text.parse().unwrap());
        assert_eq!(resolve("127.0.0.1").unwrap().at(7), "127.0.0.1:7".parse().unwrap());
        for foreign in ["198.51.100.7", "0.0.0.0", "::", "2001:db8::7", "224.0.0.1", "fe80::dead:beef"] {
            assert!(resolve(foreign).is_err(), "{foreign}");
        }
    }

    #[test]
    fn an_address_that_the_host_connects_from_is_local() {
        let rows = [
            ("192.0.2.2", "192.0.2.2", true),
            ("127.0.0.2", "127.0.0.1", true),
            ("::ffff:127.0.0.2", "::ffff:127.0.0.1", true),
            ("198.51.100.7", "192.0.2.2", false),
        ];
        for (ip, source, want) in rows {
            assert_eq!(
                is_certainly_local(ip.parse().unwrap(), source.parse().unwrap()),
                want,
                "{ip} from {source}"
            );
        }
    }
}
