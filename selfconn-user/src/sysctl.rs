//! The kernel's settings for local ports, of the network namespace that the calling thread is in.

use std::{
    fs::File,
    io::{self, Read as _},
};

use anyhow::{Context as _, Result};

use crate::ports::LocalPorts;

/// Reads the range, the reserved ports, and the step width where the kernel has one.
///
/// # Errors
/// When `/proc/sys/net` is not there, or says what no kernel says.
pub fn local_ports() -> Result<LocalPorts> {
    let path = |name: &str| format!("/proc/sys/net/ipv4/{name}");
    let read = |name: &str| {
        let path = path(name);
        read(&path).with_context(|| format!("cannot read {path}"))
    };
    let mut ports = LocalPorts::parse(&read("ip_local_port_range")?, &read("ip_local_reserved_ports")?)?;
    // Newer kernels have it, v7.3 for one.
    let step_width = self::read(&path("ip_local_port_step_width")).ok();
    ports.step_width = step_width.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    Ok(ports)
}

/// One read: a second one of `ip_local_reserved_ports` finds nothing, wherever the first one stopped, and
/// `fs::read_to_string` begins with a small one. 65,536 ports, each with six characters at most, fit.
fn read(path: &str) -> io::Result<String> {
    let mut text = vec![0; 6 << 16];
    let length = File::open(path)?.read(&mut text)?;
    text.truncate(length);
    String::from_utf8(text).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
