//! The event `blocked`: a server could not bind a port because a self-connection holds it.

use std::{fmt::Write as _, rc::Rc, sync::Arc};

use jiff::Timestamp;
use schemars::JsonSchema;
use selfconn_ebpf::{bind_failure::BindFailure, state};
use serde::Serialize;

use super::connection::{Charged, ConnectionFields, process_name};
use super::envelope;
use super::text::{self, EventFormat, LogRecord, Severity, duration, subject, utc_time};
use crate::{
    budget::log::{LogRequest, Phase},
    detect::bind_conflict::{self, PortHolder},
    system::{
        clock::Offset,
        command_line::CommandLine,
        process::{Holder, ProcessInfo},
    },
};

/// `blocked`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Blocked {
    /// Identifier of the conflict: the same each time this server fails because of this self-connection, unique on
    /// this boot.
    pub id: String,
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
    pub exe: Option<Arc<str>>,
    /// systemd unit of the process.
    pub unit: Option<Arc<str>>,
    /// Id of the container.
    pub container: Option<Arc<str>>,
    /// Number of times this bind has failed because of this self-connection.
    pub failures: u64,
    /// The self-connection that holds the port, and the process that has it open now.
    pub holder: BlockingConnection,
    /// The process that connected. Null if its connect() was not observed.
    pub opener: Option<BlockingProcess>,
    /// The process that called bind() pays for the event.
    #[serde(skip)]
    pub charged: Charged,
}

/// The self-connection that holds the port.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BlockingConnection {
    /// The self-connection. Only the fields in [`HolderFields`] are in the JSON.
    #[serde(flatten, serialize_with = "HolderFields::serialize")]
    #[schemars(with = "HolderFields")]
    pub connection: ConnectionFields,
    /// The process that has the socket open now.
    #[serde(flatten)]
    pub process: BlockingProcess,
    /// The processes that have the socket open now. Null if that is unknown.
    pub holders: Option<Vec<Holder>>,
    /// `ESTABLISHED` if the connection is open, or `TIME_WAIT`.
    pub state: &'static str,
    /// Time since the connection became ESTABLISHED.
    pub held_for_ns: Option<u64>,
    /// Time at which TIME_WAIT ends.
    #[serde(serialize_with = "text::optional_rfc3339")]
    #[schemars(with = "Option<String>")]
    pub free_at: Option<Timestamp>,
}

/// The fields of a connection that `holder` has.
#[derive(Serialize, JsonSchema)]
#[serde(remote = "ConnectionFields")]
struct HolderFields {
    id: Option<String>,
    cookie: Option<u64>,
    family: &'static str,
    addr: String,
    cause: Option<&'static str>,
}

/// A process that has to do with the self-connection.
#[derive(Debug, Default, JsonSchema, Serialize)]
pub struct BlockingProcess {
    /// In the initial pid namespace.
    pub pid: Option<u32>,
    /// Name of the process.
    pub comm: Option<String>,
    /// Path of the executable.
    pub exe: Option<Arc<str>>,
    /// Arguments of the process.
    #[schemars(with = "Option<Vec<String>>")]
    pub cmdline: Option<Arc<CommandLine>>,
    /// True if `cmdline` has only a part of the arguments, or none because events shall have none.
    pub cmdline_truncated: bool,
    /// systemd unit of the process.
    pub unit: Option<Arc<str>>,
    /// Id of the container.
    pub container: Option<Arc<str>>,
}

/// Who holds the socket when the event is made.
#[derive(Debug)]
pub struct CurrentHolder {
    /// `None`: unknown.
    pub holders: Option<Vec<Holder>>,
    /// The first of them.
    pub process: Rc<ProcessInfo>,
}

impl CurrentHolder {
    fn process(&self) -> BlockingProcess {
        let Some(first) = self.holders.iter().flatten().next() else { return BlockingProcess::default() };
        let ProcessInfo { comm, exe, cmdline, unit, container, .. } = &*self.process;
        BlockingProcess {
            pid: Some(first.pid),
            // The name that the process had when its other facts were read.
            comm: comm.clone().or_else(|| first.comm.clone()),
            exe: exe.clone(),
            cmdline: cmdline.clone(),
            cmdline_truncated: cmdline.as_ref().is_some_and(|cmdline| cmdline.is_cut),
            unit: unit.clone(),
            container: container.clone(),
        }
    }
}

/// The id of a conflict with this number.
#[must_use]
pub fn blocked_id(run: u64, conflict: u64) -> String {
    envelope::id(run, "b", conflict)
}

