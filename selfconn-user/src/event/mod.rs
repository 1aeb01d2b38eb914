//! The public event schema: the JSON object of one line of the event log. Every field is documented in
//! docs/events.md, and fields are only ever added. An unknown value is `null`, never a guess.
//!
//! The types here only convert internal state to the schema. Writing events is the business of `output`.

use jiff::Timestamp;
use selfconn_ebpf::{Task, cause, state};
use serde::{Serialize, Serializer};

use crate::{
    detect::connection::{CloseReason, Connection, ConnectionEnd, Source, comm},
    system::{
        clock::Offset,
        process::{Attribution, Holder},
    },
};

use at_risk::AtRisk;
use at_risk::AtRiskOver;

pub mod at_risk;
pub mod at_risk_text;
mod blocked;
pub mod blocked_text;
pub mod closed_text;
pub mod established_text;
pub mod lost_text;
mod remedied;
pub mod remedied_text;
pub mod started_text;
pub mod state_text;
pub mod stopped_text;
pub mod text;
pub mod unknown_text;

pub use blocked::Blocked;
pub use remedied::Remedied;

/// One event, which is one line of the event log.
#[derive(Debug, Serialize)]
pub struct Event {
    /// Time of the event, UTC.
    #[serde(serialize_with = "rfc3339")]
    pub time: Timestamp,
    /// The event's name and its other fields.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events. The variant's name in snake case is the JSON field `event`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The hooks are attached.
    Started(Started),
    /// A self-connection is ESTABLISHED.
    Established(Box<ConnectionFields>),
    /// A self-connection changed its TCP state. Only with `--states`.
    State(Box<StateChange>),
    /// The socket of a self-connection is gone.
    Closed(Box<Closed>),
    /// `--remedy` acted on a self-connection, or would have acted on it.
    Remedied(Box<Remedied>),
    /// A process keeps connecting to a closed local port, and such an attempt can become a self-connection.
    AtRisk(Box<AtRisk>),
    /// The attempts stopped, or they can no longer become a self-connection.
    AtRiskOver(Box<AtRiskOver>),
    /// A server could not bind a port because a self-connection holds it.
    Blocked(Box<Blocked>),
    /// Something was not observed or not written.
    Lost(Lost),
    /// The run ends.
    Stopped(Stopped),
}

/// `started`.
#[derive(Debug, Serialize)]
pub struct Started {
    /// Version of selfconn.
    pub version: &'static str,
    /// Kernel release, as `uname -r` prints it.
    pub kernel: String,
    /// Process id of the daemon.
    pub pid: u32,
    /// One entry for each attached method, and one for each hook without a method.
    pub hooks: Vec<HookStatus>,
    /// How failed binds are observed.
    pub binds: BindStatus,
    /// What the daemon cannot observe on this host.
    pub limits: Vec<String>,
}

/// Outcome of attaching one hook.
#[derive(Debug, Serialize)]
pub struct HookStatus {
    /// Kernel name of the hook.
    pub hook: &'static str,
    /// How the hook is attached. Null if it is not attached.
    pub method: Option<&'static str>,
    /// The other methods that were tried.
    pub refused: Vec<RefusedMethod>,
}

/// How failed binds are observed.
#[derive(Debug, Serialize)]
pub struct BindStatus {
    /// How the program is attached. Null if failed binds are not observed.
    pub method: Option<&'static str>,
    /// The methods that were tried and are not attached.
    pub refused: Vec<RefusedMethod>,
}

/// A method that was tried and is not attached.
#[derive(Debug, Serialize)]
pub struct RefusedMethod {
    /// Name of the method.
    pub method: &'static str,
    /// Why it is not attached.
    pub why: String,
}

