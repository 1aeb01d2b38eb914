//! The address to connect to: its notation, and the check that it is an address of this host.
//!
//! A SYN from an address to itself must never leave the host, so this check comes before any connect.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr, SocketAddrV6},
};

use anyhow::{Context, Result, bail};
use rustix::net::{AddressFamily, SocketType, netdevice::name_to_index, socket};

use crate::system::route;

/// Parses a literal address, optionally with `%INTERFACE`. The port of the result is 0.
pub(super) fn parse(text: &str) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let (ip, interface) = bare.split_once('%').map_or((bare, None), |(ip, name)| (ip, Some(name)));
    if ip.parse::<u16>().is_ok() {
        return Err(format!("the port follows the address: 127.0.0.1 {ip}"));
    }
    let ip = ip.parse().map_err(|_| {
        "not a numeric IPv4 or IPv6 address such as 127.0.0.1, ::1 or fe80::1%eth0".to_owned()
    })?;
    match (ip, interface) {
        (IpAddr::V6(ip), Some(name)) if ip.is_unicast_link_local() => {
            Ok(SocketAddrV6::new(ip, 0, 0, interface_index(name)?).into())
        }
        (IpAddr::V6(ip), None) if ip.is_unicast_link_local() => {
            Err(format!("a link-local address needs its interface, as in {ip}%eth0: see `ip address`"))
        }
        (_, Some(_)) => Err("only a link-local address (fe80::…) takes an %INTERFACE".to_owned()),
        (ip, None) => Ok(SocketAddr::new(ip, 0)),
    }
}

/// The index of an interface in this network namespace. The index itself is accepted as well.
fn interface_index(name: &str) -> Result<u32, String> {
    let by_name = || name_to_index(socket(AddressFamily::INET6, SocketType::DGRAM, None)?, name);
    match name.parse() {
        Ok(index @ 1..) => Ok(index),
        _ => by_name().map_err(|_| format!("no interface {name:?} here: `ip link` lists the interfaces")),
    }
}

/// Checks that the address belongs to this host, in the network namespace of this process.
pub(super) fn check_local(address: SocketAddr) -> Result<()> {
    let ip = address.ip();
    let is_loopback = ip.to_canonical().is_loopback();
    if ip.is_unspecified() {
        bail!("{ip} stands for every address: use one address of this host, such as 127.0.0.1 or ::1");
    }
    match route::bind(address) {
        Ok(()) => {}
        // The address is local: bind() fails only because all ports are reserved or taken.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && is_loopback => {
            bail!("{ip} is not up in this network namespace: run: ip link set lo up");
        }
        Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {
            bail!("{ip} is not an address of this host: `ip address` lists the addresses of this host");
        }
        Err(error) => return Err(error).context(format!("cannot use {ip}")),
    }
    if ip.to_canonical().is_multicast() {
        bail!("{ip} is a multicast address: TCP needs a unicast address of this host");
    }
    if nonlocal_bind_is_enabled(ip) {
        // The kernel chooses only local addresses as source. All of 127.0.0.0/8 is local, whatever source the
        // kernel chooses.
        let source = source(address)?;
        if source != ip && !(is_loopback && source.to_canonical().is_loopback()) {
            bail!(
                "{ip} is not a known address of this host, and bind() proves nothing while ip_nonlocal_bind is set: \
                 use an address that the host connects from, such as 127.0.0.1"
            );
        }
    }
    Ok(())
}

/// The source address that the kernel chooses for an unbound `connect()` to this address.
pub(super) fn source(address: SocketAddr) -> Result<IpAddr> {
    route::source(address).with_context(|| format!("no route to {}", address.ip()))
}

/// True if `ip_nonlocal_bind` is set. Then a successful `bind()` does not prove that the address is local.
fn nonlocal_bind_is_enabled(ip: IpAddr) -> bool {
    let family = if ip.to_canonical().is_ipv4() { "ipv4" } else { "ipv6" };
    fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind")).is_ok_and(|set| set.trim() != "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_literal_with_an_optional_interface() {
        for (text, want) in [
            ("127.0.0.1", Ok("127.0.0.1:0")),
            ("::1", Ok("[::1]:0")),
            ("[::1]", Ok("[::1]:0")),
            ("::ffff:127.0.0.1", Ok("[::ffff:127.0.0.1]:0")),
            ("[fe80::1%2]", Ok("[fe80::1%2]:0")),
            ("fe80::1", Err("as in fe80::1%eth0")),
            ("fe80::1%", Err("no interface \"\"")),
            ("fe80::1%no-such-one", Err("no interface \"no-such-one\"")),
            ("127.0.0.1%lo", Err("only a link-local address")),
            ("::1%lo", Err("only a link-local address")),
            ("localhost", Err("not a numeric")),
            ("127.0.0.1:80", Err("not a numeric")),
            ("", Err("not a numeric")),
            ("55555", Err("the port follows the address: 127.0.0.1 55555")),
        ] {
            match (parse(text), want) {
                (Ok(address), Ok(want)) => assert_eq!(address.to_string(), want, "{text:?}"),
                (Err(why), Err(want)) => assert!(why.contains(want), "{text:?}: {why}"),
                (got, _) => panic!("{text:?}: {got:?}"),
            }
        }
        let by_name = parse("fe80::1%lo");
        assert_eq!(by_name, parse("fe80::1%1"), "lo has the index 1 in every network namespace");
    }

    #[test]
    fn only_an_address_of_this_host_passes() {
        assert!(check_local(parse("127.0.0.1").unwrap()).is_ok());
        for foreign in ["198.51.100.7", "0.0.0.0", "::", "2001:db8::7", "224.0.0.1", "fe80::dead:beef%1"] {
            assert!(check_local(parse(foreign).unwrap()).is_err(), "{foreign}");
        }
    }
}
