//! Reads the kernel's settings for local ports in the network namespace of the calling thread.

use std::{
    fs::File,
    io::{self, Read as _},
};

use anyhow::{Context as _, Result};

use super::LocalPorts;

/// The range of ports from which the kernel chooses source ports. Each network namespace has its own.
pub const RANGE_KEY: &str = "net.ipv4.ip_local_port_range";
/// The ports that the kernel must not choose. Each network namespace has its own list.
pub const RESERVED_KEY: &str = "net.ipv4.ip_local_reserved_ports";

/// Reads the range, the reserved ports, and the step width if the kernel has one.
///
/// # Errors
/// If `/proc/sys/net` cannot be read or its values cannot be parsed.
pub fn local_ports() -> Result<LocalPorts> {
    let path = |name: &str| format!("/proc/sys/net/ipv4/{name}");
    let read = |name: &str| {
        let path = path(name);
        read_once(&path).with_context(|| format!("cannot read {path}"))
    };
    let mut ports = LocalPorts::parse(&read("ip_local_port_range")?, &read("ip_local_reserved_ports")?)?;
    // Only newer kernels have this setting, for example v7.3.
    let step_width = read_once(&path("ip_local_port_step_width")).ok();
    ports.step_width = step_width.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Ok(ports)
}

/// Reads a file with one read call. A second read of `ip_local_reserved_ports` returns nothing, wherever the
/// first one stopped, and `fs::read_to_string` begins with a small read. The buffer holds 65,536 ports with
/// at most six characters each.
fn read_once(path: &str) -> io::Result<String> {
    let mut text = vec![0; 6 << 16];
    let length = File::open(path)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