/// The fields of the self-connection that an event is about.
#[derive(Clone, Debug, Serialize)]
pub struct ConnectionFields {
    /// Identifier of the connection: the same in all its events, unique on this boot.
    pub id: String,
    /// Socket cookie, as `ss -e` shows it.
    pub cookie: Option<u64>,
    /// `live`, or `scan` if the connection was found in the socket table.
    pub source: &'static str,
    /// Address family of the socket: `ipv4` or `ipv6`.
    pub family: &'static str,
    /// Source and destination address.
    pub addr: String,
    /// Interface index of a link-local address.
    pub ifindex: Option<u32>,
    /// Source and destination port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// `ephemeral` if connect() chose the source port, `bound` if the socket had a port before connect().
    pub cause: Option<&'static str>,
    /// The process that connected, in the initial pid namespace.
    pub pid: Option<u32>,
    /// Thread id of the connecting thread.
    pub tid: Option<u32>,
    /// Name of the process.
    pub comm: Option<String>,
    /// Name of the thread.
    pub thread_comm: Option<String>,
    /// Path of the executable.
    pub exe: Option<String>,
    /// Arguments of the process.
    pub cmdline: Option<Vec<String>>,
    /// Real user id of the process.
    pub uid: Option<u32>,
    /// Path of the control group.
    pub cgroup: Option<String>,
    /// systemd unit of the process.
    pub unit: Option<String>,
    /// Id of the container.
    pub container: Option<String>,
    /// How the process is known: `witnessed` at connect(), or `holder` because it has the socket open.
    pub owner: Option<&'static str>,
    /// The processes that have the socket open now. Null if they were not looked up.
    pub holders: Option<Vec<Holder>>,
    /// Initial sequence number.
    pub isn: Option<u32>,
    /// Initial sequence number of the peer. Equality with `isn` proves the self-connection.
    pub peer_isn: Option<u32>,
}

/// `state`.
#[derive(Debug, Serialize)]
pub struct StateChange {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// Kernel name of the previous state.
    pub from: &'static str,
    /// Kernel name of the new state.
    pub to: &'static str,
}

/// `closed`.
#[derive(Debug, Serialize)]
pub struct Closed {
    /// The self-connection.
    #[serde(flatten)]
    pub connection: ConnectionFields,
    /// Time from ESTABLISHED to the end.
    pub duration_ns: Option<u64>,
    /// Payload bytes sent, without SYN, FIN and retransmissions.
    pub bytes_sent: Option<u64>,
    /// Payload bytes received.
    pub bytes_received: Option<u64>,
    /// How the connection ended: `fin`, `rst` or `destroyed`.
    pub how: Option<&'static str>,
    /// The process that closed the connection, if it is known.
    pub closer: Option<Holder>,
    /// Time at which TIME_WAIT ends and a server can bind the port again.
    #[serde(serialize_with = "optional_rfc3339")]
    pub port_blocked_until: Option<Timestamp>,
}

/// `lost`.
#[derive(Debug, Serialize)]
pub struct Lost {
    /// `ring`, `missed`, `log`, `stdout`, `journal`, `refused_table` or `hooks`.
    pub r#where: &'static str,
    /// Number lost since the previous `lost` event with the same `where`.
    pub count: u64,
    /// With `hooks`: the method that no longer observes connections.
    pub method: Option<&'static str>,
}

/// `stopped`.
#[derive(Debug, Serialize)]
pub struct Stopped {
    /// Events emitted in this run, this one included.
    pub made: u64,
    /// Events written to the log file, this one included. Null without a log file.
    pub written: Option<u64>,
    /// Transitions and events lost, by the place where they were lost.
    pub lost: Losses,
    /// Self-connections that are still open.
    pub open: u64,
    /// Counters of the eBPF programs.
    #[serde(flatten)]
    pub programs: ProgramCounters,
}

/// Counters of the eBPF programs over a run. `matched` = `delivered` + `lost.ring`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ProgramCounters {
    /// Records that the programs wanted to send through the ring buffer.
    pub matched: u64,
    /// Records that the daemon read from the ring buffer.
    pub delivered: u64,
    /// Number of times the kernel skipped a program. `None` if the kernel does not count it.
    pub not_examined: Option<u64>,
    /// Connection attempts that were not inserted because the connect table was full.
    pub not_remembered: u64,
}

