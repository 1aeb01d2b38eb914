//! The worker that looks at ports in a network namespace: its local port range, and what has the ports. The worker
//! that reads the socket table can be busy for longer than the report of a port at risk may take, so this is a
//! separate thread.

use std::{collections::HashMap, io};

use selfconn_ebpf::Endpoint;

use crate::{
    ports::{LocalPorts, Reach, sysctl},
    sockets::{self, NetnsId, PortUse},
    system::{capabilities, worker::Worker},
};

/// What was seen in a namespace.
pub(super) struct NamespacePorts {
    pub(super) ports: LocalPorts,
    /// Of the requested ports that `connect()` can choose.
    pub(super) uses: HashMap<Endpoint, PortUse>,
}

/// The local ports of the namespace, or the reason why they are unknown.
pub(super) type PortRangeResponse = Result<NamespacePorts, String>;

/// Some ports in question in a network namespace.
pub(super) struct PortRangeRequest {
    pub(super) netns: NetnsId,
    /// A process that may be in the namespace.
    pub(super) hint: u32,
    pub(super) destinations: Vec<Endpoint>,
}

pub(super) type PortRangeWorker = Worker<PortRangeRequest, PortRangeResponse>;

pub(super) fn start() -> io::Result<PortRangeWorker> {
    Worker::start(
        "ranges",
        capabilities::PORT_RANGE_WORKER,
        |PortRangeRequest { netns, hint, destinations }| {
            read(netns, hint, &destinations).map_err(|error| error.to_string())
        },
    )
}

fn read(netns: NetnsId, hint: u32, destinations: &[Endpoint]) -> io::Result<NamespacePorts> {
    let look = || {
        let ports = sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let can_be_chosen =
            |destination: &&Endpoint| matches!(ports.reach(destination.port), Reach::First | Reach::Last);
        let destinations: Vec<Endpoint> = destinations.iter().filter(can_be_chosen).copied().collect();
        let uses = sockets::port_uses(&destinations).unwrap_or_else(|error| {
            log::info!("which sockets have the ports at risk is unknown: {error}");
            Vec::new()
        });
        Ok(NamespacePorts { ports, uses: destinations.into_iter().zip(uses).collect() })
    };
    sockets::run_in_namespace(netns, &[hint], look)
}
