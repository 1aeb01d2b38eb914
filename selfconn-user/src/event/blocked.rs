//! `blocked`.

use jiff::Timestamp;
use selfconn_ebpf::{bind::FailedBind, state};
use serde::Serialize;

use super::{Subject, optional_rfc3339, process_name};
use crate::{
    blocked::{self, Holder, wanted_addr},
    clock::Offset,
    process::Facts,
};

/// Who could not bind what, and why.
#[derive(Debug, Serialize)]
pub struct Blocked {
    /// The address that was wanted; 0.0.0.0 or :: for any.
    pub addr: String,
    /// The port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// Who wanted it, in the initial pid namespace.
    pub pid: u32,
    /// The process's name.
    pub comm: Option<String>,
    /// Its real user id.
    pub uid: u32,
    /// Path of its program.
    pub exe: Option<String>,
    /// Its systemd unit.
    pub unit: Option<String>,
    /// Its container's id.
    pub container: Option<String>,
    /// How often it has failed for this self-connection.
    pub failures: u64,
    /// The self-connection.
    pub holder: Held,
}

/// The self-connection that has the port. The fields are those of `established`.
#[derive(Debug, Serialize)]
pub struct Held {
    /// Null: it ended before the run.
    pub id: Option<String>,
    /// As there.
    pub cookie: Option<u64>,
    /// As there.
    pub family: &'static str,
    /// As there.
    pub addr: String,
    /// As there.
    pub cause: Option<&'static str>,
    /// As there.
    pub pid: Option<u32>,
    /// As there.
    pub comm: Option<String>,
    /// As there.
    pub exe: Option<String>,
    /// As there.
    pub cmdline: Option<Vec<String>>,
    /// As there.
    pub unit: Option<String>,
    /// As there.
    pub container: Option<String>,
    /// As there.
    pub owner: Option<&'static str>,
    /// `ESTABLISHED`, if it is open, or `TIME_WAIT`.
    pub state: &'static str,
    /// Since it became ESTABLISHED.
    pub held_for_ns: Option<u64>,
    /// When TIME_WAIT ends.
    #[serde(serialize_with = "optional_rfc3339")]
    pub free_at: Option<Timestamp>,
}

impl Blocked {
    /// `subject` is the self-connection that has the port.
    #[must_use]
    pub fn new(
        failed: &FailedBind,
        facts: &Facts,
        holder: &Holder<'_>,
        subject: Subject,
        clock: Offset,
    ) -> Self {
        let connection = holder.connection();
        let (state, free_at) = match holder {
            Holder::Open(_) => (state::ESTABLISHED, None),
            Holder::TimeWait(blocked::Leftover { until_ns, .. }) => {
                (state::TIME_WAIT, Some(clock.wall(*until_ns)))
            }
        };
        Self {
            addr: wanted_addr(failed).to_string(),
            port: failed.port,
            netns: (failed.netns != 0).then_some(failed.netns),
            pid: failed.task.pid,
            comm: process_name(&failed.task).or_else(|| facts.comm.clone()),
            uid: failed.uid,
            exe: facts.exe.clone(),
            unit: facts.unit.clone(),
            container: facts.container.clone(),
            failures: failed.failures.into(),
            holder: Held {
                id: (connection.number != 0).then_some(subject.id),
                cookie: subject.cookie,
                family: subject.family,
                addr: subject.addr,
                cause: subject.cause,
                pid: subject.pid,
                comm: subject.comm,
                exe: subject.exe,
                cmdline: subject.cmdline,
                unit: subject.unit,
                container: subject.container,
                owner: subject.owner,
                state: state::name(state),
                held_for_ns: connection.established_ns.map(|since_ns| failed.at_ns.saturating_sub(since_ns)),
                free_at,
            },
        }
    }
}