/// Totals of the losses of a run, by the place where they happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// Transitions for which the ring buffer had no room.
    pub ring: u64,
    /// Self-connections that the hooks missed and the socket table contained.
    pub missed: u64,
    /// Events that could not be written to the log file.
    pub log: u64,
    /// Events that the reader of stdout did not read in time.
    pub stdout: u64,
    /// Events that the journal did not accept.
    pub journal: u64,
    /// Refused connects that were not counted by destination because the table was full.
    pub refused_table: u64,
    /// Methods that no longer observed connections.
    pub hooks: u64,
}

impl Losses {
    /// The sum, field by field.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ring: self.ring + other.ring,
            missed: self.missed + other.missed,
            log: self.log + other.log,
            stdout: self.stdout + other.stdout,
            journal: self.journal + other.journal,
            refused_table: self.refused_table + other.refused_table,
            hooks: self.hooks + other.hooks,
        }
    }
}

impl ConnectionFields {
    /// Combines a tracked connection with the information that `/proc` has about its process. `run`
    /// identifies this run, so that ids stay unique on this boot.
    #[must_use]
    pub fn new(connection: &Connection, run: u64, attribution: &Attribution) -> Self {
        let (opener, process) = (connection.opener, &attribution.process);
        // If connect() was not observed, report the first process that has the socket open instead.
        let holder =
            attribution.holders.as_ref().and_then(|holders| holders.first()).filter(|_| opener.is_none());
        let task = opener.map(|opener| opener.task);
        Self {
            id: format!("{run:x}-{:x}", connection.number),
            cookie: connection.cookie,
            source: match connection.source {
                Source::Live => "live",
                Source::Scan => "scan",
            },
            family: if connection.endpoint.is_ipv6() { "ipv6" } else { "ipv4" },
            addr: connection.endpoint.ip().to_string(),
            ifindex: connection.ifindex,
            port: connection.endpoint.port,
            netns: connection.endpoint.known_netns(),
            cause: opener.and_then(|opener| match opener.cause {
                cause::EPHEMERAL => Some("ephemeral"),
                cause::BOUND => Some("bound"),
                _ => None,
            }),
            pid: task.map(|task| task.pid).or(holder.map(|holder| holder.pid)),
            tid: task.map(|task| task.tid),
            comm: task
                .and_then(|task| process_name(&task))
                .or_else(|| holder.and_then(|holder| holder.comm.clone()))
                .or_else(|| process.comm.clone()),
            thread_comm: task.map(|task| comm(&task.comm)),
            exe: process.exe.clone(),
            cmdline: process.cmdline.clone(),
            uid: opener.map(|opener| opener.uid).or(connection.uid),
            cgroup: process.cgroup.clone(),
            unit: process.unit.clone(),
            container: process.container.clone(),
            owner: opener.map(|_| "witnessed").or(holder.map(|_| "holder")),
            holders: attribution.holders.clone(),
            isn: connection.isns.map(|(isn, _)| isn),
            peer_isn: connection.isns.map(|(_, peer_isn)| peer_isn),
        }
    }
}

/// The name of the process, if the eBPF program could read it.
fn process_name(task: &Task) -> Option<String> {
    (task.leader[0] != 0 || task.pid == task.tid).then(|| comm(&task.leader))
}

impl StateChange {
    /// `from` and `to` are the kernel's state numbers.
    #[must_use]
    pub fn new(connection: ConnectionFields, from: u8, to: u8) -> Self {
        Self { connection, from: state::name(from), to: state::name(to) }
    }
}

impl Closed {
    #[must_use]
    pub fn new(
        connection: ConnectionFields,
        closer: Option<&Task>,
        end: &ConnectionEnd,
        clock: Offset,
    ) -> Self {
        Self {
            connection,
            duration_ns: end.duration_ns,
            bytes_sent: end.bytes_sent,
            bytes_received: end.bytes_received,
            how: end.reason.map(|how| match how {
                CloseReason::Fin => "fin",
                CloseReason::Rst => "rst",
                CloseReason::Destroyed => "destroyed",
            }),
            closer: closer.map(|task| Holder { pid: task.pid, comm: process_name(task) }),
            port_blocked_until: end.port_blocked_until_ns.map(|at_ns| clock.wall(at_ns)),
        }
    }
}

fn rfc3339<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{time:.9}"))
}

fn optional_rfc3339<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, to),
        None => to.serialize_none(),
    }
}
