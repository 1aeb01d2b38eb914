//! What `bind()` costs: the run time of the programs, measured by the kernel, and calls a second. Both beside empty
//! programs.

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};

use crate::{
    measure::{COUNT, Measurement, make},
    net::NetNamespace,
    programs,
    tracer::TracerProcess,
};

/// The name of an empty program for this method of bind(): see [`TracerProcess::empty`].
pub(crate) fn bind_method(name: &str) -> String {
    format!("bind-{name}")
}

/// While no self-connection exists.
pub(crate) fn measure(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    let started = measurement.started()?;
    let Some(method) = started["binds"]["method"].as_str() else {
        measurement.samples.skipped.insert("bind.bind()".to_owned(), "no method can be attached".to_owned());
        return Ok(());
    };
    measurement.samples.facts.insert("bind.method".to_owned(), method.to_owned());
    let empty = [bind_method(method)];
    run_time(measurement, &net, &empty)?;
    rate(measurement, &net, &empty)
}

/// Our programs and the empty ones run on the same calls, and each is attached first in turns.
fn run_time(measurement: &mut Measurement, net: &NetNamespace, empty: &[String]) -> Result<()> {
    let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
    for round in 0..measurement.rounds(40) {
        let ours_first = round % 2 == 0;
        let start = |ours: bool| if ours { measurement.start(&[]) } else { TracerProcess::empty(empty) };
        let tracers = [(ours_first, start(ours_first)?), (!ours_first, start(!ours_first)?)];
        let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
        let before = before.collect::<Result<Vec<_>>>()?;
        let made = make(net, &["bind", "--count", COUNT, "--cpu", "1"])?;
        for ((ours, tracer), before) in tracers.into_iter().zip(before) {
            let stats = programs::since(&before, programs::of_process(tracer.pid())?);
            // The kernel cuts the name after 15 bytes.
            let ns = stats.iter().filter(|stats| stats.name.contains("_bind_")).map(|stats| stats.ns);
            let name = if ours { "bind.ours" } else { "bind.empty" };
            measurement.sample(name, ns.sum::<u64>() as f64 / made.count as f64);
            tracer.stop()?;
        }
    }
    Ok(())
}

/// Sockets a second that are made, bound and closed, while the kernel does not measure the programs. The other tools
/// don't look at bind().
fn rate(measurement: &mut Measurement, net: &NetNamespace, empty: &[String]) -> Result<()> {
    let rate = || -> Result<f64> { Ok(make(net, &["bind", "--count", "20000", "--cpu", "1"])?.rate()) };
    rate()?;
    for _ in 0..measurement.rounds(20) {
        measurement.sample("bind.rate.none", rate()?);
        let tracer = TracerProcess::empty(empty)?;
        measurement.sample("bind.rate.empty", rate()?);
        tracer.stop()?;
        let tracer = measurement.start(&[])?;
        measurement.sample("bind.rate.ours", rate()?);
        tracer.stop()?;
    }
    Ok(())
}
