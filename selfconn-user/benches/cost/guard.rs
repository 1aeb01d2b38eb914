//! What the guard costs: each packet on `lo`, round trips and throughput on loopback, a refusal, and the time until all
//! namespaces are guarded.

use std::{
    io, thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use aya::sys::{Stats, enable_stats};
use serde_json::Value;

use crate::{
    generate::{TrafficMade, self_connection},
    log,
    measure::{Measurement, make},
    net::NetNamespace,
    programs,
    socket_crowd::SocketHelpers,
    tracer::TracerProcess,
};

/// The options of a daemon that guards.
const REFUSE: [&str; 2] = ["--guard", "refuse"];

/// How long it may take until all namespaces are guarded. The daemon attaches at a bounded rate.
const DEADLINE: Duration = Duration::from_secs(120);

/// The names of an empty program on the egress of `lo`, before and after the other programs there: see
/// [`crate::empty`].
pub(crate) const EMPTY_FIRST: &str = "lo-first";
pub(crate) const EMPTY_LAST: &str = "lo-last";

pub(crate) fn measure(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    match measurement.start(&REFUSE) {
        Ok(daemon) => {
            let started: Value = serde_json::from_str(&daemon.first)?;
            daemon.stop()?;
            if started["guard"]["method"] == "tcx" {
                packet(measurement, &net)?;
            } else {
                skip(measurement, "before Linux 6.6 there is no order of programs in which both take turns");
            }
        }
        Err(why) => {
            skip(measurement, &format!("{why:#}"));
            return Ok(());
        }
    }
    loopback(measurement, &net)?;
    refusal(measurement, &net)?;
    drop(net);
    attach(measurement)
}

fn skip(measurement: &mut Measurement, why: &str) {
    measurement.samples.skipped.insert("guard.packet".to_owned(), why.to_owned());
}

/// Run time of the program for a packet, measured by the kernel, and of an empty one on the same packets.
fn packet(measurement: &mut Measurement, net: &NetNamespace) -> Result<()> {
    let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
    for round in 0..measurement.rounds(20) {
        let empty = [EMPTY_FIRST, EMPTY_LAST][round % 2];
        let daemon = guarding(measurement, net)?;
        let tracers = [(true, daemon), (false, TracerProcess::start(net.helper(&["empty", empty]))?)];
        let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
        let before = before.collect::<Result<Vec<_>>>()?;
        make(net, &["round-trips", "--count", "20000", "--cpu", "1"])?;
        for ((ours, tracer), before) in tracers.into_iter().zip(before) {
            let (program, name) = if ours {
                ("selfconn_guard", "guard.packet.ours")
            } else {
                ("empty_lo", "guard.packet.empty")
            };
            let stats = programs::since(&before, programs::of_process(tracer.pid())?);
            let stats = stats.into_iter().find(|stats| stats.name == program);
            let stats = stats.with_context(|| format!("{program} is not loaded"))?;
            ensure!(stats.runs > 0, "{program} did not run");
            measurement.sample(name, stats.ns as f64 / stats.runs as f64);
            tracer.stop()?;
        }
    }
    Ok(())
}

/// Round trips and throughput of a connection, with a daemon that guards and with one that doesn't.
fn loopback(measurement: &mut Measurement, net: &NetNamespace) -> Result<()> {
    for round in 0..measurement.rounds(20) {
        for guards in [round % 2 == 0, round % 2 != 0] {
            let (daemon, which) = match guards {
                true => (guarding(measurement, net)?, "with"),
                false => (measurement.start(&[])?, "without"),
            };
            for (kind, count) in [("round-trips", "10000"), ("bulk", "2000")] {
                // Other work on the host can only make it slower, so the best of three is taken.
                let mut best = 0_f64;
                for _ in 0..3 {
                    best = best.max(make(net, &[kind, "--count", count, "--cpu", "1"])?.rate());
                }
                measurement.sample(&format!("guard.{kind}.{which}"), best);
            }
            daemon.stop()?;
        }
    }
    Ok(())
}

/// A connect to itself that is refused, and one to a closed port, by the same kind of client under the same daemon.
fn refusal(measurement: &mut Measurement, net: &NetNamespace) -> Result<()> {
    let daemon = guarding(measurement, net)?;
    for round in 0..measurement.rounds(40) {
        let mut kinds = [("prevented", "guard.refused.itself"), ("closed-port", "guard.refused.closed")];
        kinds.rotate_left(round % 2);
        for (kind, name) in kinds {
            let made = make(net, &[kind, "--count", "3000", "--cpu", "1"])?;
            ensure!(made.others == 0, "{kind}: {} connects had another result", made.others);
            measurement.sample(name, ns_each(made));
        }
    }
    daemon.stop()
}

fn ns_each(made: TrafficMade) -> f64 {
    made.elapsed_ns as f64 / made.count as f64
}

/// The time from the daemon's start until it guards all namespaces. Each has a process.
fn attach(measurement: &mut Measurement) -> Result<()> {
    let mut namespaces = Vec::new();
    for count in [1, 200] {
        while namespaces.len() < count {
            let net = NetNamespace::new()?;
            namespaces.push((SocketHelpers::new(&net, 2)?, net));
        }
        for _ in 0..measurement.rounds(if count == 1 { 10 } else { 3 }) {
            let metrics = log::free_address()?;
            let began = Instant::now();
            let daemon = measurement.start(&[&REFUSE[..], &["--metrics", &metrics.to_string()]].concat())?;
            // With that of this process.
            while log::metric(metrics, "selfconn_guarded_namespaces")? <= count as u64
                || log::metric(metrics, "selfconn_unguarded_namespaces")? > 0
            {
                ensure!(began.elapsed() < DEADLINE, "{count} namespaces are not guarded");
                thread::sleep(Duration::from_millis(5));
            }
            measurement.sample(&format!("guard.attach.{count}"), began.elapsed().as_secs_f64() * 1e3);
            daemon.stop()?;
        }
    }
    Ok(())
}

/// A daemon that guards this namespace.
fn guarding(measurement: &Measurement, net: &NetNamespace) -> Result<TracerProcess> {
    let daemon = measurement.start(&REFUSE)?;
    let until = Instant::now() + DEADLINE;
    net.inside(|| {
        loop {
            match self_connection([127, 0, 0, 1].into()) {
                Err(error) if is_refused(&error) => return Ok(()),
                Err(error) => return Err(error),
                Ok(_) => ensure!(Instant::now() < until, "a namespace is not guarded"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    })?;
    Ok(daemon)
}

fn is_refused(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
