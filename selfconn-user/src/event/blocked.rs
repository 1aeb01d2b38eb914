//! The event `blocked`: a server could not bind a port because a self-connection holds it.

use std::{fmt::Write as _, sync::Arc};

use jiff::Timestamp;
use schemars::JsonSchema;
use selfconn_ebpf::{bind_failure::BindFailure, state};
use serde::Serialize;

use super::connection::{ConnectionFields, process_name};
use super::envelope;
use super::text::{self, EventFormat, LogRecord, Severity, duration, subject, utc_time};
use crate::{
    detect::bind_conflict::{self, PortHolder},
    system::{clock::Offset, command_line::CommandLine, process::ProcessInfo},
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
    /// The self-connection that holds the port.
    pub holder: BlockingConnection,
}

/// The self-connection that holds the port.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BlockingConnection {
    /// The self-connection. Only the fields in [`HolderFields`] are in the JSON.
    #[serde(flatten, serialize_with = "HolderFields::serialize")]
    #[schemars(with = "HolderFields")]
    pub connection: ConnectionFields,
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
    pid: Option<u32>,
    comm: Option<String>,
    exe: Option<Arc<str>>,
    #[schemars(with = "Option<Vec<String>>")]
    cmdline: Option<Arc<CommandLine>>,
    unit: Option<Arc<str>>,
    container: Option<Arc<str>>,
    owner: Option<&'static str>,
}

/// The id of a conflict with this number.
#[must_use]
pub fn blocked_id(run: u64, conflict: u64) -> String {
    envelope::id(run, "b", conflict)
}

impl Blocked {
    /// `connection` describes the self-connection that holds the port.
    #[must_use]
    pub fn new(
        id: String,
        failed: &BindFailure,
        process: &ProcessInfo,
        holder: &PortHolder<'_>,
        connection: ConnectionFields,
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
            failures: failed.failures,
            holder: BlockingConnection {
                connection,
                state: state::name(state),
                held_for_ns: tracked.established_ns.map(|since_ns| failed.at_ns.saturating_sub(since_ns)),
                free_at,
            },
        }
    }
}

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "blocked", label: "BLOCKED", severity: Severity::Warning, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::process(record, out)?;
    write!(out, " cannot bind ")?;
    match record.text("addr") {
        // Bound to any address: only the port matters.
        Some("0.0.0.0" | "::") if record.number("port").is_some() => {
            write!(out, "{}", record.number("port").unwrap_or(0))?;
        }
        _ => subject::endpoint(record, out)?,
    }
    write!(out, ": held by ")?;
    match record.object("holder") {
        Some(holder) => held_by(holder, out)?,
        None => write!(out, "a self-connection")?,
    }
    match record.number("failures") {
        Some(failures) if failures > 1 => write!(out, "; {failures} failures"),
        _ => Ok(()),
    }
}

fn held_by(holder: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if holder.text("state") == Some("TIME_WAIT") {
        write!(out, "the TIME_WAIT of ")?;
        subject::process(holder, out)?;
        write!(out, ", which was connected to itself")?;
        return match holder.timestamp("free_at") {
            Some(until) => write!(out, "; free at {}", utc_time(until)),
            None => Ok(()),
        };
    }
    subject::process(holder, out)?;
    write!(out, ", connected to itself")?;
    match holder.number("held_for_ns") {
        Some(ns) => write!(out, " for {}", duration(ns)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::rendered;

    #[test]
    fn a_line_mentions_only_known_fields() {
        for (json, line) in [
            (
                r#"{"event":"blocked","addr":"0.0.0.0","port":44446,"comm":"nginx","pid":812,"failures":1,"holder":
                    {"comm":"java","pid":13154,"state":"ESTABLISHED","held_for_ns":11520000000000,"free_at":null}}"#,
                "BLOCKED      nginx[812] cannot bind 44446: held by java[13154], connected to itself for 3h12m",
            ),
            (
                r#"{"event":"blocked","addr":"::1","port":80,"comm":"a\u001b","pid":7,"failures":9,"holder":{"comm":
                    "b\n","pid":8,"state":"TIME_WAIT","held_for_ns":5,"free_at":"2026-11-22T23:10:58.584252Z"}}"#,
                "BLOCKED      a\\u{1b}[7] cannot bind [::1]:80: held by the TIME_WAIT of b\\n[8], which was connected \
                 to itself; free at 23:10:58.584252Z; 9 failures",
            ),
        ] {
            assert_eq!(rendered(json), line);
        }
    }
}
