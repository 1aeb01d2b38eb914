//! The worker that looks at ports in a network namespace: its local port range, what that means for the ports, and what
//! has them. The worker that reads the socket table can be busy for longer than the report of a port at risk may take,
//! so this is a separate thread.

use std::{cell::RefCell, collections::HashMap, io};

use selfconn_ebpf::Endpoint;

use crate::{
    detect::port_risk::{OddsCache, PortChoices, PortReach},
    ports::{Reach, sysctl},
    sockets::{self, NetnsId, PortUse},
    system::{capabilities, worker::Worker},
};

/// What was seen of a port.
pub(super) struct SeenPort {
    pub(super) reach: PortReach,
    /// `None`: unknown, or `connect()` can't choose the port.
    pub(super) port_use: Option<PortUse>,
}

/// All requested ports, or the reason why the local ports of the namespace are unknown.
pub(super) type PortRangeResponse = Result<HashMap<Endpoint, SeenPort>, String>;

/// Some ports in question in a network namespace.
pub(super) struct PortRangeRequest {
    pub(super) netns: NetnsId,
    /// A process that may be in the namespace.
    pub(super) hint: u32,
    pub(super) destinations: Vec<(Endpoint, PortChoices)>,
}

pub(super) type PortRangeWorker = Worker<PortRangeRequest, PortRangeResponse>;

pub(super) fn start() -> io::Result<PortRangeWorker> {
    let odds = RefCell::<OddsCache>::default();
    Worker::start("ranges", capabilities::PORT_RANGE_WORKER, move |request| {
        read(&request, &mut odds.borrow_mut()).map_err(|error| error.to_string())
    })
}

fn read(request: &PortRangeRequest, odds: &mut OddsCache) -> io::Result<HashMap<Endpoint, SeenPort>> {
    let PortRangeRequest { netns, hint, destinations } = request;
    let look = || {
        let ports = sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")))?;
        let can_be_chosen =
            |destination: &Endpoint| matches!(ports.reach(destination.port), Reach::First | Reach::Last);
        let to_look_at: Vec<Endpoint> =
            destinations.iter().map(|(destination, _)| *destination).filter(can_be_chosen).collect();
        let uses = sockets::port_uses(&to_look_at).unwrap_or_else(|error| {
            log::info!("which sockets have the ports at risk is unknown: {error}");
            Vec::new()
        });
        Ok((ports, to_look_at.into_iter().zip(uses).collect::<HashMap<_, _>>()))
    };
    let (ports, uses) = sockets::run_in_namespace(*netns, &[*hint], look)?;
    let seen = |(destination, choices): &(Endpoint, PortChoices)| {
        let port_use = uses.get(destination).copied();
        let reach = PortReach::of(*choices, &ports, destination.port, port_use, odds);
        (*destination, SeenPort { reach, port_use })
    };
    Ok(destinations.iter().map(seen).collect())
}
