//! A measurement: the daemon that is measured, the samples so far, and the traffic that is made for it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{
    generate::TrafficMade,
    net::{NetNamespace, output},
    report::Samples,
    tracer::TracerProcess,
};

/// The daemon to measure, and the samples so far.
pub(crate) struct Measurement {
    pub(crate) daemon: PathBuf,
    pub(crate) quick: bool,
    /// A directory for logs.
    pub(crate) scratch: PathBuf,
    pub(crate) samples: Samples,
}

impl Measurement {
    pub(crate) fn new(daemon: &Path, quick: bool, scratch: &Path) -> Self {
        let (daemon, scratch) = (daemon.to_owned(), scratch.to_owned());
        Self { daemon, quick, scratch, samples: Samples::default() }
    }

    pub(crate) fn rounds(&self, full: usize) -> usize {
        if self.quick { full.div_ceil(5) } else { full }
    }

    pub(crate) fn sample(&mut self, name: &str, value: f64) {
        self.samples.add(name, value);
    }

    pub(crate) fn start(&self, options: &[&str]) -> Result<TracerProcess> {
        TracerProcess::daemon(&self.daemon, options)
    }

    /// The methods that the daemon chooses on this kernel.
    pub(crate) fn methods(&self) -> Result<Vec<String>> {
        let started = self.started()?;
        let hooks = started["hooks"].as_array().context("no hooks in `started`")?;
        Ok(hooks.iter().filter_map(|hook| hook["method"].as_str()).map(str::to_owned).collect())
    }

    /// The first event of the daemon.
    pub(crate) fn started(&self) -> Result<Value> {
        let tracer = self.start(&[])?;
        let started = serde_json::from_str(&tracer.first)?;
        tracer.stop()?;
        Ok(started)
    }
}

/// The number of connects for which the kernel measures the programs.
pub(crate) const COUNT: &str = "3000";

/// Connections of two addresses, which selfconn ignores.
pub(crate) const PLAIN: [&str; 7] = ["churn", "--to", "127.0.0.2", "--count", COUNT, "--cpu", "1"];

/// Runs a generator in this namespace.
pub(crate) fn make(net: &NetNamespace, arguments: &[&str]) -> Result<TrafficMade> {
    Ok(serde_json::from_str(&output(net.helper(&[&["generate"], arguments].concat()))?)?)
}
