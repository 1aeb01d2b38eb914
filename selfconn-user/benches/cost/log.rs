//! Counts the events in the daemon's log after a flood, and reads one of its metrics.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use serde_json::Value;

/// Counts of a log.
#[derive(Default)]
pub(crate) struct LogCounts {
    pub(crate) lines: u64,
    pub(crate) established: u64,
    pub(crate) closed: u64,
    /// Self-connections with another process than the generators.
    pub(crate) wrong: u64,
    /// Self-connections without a process.
    pub(crate) unnamed: u64,
    /// Lost by the last event: transitions, connections and events.
    pub(crate) lost: u64,
    /// The error of both sums of the last event: `matched` = `delivered` + `lost.ring`, and `made` =
    /// `written` + `lost.log` + `lost.suppressed`.
    pub(crate) sum_error: u64,
    pub(crate) written: u64,
}

impl LogCounts {
    /// Reads a log. `pids` are the generators.
    pub(crate) fn read(log: &Path, pids: &[u32]) -> Result<Self> {
        let ours: Vec<String> = pids.iter().map(|pid| format!("\"pid\":{pid},")).collect();
        let mut counts = Self::default();
        let mut lines = BufReader::with_capacity(1 << 20, fs::File::open(log)?);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            counts.lines += 1;
            let is = |event: &str| line.contains(event);
            if is("\"event\":\"established\"") {
                counts.established += 1;
                if is("\"pid\":null") {
                    counts.unnamed += 1;
                } else if !ours.iter().any(|pid| line.contains(pid)) {
                    counts.wrong += 1;
                }
            } else if is("\"event\":\"closed\"") {
                counts.closed += 1;
            } else if is("\"event\":\"stopped\"") {
                counts
                    .add_last_event(&serde_json::from_str(&line)?)
                    .context("`stopped` has no such number")?;
            }
            line.clear();
        }
        Ok(counts)
    }

    fn add_last_event(&mut self, stopped: &Value) -> Option<()> {
        let number = |name: &str| stopped[name].as_u64();
        let lost = stopped["lost"].as_object()?;
        let lost_in = |place: &str| lost.get(place)?.as_u64();
        self.lost = lost.values().filter_map(Value::as_u64).sum();
        self.written = number("written")?;
        self.sum_error = number("matched")?.abs_diff(number("delivered")? + lost_in("ring")?)
            + number("made")?.abs_diff(self.written + lost_in("log")? + lost_in("suppressed")?);
        Some(())
    }
}

/// A loopback address with a port that was free a moment ago.
pub(crate) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// The number of refused connects by the daemon's metrics. Waits some seconds for the expected number.
pub(crate) fn refused_connects(address: SocketAddr, expected: u64) -> Result<u64> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let counted = metric(address, "selfconn_refused_self_dials_total")?;
        if counted >= expected || Instant::now() > until {
            return Ok(counted);
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// The value of a metric without labels.
pub(crate) fn metric(address: SocketAddr, name: &str) -> Result<u64> {
    let mut metrics = TcpStream::connect(address)?;
    write!(metrics, "GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    metrics.read_to_string(&mut text)?;
    let value = |line: &str| line.strip_prefix(name)?.trim().parse().ok();
    text.lines().find_map(value).with_context(|| format!("there is no metric {name}"))
}
