//! The steps of a repro as data: each step is one JSON line, and the text is rendered from it. A step
//! contains only observed values.

use std::net::{IpAddr, SocketAddr};

use serde::Serialize;

use super::{ReproMode, segment::CapturedSegment};

#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum ReproStep {
    Bound {
        local: SocketAddr,
        chosen_by_kernel: bool,
    },
    /// The start of the connect loop.
    #[serde(rename = "dialling")]
    Connecting {
        remote: SocketAddr,
        range: (u16, u16),
        expected_dials: u32,
        limit: u64,
    },
    Progress(Progress),
    Connected {
        remote: SocketAddr,
        duration_ns: u64,
        /// The connect loop that led to this connection. `None`: the port was bound.
        #[serde(flatten)]
        progress: Option<Progress>,
    },
    /// Both addresses of the socket, and its state in `/proc/net/tcp`.
    Checked {
        local: SocketAddr,
        remote: SocketAddr,
        state: Option<&'static str>,
    },
    Echoed {
        text: &'static str,
        bytes: usize,
    },
    Holding {
        seconds: f64,
        port: u16,
    },
    Closed {
        how: CloseKind,
    },
    /// What remains after the socket is closed.
    After {
        #[serde(skip)]
        endpoint: SocketAddr,
        state: Option<&'static str>,
        port_blocked_ns: Option<u64>,
        bind: BindResult,
        bind_reuseaddr: BindResult,
    },
    Summary(ReproSummary),
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

/// How the connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum CloseKind {
    Fin,
    /// Another process destroyed it during the hold.
    Destroyed,
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
#[derive(Debug, Serialize)]
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
    /// As captured on `lo`. Null also in a run of many connections, which does not capture.
    pub(super) segments: Option<Vec<CapturedSegment>>,
    /// Why `segments` is null.
    pub(super) not_captured: Option<String>,
}
