//! What the daemon itself costs: while nothing happens, from a connect to the line in the log, and at a high rate.

use std::{
    fs,
    io::{Read as _, Seek as _, SeekFrom},
    path::Path,
    process::{Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};

use crate::{
    generate::{TrafficMade, pin, self_connection},
    log::{self, LogCounts},
    measure::Measurement,
    net::{NetNamespace, finish},
    proc,
};

/// Costs while nothing happens.
pub(crate) fn idle(measurement: &mut Measurement) -> Result<()> {
    measurement.sample("binary", fs::metadata(&measurement.daemon)?.len() as f64);
    for _ in 0..measurement.rounds(20) {
        let began = Instant::now();
        let tracer = measurement.start(&[])?;
        measurement.sample("start", began.elapsed().as_secs_f64() * 1e3);
        tracer.stop()?;
    }
    let tracer = measurement.start(&[])?;
    // The daemon reads the socket table at its start, and then once a minute.
    thread::sleep(Duration::from_secs(3));
    let seconds = if measurement.quick { 6 } else { 50 };
    let before = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
    thread::sleep(Duration::from_secs(seconds));
    let after = (proc::sleeps(tracer.pid())?, proc::on_cpu(tracer.pid())?);
    let minutes = seconds as f64 / 60.0;
    measurement.sample("idle.wakeups", (after.0 - before.0) as f64 / minutes);
    measurement.sample("idle.cpu_us", (after.1 - before.1).as_secs_f64() * 1e6 / minutes);
    let memory = proc::memory(tracer.pid())?;
    measurement.sample("idle.rss", memory.own as f64);
    measurement.sample("idle.rss_with_ring", memory.all as f64);
    tracer.stop()
}

/// From before `connect()` until the line is in the log.
pub(crate) fn latency(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    let log = measurement.scratch.join("latency.jsonl");
    let tracer = measurement.start(&["--log", text(&log)?])?;
    let count = if measurement.quick { 300 } else { 2_000 };
    const EVENT_TIMEOUT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };
    let latencies = net.inside(|| {
        pin(1)?;
        let mut latencies = Vec::new();
        let mut file = fs::File::open(&log)?;
        file.seek(SeekFrom::End(0))?;
        // Polling the file would take the daemon's CPU, so inotify waits, as in `tail -f`.
        let written = inotify::init(inotify::CreateFlags::CLOEXEC)?;
        inotify::add_watch(&written, &log, inotify::WatchFlags::MODIFY)?;
        let mut notices = [0; 4 << 10];
        let mut seen = Vec::new();
        for _ in 0..count {
            // The daemon finishes its work on the last connection.
            thread::sleep(Duration::from_millis(5));
            seen.clear();
            let began = Instant::now();
            let (socket, port) = self_connection([127, 0, 0, 1].into())?;
            let wanted = format!("\"port\":{port},");
            loop {
                file.read_to_end(&mut seen)?;
                let lines = String::from_utf8_lossy(&seen);
                if lines.lines().any(|line| line.contains("\"established\"") && line.contains(&wanted)) {
                    break;
                }
                let mut waits = [PollFd::new(&written, PollFlags::IN)];
                ensure!(poll(&mut waits, Some(&EVENT_TIMEOUT))? > 0, "an event does not come");
                rustix::io::read(&written, &mut notices)?;
            }
            latencies.push(began.elapsed().as_secs_f64() * 1e6);
            drop(socket);
        }
        Ok(latencies)
    })?;
    latencies.into_iter().for_each(|latency| measurement.sample("latency", latency));
    tracer.stop()?;
    Ok(fs::remove_file(&log)?)
}

/// Self-connections and refused connects at a high rate.
pub(crate) fn flood(measurement: &mut Measurement) -> Result<()> {
    let seconds = if measurement.quick { 4 } else { 60 };
    flooded(measurement, "one", &[&["selves", "--rate", "45000", "--cpu", "1"]], seconds)?;
    let seconds = if measurement.quick { 3 } else { 15 };
    flooded(
        measurement,
        "two",
        &[&["selves", "--cpu", "0"], &["selves", "--cpu", "1", "--to", "127.0.0.3"]],
        seconds,
    )?;
    flooded(measurement, "refused", &[&["refused", "--rate", "60000", "--cpu", "1"]], seconds)
}

fn flooded(measurement: &mut Measurement, name: &str, generators: &[&[&str]], seconds: u64) -> Result<()> {
    let net = NetNamespace::new()?;
    let file = measurement.scratch.join("flood.jsonl");
    let metrics = log::free_address()?;
    // In a minute it grows beyond the usual limit.
    let limits = ["--log-limit", "none"];
    let address = metrics.to_string();
    let options = [&["--log", text(&file)?, "--metrics", &address], &limits[..]].concat();
    let tracer = measurement.start(&options)?;
    let (began, cpu) = (Instant::now(), proc::on_cpu(tracer.pid())?);
    let mut children = Vec::new();
    for generator in generators {
        let duration = seconds.to_string();
        let arguments =
            [&["generate"], *generator, &["--count", "100000000", "--seconds", &duration]].concat();
        let mut command = net.helper(&arguments);
        children.push(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
    }
    let pids: Vec<u32> = children.iter().map(Child::id).collect();
    thread::sleep(Duration::from_secs(seconds).mul_f64(0.3));
    let early = proc::memory(tracer.pid())?;
    thread::sleep(Duration::from_secs(seconds).mul_f64(0.6));
    let late = proc::memory(tracer.pid())?;
    let mut made = 0;
    for child in children {
        let made_by_one: TrafficMade = serde_json::from_str(&finish(child)?)?;
        measurement.sample(&format!("flood.{name}.rate"), made_by_one.rate());
        made += made_by_one.count;
    }
    let cores = (proc::on_cpu(tracer.pid())? - cpu).as_secs_f64() / began.elapsed().as_secs_f64();
    let refused = log::refused_connects(metrics, if name == "refused" { made } else { 0 })?;
    tracer.stop()?;
    let counts = LogCounts::read(&file, &pids)?;
    fs::remove_file(&file)?;
    let mut number = |what: &str, value: f64| measurement.sample(&format!("flood.{name}.{what}"), value);
    number("made", made as f64);
    number("established", counts.established as f64);
    number("closed", counts.closed as f64);
    number("wrong", counts.wrong as f64);
    number("unnamed", counts.unnamed as f64);
    number("refused", refused as f64);
    number("lost", counts.lost as f64);
    number("sum_error", counts.sum_error as f64);
    number("lines", counts.lines as f64);
    number("written", counts.written as f64);
    number("cores", cores);
    number("rss", late.own as f64);
    number("rss_growth", late.own as f64 / early.own as f64);
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}