impl Blocked {
    /// `connection` describes the self-connection that holds the port, and its opener.
    #[must_use]
    pub fn new(
        id: String,
        failed: &BindFailure,
        process: &ProcessInfo,
        holder: &PortHolder<'_>,
        connection: ConnectionFields,
        current: CurrentHolder,
        clock: Offset,
    ) -> Self {
        let tracked = holder.connection();
        let requested = failed.endpoint;
        let (state, free_at) = match holder {
            PortHolder::Open(_) => (state::ESTABLISHED, None),
            PortHolder::TimeWait(bind_conflict::TimeWaitEntry { until_ns, .. }) => {
                (state::TIME_WAIT, Some(clock.wall(*until_ns)))
            }
        };
        Self {
            id,
            addr: requested.ip().to_string(),
            port: requested.port,
            netns: requested.known_netns(),
            pid: failed.task.pid,
            comm: process_name(&failed.task).or_else(|| process.comm.clone()),
            uid: failed.uid,
            exe: process.exe.clone(),
            unit: process.unit.clone(),
            container: process.container.clone(),
            charged: Charged::new(failed.owner, process),
            failures: failed.failures,
            opener: tracked.opener.map(|_| BlockingProcess {
                pid: connection.pid,
                comm: connection.comm.clone(),
                exe: connection.exe.clone(),
                cmdline: connection.cmdline.clone(),
                cmdline_truncated: connection.cmdline_truncated,
                unit: connection.unit.clone(),
                container: connection.container.clone(),
            }),
            holder: BlockingConnection {
                connection,
                process: current.process(),
                holders: current.holders,
                state: state::name(state),
                held_for_ns: tracked.established_ns.map(|since_ns| failed.at_ns.saturating_sub(since_ns)),
                free_at,
            },
        }
    }
}

impl Blocked {
    pub(super) fn log_request(&self) -> LogRequest<'_> {
        LogRequest {
            id: &self.id,
            owner: self.charged.owner,
            other_owner: None,
            payer: self.charged.payer.clone(),
            program: self.exe.as_deref().or(self.comm.as_deref()),
            port: self.port,
            phase: Phase::Alone,
        }
    }

    /// Those whose command lines the event has.
    pub fn processes_mut(&mut self) -> impl Iterator<Item = &mut BlockingProcess> {
        std::iter::once(&mut self.holder.process).chain(&mut self.opener)
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "blocked", label: "BLOCKED", severity: Severity::Warning, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::process(record, out)?;
    write!(out, " cannot bind ")?;
    subject::endpoint(record, out)?;
    if let Some(netns) = record.number("netns") {
        write!(out, " in netns {netns}")?;
    }
    write!(out, ": held by ")?;
    match record.object("holder") {
        Some(holder) => held_by(holder, record.object("opener"), out)?,
        None => write!(out, "a self-connection")?,
    }
    match record.number("failures") {
        Some(failures) if failures > 1 => write!(out, "; {failures} failures"),
        _ => Ok(()),
    }
}

