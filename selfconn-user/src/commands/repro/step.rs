//! What happens in a repro, step by step, as data: one JSON line each, and what the text is written from. A step
//! holds only what was observed.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::Mode;
use super::address::Endpoint;
use super::table::State;
use crate::ports::PortRange;

#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Step {
    Bound(Bound),
    Dialling(Dialling),
    Progress(Progress),
    Connected(Connected),
    Checked(Checked),
    Echoed(Echoed),
    Holding { seconds: f64, port: u16 },
    Closed { how: How },
    After(After),
    Summary(Summary),
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Bound {
    pub(super) local: Endpoint,
    pub(super) chosen_by_kernel: bool,
}

/// The dial loop begins.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Dialling {
    pub(super) remote: Endpoint,
    #[serde(serialize_with = "range_as_pair")]
    pub(super) range: PortRange,
    pub(super) expected_dials: u32,
    pub(super) limit: u64,
}

/// Where the dial loop stands.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Progress {
    pub(super) attempts: u64,
    pub(super) per_second: f64,
    pub(super) expected_dials: u32,
    /// Of a hit by now.
    pub(super) chance: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Connected {
    pub(super) remote: Endpoint,
    pub(super) duration_ns: u64,
    /// The dial loop that led here.
    #[serde(flatten)]
    pub(super) dialled: Option<Progress>,
}

/// The proof, as this process and the kernel's table see it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Checked {
    pub(super) local: Endpoint,
    pub(super) remote: Endpoint,
    pub(super) state: Option<State>,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Echoed {
    pub(super) text: String,
    pub(super) bytes: usize,
}

/// How the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum How {
    Fin,
    /// By somebody else, while it was held.
    Destroyed,
}

/// What is left once the socket is closed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct After {
    /// For people only; JSON has it from the other steps.
    #[serde(skip)]
    pub(super) endpoint: SocketAddr,
    pub(super) state: Option<State>,
    pub(super) port_blocked_ns: Option<u64>,
    pub(super) bind: Bind,
    pub(super) bind_reuseaddr: Bind,
}

/// What a server would be told that wants the port now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Bind {
    #[serde(rename = "ok")]
    Free,
    #[serde(rename = "EADDRINUSE")]
    InUse,
}

/// The whole of it, for a test to compare with what else was reported.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Summary {
    pub(super) pid: u32,
    pub(super) tid: u32,
    pub(super) comm: Option<String>,
    pub(super) thread_comm: Option<String>,
    pub(super) netns: Option<u64>,
    pub(super) mode: Mode,
    pub(super) cause: &'static str,
    pub(super) family: &'static str,
    pub(super) addr: IpAddr,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) attempts: u64,
    pub(super) bytes_sent: usize,
    pub(super) bytes_received: usize,
    pub(super) duration_ns: u64,
    pub(super) how: How,
    /// Null as well where many were made in a row: then nobody looked.
    pub(super) port_blocked_ns: Option<u64>,
    /// For people only; JSON has its parts.
    #[serde(skip)]
    pub(super) endpoint: SocketAddr,
}

fn range_as_pair<S: serde::Serializer>(range: &PortRange, serializer: S) -> Result<S::Ok, S::Error> {
    (range.low, range.high).serialize(serializer)
}
