//! The steps of a repro as data: each step is one JSON line, and the text is rendered from it. A step
//! contains only observed values.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::ReproMode;
use super::address::EndpointText;
use super::table::State;
use crate::ports::PortRange;

#[derive(Debug, Clone, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum ReproStep {
    Bound(Bound),
    #[serde(rename = "dialling")]
    Connecting(ConnectLoop),
    Progress(Progress),
    Connected(Connected),
    Checked(Checked),
    Echoed(Echoed),
    Holding {
        seconds: f64,
        port: u16,
    },
    Closed {
        how: CloseKind,
    },
    After(AfterClose),
    Summary(ReproSummary),
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Bound {
    pub(super) local: EndpointText,
    pub(super) chosen_by_kernel: bool,
}

/// The start of the connect loop.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ConnectLoop {
    pub(super) remote: EndpointText,
    #[serde(serialize_with = "range_as_pair")]
    pub(super) range: PortRange,
    pub(super) expected_dials: u32,
    pub(super) limit: u64,
}

/// The progress of the connect loop.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Progress {
    pub(super) attempts: u64,
    pub(super) per_second: f64,
    pub(super) expected_dials: u32,
    /// The probability of a self-connection within `attempts`.
    pub(super) chance: f64,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Connected {
    pub(super) remote: EndpointText,
    pub(super) duration_ns: u64,
    /// The connect loop that led to this connection. `None`: the port was bound.
    #[serde(flatten)]
    pub(super) progress: Option<Progress>,
}

/// Both addresses of the socket, and its state in `/proc/net/tcp`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Checked {
    pub(super) local: EndpointText,
    pub(super) remote: EndpointText,
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
pub(super) enum CloseKind {
    Fin,
    /// Another process destroyed it during the hold.
    Destroyed,
}

/// What remains after the socket is closed.
#[derive(Debug, Clone, Serialize)]
pub(super) struct AfterClose {
    /// For the text only. In JSON the other steps have it.
    #[serde(skip)]
    pub(super) endpoint: SocketAddr,
    pub(super) state: Option<State>,
    pub(super) port_blocked_ns: Option<u64>,
    pub(super) bind: BindResult,
    pub(super) bind_reuseaddr: BindResult,
}

/// The result of a `bind()` of the port after the close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum BindResult {
    #[serde(rename = "ok")]
    Free,
    #[serde(rename = "EADDRINUSE")]
    InUse,
}

/// A summary of all steps, for a test to compare with the events of the daemon.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ReproSummary {
    pub(super) pid: u32,
    pub(super) tid: u32,
    pub(super) comm: Option<String>,
    pub(super) thread_comm: Option<String>,
    pub(super) netns: Option<u64>,
    pub(super) mode: ReproMode,
    pub(super) cause: &'static str,
    pub(super) family: &'static str,
    pub(super) addr: IpAddr,
    pub(super) ifindex: Option<u32>,
    pub(super) port: u16,
    pub(super) attempts: u64,
    pub(super) bytes_sent: usize,
    pub(super) bytes_received: usize,
    pub(super) duration_ns: u64,
    pub(super) how: CloseKind,
    /// Null also in a run of many connections, which does not check this.
    pub(super) port_blocked_ns: Option<u64>,
    /// For the text only. JSON has its parts.
    #[serde(skip)]
    pub(super) endpoint: SocketAddr,
}

fn range_as_pair<S: serde::Serializer>(range: &PortRange, serializer: S) -> Result<S::Ok, S::Error> {
    (range.low, range.high).serialize(serializer)
}
