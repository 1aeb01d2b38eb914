//! What the daemon told of a flood: its log, counted, and one of its metrics.

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

/// What a log says of our generators.
#[derive(Default)]
pub(crate) struct Tally {
    pub(crate) lines: u64,
    pub(crate) established: u64,
    pub(crate) closed: u64,
    /// Named somebody else.
    pub(crate) wrong: u64,
    /// Named nobody.
    pub(crate) unnamed: u64,
    /// In the last words: transitions, connections and events.
    pub(crate) lost: u64,
    /// By how much both sums of the last words are off: `matched` = `delivered` + `lost.ring`, and `made` = `written` +
    /// `lost.log`.
    pub(crate) uneven: u64,
    pub(crate) written: u64,
}

impl Tally {
    /// Reads a log to its end; `pids` are the generators.
    pub(crate) fn of(log: &Path, pids: &[u32]) -> Result<Self> {
        let ours: Vec<String> = pids.iter().map(|pid| format!("\"pid\":{pid},")).collect();
        let mut tally = Self::default();
        let mut lines = BufReader::with_capacity(1 << 20, fs::File::open(log)?);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            tally.lines += 1;
            let is = |event: &str| line.contains(event);
            if is("\"event\":\"established\"") {
                tally.established += 1;
                if is("\"pid\":null") {
                    tally.unnamed += 1;
                } else if !ours.iter().any(|pid| line.contains(pid)) {
                    tally.wrong += 1;
                }
            } else if is("\"event\":\"closed\"") {
                tally.closed += 1;
            } else if is("\"event\":\"stopped\"") {
                tally.take_last_words(&serde_json::from_str(&line)?).context("`stopped` lacks a number")?;
            }
            line.clear();
        }
        Ok(tally)
    }

    fn take_last_words(&mut self, stopped: &Value) -> Option<()> {
        let number = |name: &str| stopped[name].as_u64();
        let lost = stopped["lost"].as_object()?;
        let of = |place: &str| lost.get(place)?.as_u64();
        self.lost = lost.values().filter_map(Value::as_u64).sum();
        self.written = number("written")?;
        self.uneven = number("matched")?.abs_diff(number("delivered")? + of("ring")?)
            + number("made")?.abs_diff(self.written + of("log")?);
        Some(())
    }
}

/// A port for the daemon's metrics that nobody has just now.
pub(crate) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

/// How many refused dials the daemon has counted, once it has counted so many, or after some seconds.
pub(crate) fn refused(at: SocketAddr, expected: u64) -> Result<u64> {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let mut metrics = TcpStream::connect(at)?;
        write!(metrics, "GET /metrics HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        metrics.read_to_string(&mut text)?;
        let sample =
            |line: &str| line.strip_prefix("selfconn_refused_self_dials_total ")?.parse::<u64>().ok();
        let counted = text.lines().find_map(sample).context("the metrics lack refused dials")?;
        if counted >= expected || Instant::now() > until {
            return Ok(counted);
        }
        thread::sleep(Duration::from_millis(200));
    }
}