fn held_by(holder: LogRecord<'_>, opener: Option<LogRecord<'_>>, out: &mut String) -> std::fmt::Result {
    if holder.text("state") == Some("TIME_WAIT") {
        write!(out, "the TIME_WAIT of ")?;
        subject::process(opener.unwrap_or(holder), out)?;
        write!(out, ", which was connected to itself")?;
        return match holder.timestamp("free_at") {
            Some(until) => write!(out, "; free at {}", utc_time(until)),
            None => Ok(()),
        };
    }
    subject::process(holder, out)?;
    write!(out, ", connected to itself")?;
    if let Some(ns) = holder.number("held_for_ns") {
        write!(out, " for {}", duration(ns))?;
    }
    match opener {
        Some(opener) if opener.number("pid") != holder.number("pid") => {
            write!(out, ", opened by ")?;
            subject::process(opener, out)
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        budget::memory::MAX_HOLDERS,
        event::{Envelope, Event, EventKind, tests::assert_rendered},
        system::{identity::Identity, process::CMDLINE_LIMIT},
    };

    /// Text of the process's choice. A control character has one byte there, and six in JSON.
    fn chosen(bytes: usize) -> String {
        "\u{1}".repeat(bytes)
    }

    #[test]
    fn the_longest_line_of_all_is_within_the_limits_of_the_shipped_agents() {
        // NAME_MAX, a path of PATH_MAX with its NUL, and TASK_COMM_LEN with its NUL: include/uapi/linux/limits.h and
        // include/linux/sched.h at v6.12.
        let (file_name, path, comm) = (chosen(255), chosen(4_095), chosen(15));
        let pid = 1 << 22;
        let process = || BlockingProcess {
            pid: Some(pid),
            comm: Some(comm.clone()),
            exe: Some(path.as_str().into()),
            cmdline: CommandLine::parse(chosen(CMDLINE_LIMIT).as_bytes(), true).map(Arc::new),
            cmdline_truncated: true,
            unit: Some(file_name.as_str().into()),
            container: Some("f".repeat(64).into()),
        };
        let blocked = Blocked {
            id: blocked_id(u64::MAX, u64::MAX),
            addr: "f".repeat(39),
            port: u16::MAX,
            netns: Some(u32::MAX),
            pid,
            comm: Some(comm.clone()),
            uid: u32::MAX,
            exe: Some(path.as_str().into()),
            unit: Some(file_name.as_str().into()),
            container: Some("f".repeat(64).into()),
            charged: Charged::default(),
            failures: u64::MAX,
            holder: BlockingConnection {
                connection: ConnectionFields {
                    id: Some(blocked_id(u64::MAX, u64::MAX)),
                    cookie: Some(u64::MAX),
                    addr: "f".repeat(39),
                    ..ConnectionFields::sample()
                },
                process: process(),
                holders: Some(vec![Holder { pid, comm: Some(comm.clone()), start_ticks: None }; MAX_HOLDERS]),
                state: state::name(state::ESTABLISHED),
                held_for_ns: Some(u64::MAX),
                free_at: Some(Timestamp::MAX),
            },
            opener: Some(process()),
        };
        let id = || Some("f".repeat(32));
        let identity = Identity { host: "x".repeat(253), machine_id: id(), boot_id: id(), run: u64::MAX };
        let event =
            Event { time: Timestamp::MAX, seq: u64::MAX, kind: EventKind::Blocked(Box::new(blocked)) };
        let mut line = Vec::new();
        event.write_json_line(&Envelope::new(&identity), &mut line);
        let limit = 128 << 10;
        assert!((limit - (8 << 10)..=limit).contains(&line.len()), "{} bytes", line.len());
        let rsyslog = include_str!("../../../packaging/shipping/rsyslog-postgresql.conf");
        assert!(rsyslog.contains("maxMessageSize=\"128k\""), "rsyslog takes the line");
    }

    #[test]
    fn a_line_mentions_only_known_fields() {
        assert_rendered(&[
            (
                r#"{"event":"blocked","addr":"0.0.0.0","port":44446,"comm":"nginx","pid":812,"failures":1,"netns":7,
                    "holder":{"comm":"java","pid":13154,"state":"ESTABLISHED","held_for_ns":11520000000000,
                    "free_at":null},"opener":{"comm":"java","pid":13154}}"#,
                "BLOCKED      nginx[812] cannot bind 0.0.0.0:44446 in netns 7: held by java[13154], connected to itself \
                 for 3h12m",
            ),
            (
                r#"{"event":"blocked","addr":"::","port":80,"comm":"nginx","pid":812,"failures":1,"netns":7,"holder":
                    {"comm":"sleep","pid":9,"state":"ESTABLISHED","held_for_ns":5000000000,"free_at":null},"opener":
                    {"comm":"sh","pid":8}}"#,
                "BLOCKED      nginx[812] cannot bind [::]:80 in netns 7: held by sleep[9], connected to itself for 5.0s, \
                 opened by sh[8]",
            ),
            (
                r#"{"event":"blocked","addr":"::1","port":80,"comm":"a","pid":7,"failures":1,"netns":7,"holder":{"comm":
                    null,"pid":null,"state":"TIME_WAIT","held_for_ns":5,"free_at":null},"opener":{"comm":"sh","pid":8}}"#,
                "BLOCKED      a[7] cannot bind [::1]:80 in netns 7: held by the TIME_WAIT of sh[8], which was connected to \
                 itself",
            ),
            (
                r#"{"event":"blocked","addr":"::1","port":80,"comm":"a\u001b","pid":7,"failures":9,"holder":{"comm":
                    "b\n","pid":8,"state":"TIME_WAIT","held_for_ns":5,"free_at":"2026-11-22T23:10:58.584252Z"}}"#,
                "BLOCKED      a\\u{1b}[7] cannot bind [::1]:80: held by the TIME_WAIT of b\\n[8], which was connected \
                 to itself; free at 23:10:58.584252Z; 9 failures",
            ),
        ]);
    }
}
