//! The public event schema: what a line of the event log holds. Everything here is written down in docs/events.md;
//! fields are only ever added. Unknown is `null`, never a guess.

use jiff::Timestamp;
use selfconn_ebpf::{Task, cause, state};
use serde::{Serialize, Serializer};

use crate::{
    clock::Offset,
    connection::{Connection, End, How, Source, comm},
    process::{Holder, Who},
};

mod blocked;
mod remedied;
pub mod risk;

pub use blocked::Blocked;
pub use remedied::Remedied;
use risk::{AtRisk, AtRiskOver};

/// One event.
#[derive(Debug, Serialize)]
pub struct Event {
    /// When it happened, UTC.
    #[serde(serialize_with = "rfc3339")]
    pub time: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub what: What,
}

/// What happened, by the name in `event`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum What {
    /// Hooks are live.
    Started(Started),
    /// A self-connection is ESTABLISHED.
    Established(Box<Subject>),
    /// It moved; with `--states` only.
    State(Box<Moved>),
    /// It is gone.
    Closed(Box<Ended>),
    /// `--remedy` did something about it, or would have.
    Remedied(Box<Remedied>),
    /// Somebody keeps dialling a port that can hit itself.
    AtRisk(Box<AtRisk>),
    /// Nobody does any more, or it can't.
    AtRiskOver(Box<AtRiskOver>),
    /// A server can't bind a port that a self-connection has.
    Blocked(Box<Blocked>),
    /// Something was not seen or not written.
    Lost(Lost),
    /// The run ends.
    Stopped(Stopped),
}

/// `started`.
#[derive(Debug, Serialize)]
pub struct Started {
    /// selfconn's.
    pub version: &'static str,
    /// `uname -r`.
    pub kernel: String,
    /// The daemon's own.
    pub pid: u32,
    /// Each live method, and each hook without one.
    pub hooks: Vec<HookStatus>,
    /// How binds that fail are seen.
    pub binds: BindStatus,
    /// What can't be seen from here.
    pub limits: Vec<String>,
}

/// What became of a hook.
#[derive(Debug, Serialize)]
pub struct HookStatus {
    /// The kernel's name.
    pub hook: &'static str,
    /// How it is attached; null: not at all.
    pub method: Option<&'static str>,
    /// The other methods that were tried.
    pub refused: Vec<Refused>,
}

/// How binds that fail are seen.
#[derive(Debug, Serialize)]
pub struct BindStatus {
    /// Null: not at all.
    pub method: Option<&'static str>,
    /// The methods that were tried, and are not live.
    pub refused: Vec<Refused>,
}

/// A method that isn't live.
#[derive(Debug, Serialize)]
pub struct Refused {
    /// Which.
    pub method: &'static str,
    /// Why.
    pub why: String,
}

/// The self-connection that an event is about.
#[derive(Clone, Debug, Serialize)]
pub struct Subject {
    /// The same in all its events, unique on this boot.
    pub id: String,
    /// As `ss -e` shows it.
    pub cookie: Option<u64>,
    /// `live`, or `scan` where it was found in the socket table.
    pub source: &'static str,
    /// `ipv4` or `ipv6`: the socket's.
    pub family: &'static str,
    /// Source and destination address.
    pub addr: String,
    /// Interface index of a link-local address.
    pub ifindex: Option<u32>,
    /// Source and destination port.
    pub port: u16,
    /// Inode of the network namespace.
    pub netns: Option<u32>,
    /// `ephemeral`, or `bound` where the socket had a port before it dialled.
    pub cause: Option<&'static str>,
    /// The process that dialled, in the initial pid namespace.
    pub pid: Option<u32>,
    /// Its thread.
    pub tid: Option<u32>,
    /// The process's name.
    pub comm: Option<String>,
    /// The thread's name.
    pub thread_comm: Option<String>,
    /// Path of its program.
    pub exe: Option<String>,
    /// Its arguments.
    pub cmdline: Option<Vec<String>>,
    /// Its real user id.
    pub uid: Option<u32>,
    /// Path of its control group.
    pub cgroup: Option<String>,
    /// Its systemd unit.
    pub unit: Option<String>,
    /// Its container's id.
    pub container: Option<String>,
    /// `witnessed` at connect, or `holder` by its open socket.
    pub owner: Option<&'static str>,
    /// Who holds the socket open now, where that was looked up.
    pub holders: Option<Vec<Holder>>,
    /// Initial sequence number.
    pub isn: Option<u32>,
    /// The peer's; equal to `isn`, which is the proof.
    pub peer_isn: Option<u32>,
}

/// `state`.
#[derive(Debug, Serialize)]
pub struct Moved {
    /// Whose.
    #[serde(flatten)]
    pub subject: Subject,
    /// The kernel's name of the state it left.
    pub from: &'static str,
    /// And of the one it is in.
    pub to: &'static str,
}

