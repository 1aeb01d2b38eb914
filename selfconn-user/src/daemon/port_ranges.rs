//! The worker that reads the local port range of a network namespace. The worker that reads the socket table
//! can be busy for longer than the report of a port at risk may take, so this is a separate thread.

use std::{collections::HashMap, io};

use crate::{
    ports::{LocalPorts, sysctl},
    sockets::{self, NetnsId},
    system::{capabilities, worker::Worker},
};

/// The local ports of each namespace, or the reason why they are unknown.
pub(super) type PortRangeResponse = HashMap<NetnsId, Result<LocalPorts, String>>;

/// Network namespaces, each with a process that may be in it.
type PortRangeRequest = HashMap<NetnsId, u32>;

pub(super) type PortRangeWorker = Worker<PortRangeRequest, PortRangeResponse>;

pub(super) fn start() -> io::Result<PortRangeWorker> {
    Worker::start("ranges", capabilities::PORT_RANGE_WORKER, |request: PortRangeRequest| {
        request.into_iter().map(read).collect()
    })
}

fn read((netns, hint): (NetnsId, u32)) -> (NetnsId, Result<LocalPorts, String>) {
    let ports = || sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")));
    (netns, sockets::run_in_namespace(netns, &[hint], ports).map_err(|error| error.to_string()))
}
