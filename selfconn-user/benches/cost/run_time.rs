//! The run time of the programs, measured by the kernel, and that of empty ones on the same connections.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};

use crate::{
    generate::TrafficMade,
    measure::{COUNT, Measurement, PLAIN, make},
    net::NetNamespace,
    programs::{self, ProgramStats},
    tracer::TracerProcess,
};

/// Run time of the programs, measured by the kernel: compared with empty ones, and for self-addressed
/// connects.
pub(crate) fn transition(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    let methods = measurement.methods()?;
    measurement.samples.facts.insert("methods".to_owned(), methods.join(" and "));
    let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
    for round in 0..measurement.rounds(25) {
        compare_with_empty(measurement, round, &net, &methods)?;
        self_addressed(measurement, &net, &methods)?;
    }
    Ok(())
}

/// Both run on the same transitions, so that whatever slows the host slows both. Each is attached first
/// once.
fn compare_with_empty(
    measurement: &mut Measurement,
    round: usize,
    net: &NetNamespace,
    methods: &[String],
) -> Result<()> {
    let mut each = BTreeMap::<_, Vec<f64>>::new();
    for first in [true, false] {
        let start = |ours: bool| if ours { measurement.start(&[]) } else { TracerProcess::empty(methods) };
        let tracers = [(first, start(first)?), (!first, start(!first)?)];
        let before = tracers.iter().map(|(_, tracer)| programs::of_process(tracer.pid()));
        let before = before.collect::<Result<Vec<_>>>()?;
        make(net, &PLAIN)?;
        for ((ours, tracer), before) in tracers.into_iter().zip(before) {
            for stats in programs::since(&before, programs::of_process(tracer.pid())?) {
                let Some(method) = method_of(&stats.name, methods) else { continue };
                each.entry((ours, method)).or_default().push(stats.ns as f64 / stats.runs as f64);
                if round == 0 && ours && first {
                    let insns = stats.verified_insns.map_or("?".to_owned(), |count| count.to_string());
                    let text = format!("{insns} insns verified, {} bytes of machine code", stats.jited_bytes);
                    measurement.samples.facts.insert(format!("program.{method}"), text);
                }
            }
            tracer.stop()?;
        }
    }
    for ((ours, method), both) in each {
        let whose = if ours { "ours" } else { "empty" };
        measurement
            .sample(&format!("transition.{whose}.{method}"), both.iter().sum::<f64>() / both.len() as f64);
    }
    Ok(())
}

/// The additional run time of our programs for connects of an address to itself, over connections of two
/// addresses.
fn self_addressed(measurement: &mut Measurement, net: &NetNamespace, methods: &[String]) -> Result<()> {
    let tracer = measurement.start(&[])?;
    let cost = |arguments: &[&str]| -> Result<(TrafficMade, Vec<ProgramStats>)> {
        let before = programs::of_process(tracer.pid())?;
        let made = make(net, arguments)?;
        Ok((made, programs::since(&before, programs::of_process(tracer.pid())?)))
    };
    let options = ["--to", "127.0.0.1", "--count", COUNT, "--cpu", "1"];
    for (what, kind) in [
        ("outside", &["churn", "--outside"][..]),
        ("connect", &["churn"]),
        ("refused", &["refused"]),
        ("self", &["selves"]),
    ] {
        let (_, plain) = cost(&PLAIN)?;
        let (made, stats) = cost(&[kind, &options].concat())?;
        let beyond = stats.iter().filter_map(|stats| {
            method_of(&stats.name, methods)?;
            let plain = plain.iter().find(|plain| plain.name == stats.name)?;
            Some(stats.ns as f64 - stats.runs as f64 * plain.ns as f64 / plain.runs as f64)
        });
        measurement.sample(&format!("self_addressed.{what}"), beyond.sum::<f64>() / made.count as f64);
    }
    tracer.stop()
}

/// The method of a program on a hook of transitions. The daemon has programs on other hooks, too.
fn method_of<'a>(name: &str, methods: &'a [String]) -> Option<&'a str> {
    let name = name.strip_prefix("selfconn_").or(name.strip_prefix("empty_"))?;
    methods.iter().map(String::as_str).find(|method| *method == name)
}
