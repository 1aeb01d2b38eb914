//! Connections a second with each single method and each pair of methods that do not share a recursion guard: what the
//! second program costs, on the same hook and on another one.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::Value;

use crate::{
    measure::{Measurement, make},
    net::NetNamespace,
};

/// Single methods, and pairs without a shared recursion guard, with the options that attach just these.
const METHODS: [(&str, &[&str]); 9] = [
    ("tp_btf", &["--hooks", "tracepoint", "--tracepoint-method", "tp_btf"]),
    ("perf", &["--hooks", "tracepoint", "--tracepoint-method", "perf"]),
    ("fentry", &["--hooks", "function", "--function-method", "fentry"]),
    ("kprobe", &["--hooks", "function", "--function-method", "kprobe"]),
    ("tp_btf + kprobe", &["--hooks", "both", "--tracepoint-method", "tp_btf", "--function-method", "kprobe"]),
    ("tp_btf + perf", &["--hooks", "tracepoint"]),
    ("perf + fentry", &["--hooks", "both", "--tracepoint-method", "perf", "--function-method", "fentry"]),
    ("fentry + kprobe", &["--hooks", "function"]),
    ("tp_btf + fentry", &["--hooks", "both", "--tracepoint-method", "tp_btf", "--function-method", "fentry"]),
];

/// Measures the ones that this kernel supports, in turns.
pub(crate) fn measure(measurement: &mut Measurement) -> Result<()> {
    let net = NetNamespace::new()?;
    let churn = || -> Result<f64> {
        Ok(make(&net, &["churn", "--to", "127.0.0.2", "--count", "4000", "--cpu", "1"])?.rate())
    };
    let mut attachable = Vec::new();
    for (name, options) in METHODS {
        let Ok(daemon) = measurement.start(options) else { continue };
        let started: Value = serde_json::from_str(&daemon.first)?;
        daemon.stop()?;
        let hooks = started["hooks"].as_array().into_iter().flatten();
        let live: BTreeSet<_> = hooks.filter_map(|hook| hook["method"].as_str()).collect();
        // If the options name no method, the daemon attaches what the kernel supports, which may be only one method.
        if live == name.split(" + ").collect() {
            attachable.push((name, options));
        }
    }
    churn()?;
    for _ in 0..measurement.rounds(20) {
        measurement.sample("pairs.none", churn()?);
        for (name, options) in &attachable {
            let daemon = measurement.start(options)?;
            measurement.sample(&format!("pairs.{name}"), churn()?);
            daemon.stop()?;
        }
    }
    Ok(())
}
