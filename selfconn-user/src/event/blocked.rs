//! The event `blocked`: a server could not bind a port because a self-connection holds it.

use jiff::Timestamp;
use selfconn_ebpf::{bind_failure::BindFailure, state};
use serde::Serialize;

use super::{ConnectionFields, optional_rfc3339, process_name};
use crate::{
    detect::bind_conflict::{self, PortHolder, requested_addr},
    system::{clock::Offset, process::ProcessInfo},
};

/// `blocked`.
#[derive(Debug, Serialize)]
pub struct Blocked {
    /// Requested address. 0.0.0.0 or :: means any address.
    pub addr: String,
    /// Requested port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// The process that called bind(), in the initial pid namespace.
    pub pid: u32,
    /// Name of the process.
    pub comm: Option<String>,
    /// Real user id of the process.
    pub uid: u32,
    /// Path of the executable.
    pub exe: Option<String>,
    /// systemd unit of the process.
    pub unit: Option<String>,
    /// Id of the container.
    pub container: Option<String>,
    /// Number of times this bind has failed because of this self-connection.
    pub failures: u64,
    /// The self-connection that holds the port.
    pub holder: BlockingConnection,
}

/// The self-connection that holds the port. Fields without a comment have the same meaning as in
/// `established`.
#[derive(Debug, Serialize)]
pub struct BlockingConnection {
    /// Null if the connection ended before this run.
    pub id: Option<String>,
    pub cookie: Option<u64>,
    pub family: &'static str,
    pub addr: String,
    pub cause: Option<&'static str>,
    pub pid: Option<u32>,
    pub comm: Option<String>,
    pub exe: Option<String>,
    pub cmdline: Option<Vec<String>>,
    pub unit: Option<String>,
    pub container: Option<String>,
    pub owner: Option<&'static str>,
    /// `ESTABLISHED` if the connection is open, or `TIME_WAIT`.
    pub state: &'static str,
    /// Time since the connection became ESTABLISHED.
    pub held_for_ns: Option<u64>,
    /// Time at which TIME_WAIT ends.
    #[serde(serialize_with = "optional_rfc3339")]
    pub free_at: Option<Timestamp>,
}

impl Blocked {
    /// `connection` describes the self-connection that holds the port.
    #[must_use]
    pub fn new(
        failed: &BindFailure,
        process: &ProcessInfo,
        holder: &PortHolder<'_>,
        connection: ConnectionFields,
        clock: Offset,
    ) -> Self {
        let tracked = holder.connection();
        let (state, free_at) = match holder {
            PortHolder::Open(_) => (state::ESTABLISHED, None),
            PortHolder::TimeWait(bind_conflict::TimeWaitEntry { until_ns, .. }) => {
                (state::TIME_WAIT, Some(clock.wall(*until_ns)))
            }
        };
        Self {
            addr: requested_addr(failed).to_string(),
            port: failed.endpoint.port,
            netns: (failed.endpoint.netns != 0).then_some(failed.endpoint.netns),
            pid: failed.task.pid,
            comm: process_name(&failed.task).or_else(|| process.comm.clone()),
            uid: failed.uid,
            exe: process.exe.clone(),
            unit: process.unit.clone(),
            container: process.container.clone(),
            failures: failed.failures,
            holder: BlockingConnection {
                id: (tracked.number != 0).then_some(connection.id),
                cookie: connection.cookie,
                family: connection.family,
                addr: connection.addr,
                cause: connection.cause,
                pid: connection.pid,
                comm: connection.comm,
                exe: connection.exe,
                cmdline: connection.cmdline,
                unit: connection.unit,
                container: connection.container,
                owner: connection.owner,
                state: state::name(state),
                held_for_ns: tracked.established_ns.map(|since_ns| failed.at_ns.saturating_sub(since_ns)),
                free_at,
            },
        }
    }
}