/// `closed`.
#[derive(Debug, Serialize)]
pub struct Ended {
    /// Whose.
    #[serde(flatten)]
    pub subject: Subject,
    /// From ESTABLISHED to the end.
    pub duration_ns: Option<u64>,
    /// Payload bytes: no SYN, FIN or retransmission.
    pub bytes_sent: Option<u64>,
    /// Payload bytes.
    pub bytes_received: Option<u64>,
    /// `fin`, `rst` or `destroyed`.
    pub how: Option<&'static str>,
    /// Who closed it, where that is known.
    pub closer: Option<Holder>,
    /// When TIME_WAIT ends and a server can bind the port again.
    #[serde(serialize_with = "optional_rfc3339")]
    pub port_blocked_until: Option<Timestamp>,
}

/// `lost`.
#[derive(Debug, Serialize)]
pub struct Lost {
    /// `ring`, `missed`, `log`, `stdout`, `journal` or `dials`.
    pub r#where: &'static str,
    /// How many since the last such event.
    pub count: u64,
    /// The method that sees nothing any more, with `hooks`.
    pub method: Option<&'static str>,
}

/// `stopped`.
#[derive(Debug, Serialize)]
pub struct Stopped {
    /// Events made in this run, this one included.
    pub made: u64,
    /// Events written to the log file, this one included; null without one.
    pub written: Option<u64>,
    /// Transitions and events lost, by where.
    pub lost: Losses,
    /// Self-connections still open.
    pub open: u64,
    /// What the programs in the kernel counted.
    #[serde(flatten)]
    pub programs: Programs,
}

/// The programs' account of a run. `matched` = `delivered` + `lost.ring`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Programs {
    /// Records that were to go through the ring buffer.
    pub matched: u64,
    /// Records that came out of it.
    pub delivered: u64,
    /// How often a program was not run; `None`: the kernel doesn't count it.
    pub not_examined: Option<u64>,
    /// Openers that the table of dials had no room for.
    pub not_remembered: u64,
}

/// Totals of what was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Losses {
    /// Transitions for which the ring buffer had no room.
    pub ring: u64,
    /// Self-connections that the hooks missed and the socket table had.
    pub missed: u64,
    /// Events that the log file refused.
    pub log: u64,
    /// Events that nobody took from stdout.
    pub stdout: u64,
    /// Events that the journal did not take.
    pub journal: u64,
    /// Refused dials that the table by port had no room for.
    pub dials: u64,
    /// Methods that saw nothing any more.
    pub hooks: u64,
}

impl Losses {
    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            ring: self.ring + other.ring,
            missed: self.missed + other.missed,
            log: self.log + other.log,
            stdout: self.stdout + other.stdout,
            journal: self.journal + other.journal,
            dials: self.dials + other.dials,
            hooks: self.hooks + other.hooks,
        }
    }
}

impl Subject {
    /// What is known of a connection, and what `/proc` knows of its opener. `run` is the mark of this run, by which ids
    /// stay unique on this boot.
    #[must_use]
    pub fn new(connection: &Connection, run: u64, who: &Who) -> Self {
        let (opener, facts) = (connection.opener, &who.facts);
        // Where nobody saw the dial, the first who has the socket open stands in.
        let holder = who.holders.as_ref().and_then(|holders| holders.first()).filter(|_| opener.is_none());
        let task = opener.map(|opener| opener.task);
        Self {
            id: format!("{run:x}-{:x}", connection.number),
            cookie: connection.cookie,
            source: match connection.source {
                Source::Live => "live",
                Source::Scan => "scan",
            },
            family: if connection.is_ipv6 { "ipv6" } else { "ipv4" },
            addr: connection.addr.to_string(),
            ifindex: connection.ifindex,
            port: connection.port,
            netns: connection.netns,
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
                .or_else(|| facts.comm.clone()),
            thread_comm: task.map(|task| comm(&task.comm)),
            exe: facts.exe.clone(),
            cmdline: facts.cmdline.clone(),
            uid: opener.map(|opener| opener.uid).or(connection.uid),
            cgroup: facts.cgroup.clone(),
            unit: facts.unit.clone(),
            container: facts.container.clone(),
            owner: opener.map(|_| "witnessed").or(holder.map(|_| "holder")),
            holders: who.holders.clone(),
            isn: connection.isns.map(|(isn, _)| isn),
            peer_isn: connection.isns.map(|(_, peer_isn)| peer_isn),
        }
    }
}

/// The process's name, where the kernel side could read it.
fn process_name(task: &Task) -> Option<String> {
    (task.leader[0] != 0 || task.pid == task.tid).then(|| comm(&task.leader))
}

impl Moved {
    /// A transition, by the kernel's numbers of its states.
    #[must_use]
    pub fn new(subject: Subject, from: u8, to: u8) -> Self {
        Self { subject, from: state::name(from), to: state::name(to) }
    }
}

impl Ended {
    /// The end of a self-connection.
    #[must_use]
    pub fn new(subject: Subject, closer: Option<&Task>, end: &End, clock: Offset) -> Self {
        Self {
            subject,
            duration_ns: end.duration_ns,
            bytes_sent: end.bytes_sent,
            bytes_received: end.bytes_received,
            how: end.how.map(|how| match how {
                How::Fin => "fin",
                How::Rst => "rst",
                How::Destroyed => "destroyed",
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
