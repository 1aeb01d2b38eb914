//! What all events need: the look-ups of processes, what is to be reported, and the outputs.

use std::collections::HashMap;

use selfconn_ebpf::{Owner, guard::Prevention};

use super::blocked_event::PendingBlocked;
use crate::{
    budget::owner_of_user,
    detect::{connection::Connection, port_risk::PortRiskEvent},
    lookup::{LookupTarget, Lookups},
    output::Outputs,
    system::{
        cgroup::WatchedGroup,
        process::{Attribution, Holder, ObservedTask, Subject},
    },
};

/// The way of events out of the daemon.
pub(super) struct Reporting {
    /// Identifies this run in every `id`.
    pub(super) run_id: u64,
    pub(super) lookups: Lookups<Waiter>,
    pub(super) reported: Reported,
    pub(super) out: Outputs,
    /// The events of ports at risk that follow one whose process is being looked up, by the number of the risk, with
    /// their times. So the end of a risk does not come before its beginning.
    pub(super) following_port_risks: HashMap<u64, Vec<(PortRiskEvent, u64)>>,
}

/// What is reported.
pub(super) struct Reported {
    /// Every state change, too.
    pub(super) states: bool,
    /// Only the processes of this control group. `None`: all.
    pub(super) group: Option<WatchedGroup>,
}

/// What waits for a look-up.
pub(super) enum Waiter {
    /// The events of a connection that a probe reported.
    Connection(u64),
    /// What is known of a connection that a snapshot listed, and its events, if they wait for this process.
    Listed(u64, Subject),
    Blocked(Box<PendingBlocked>),
    PortRisk(Box<PortRiskEvent>, u64),
    /// A connect to itself that the guard refused, and how many there were.
    Prevented(Box<Prevention>, u64),
}

impl Reporting {
    pub(super) fn new(lookups: Lookups<Waiter>, reported: Reported, out: Outputs) -> Self {
        Self { run_id: out.run(), lookups, reported, out, following_port_risks: HashMap::new() }
    }

    /// False: only one control group's processes are reported, and the connection is of another one.
    pub(super) fn is_reported(&self, connection: &Connection, attribution: &Attribution) -> bool {
        self.reported.group.as_ref().is_none_or(|watched| match connection.opener {
            Some(opener) => opener.owner.cgroup == watched.id,
            None => attribution.process.cgroup.as_ref().is_some_and(|path| watched.contains(path)),
        })
    }

    /// As [`Self::is_reported`], of what this owner did.
    pub(super) fn is_of_reported(&self, owner: &Owner) -> bool {
        self.reported.group.as_ref().is_none_or(|watched| owner.cgroup == watched.id)
    }

    /// If stdout is filling, waits for its reader.
    pub(super) async fn make_room(&mut self) {
        if self.out.is_filling() {
            // The run ends anyway if it is closed.
            let _ = self.out.make_room().await;
        }
    }
}

/// The process that opened a connection. `None`: it is unknown.
pub(super) fn opener_target(connection: &Connection) -> Option<LookupTarget> {
    let opener = connection.opener?;
    Some(LookupTarget::Observed(ObservedTask::from_opener(&opener), opener.owner))
}

/// The process that holds the socket of a connection. `None`: it has exited.
pub(super) fn holder_target(holder: &Holder, of: &Connection) -> Option<LookupTarget> {
    let owner = of.opener.map_or_else(|| owner_of_user(of.uid), |opener| opener.owner);
    holder.start_ticks.map(|start_ticks| LookupTarget::Holder { pid: holder.pid, start_ticks, owner })
}
