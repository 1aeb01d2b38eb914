//! `doctor --live`: attaches the hooks as `run` would, makes a self-connection, and checks that each method
//! observed it.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use schemars::JsonSchema;
use selfconn_ebpf::{Record, state};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use crate::{
    bpf::{
        attach::{Method, RequestedHooks},
        bind_method::RequestedBindMethod,
        features::KernelFeatures,
        loader::{Tracer, TracerOptions},
        object::ObjectOptions,
        refused_connects::RefusedCounts,
    },
    daemon::self_test::{NOT_CONNECTED, recognition::Recognition, socket::SelfTestSocket},
    detect::probe_health::{DeadProbes, ProbeHealth, SelfTestOutcome},
};

/// Interval at which the ring buffer is drained during a test.
const DRAIN_INTERVAL: Duration = Duration::from_millis(10);

/// Result of the test.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct LiveTest {
    /// True if every method observed the connection and its record arrived through the ring buffer.
    pub(super) passed: bool,
    /// One entry for each method that `run` would attach.
    pub(super) methods: Vec<LiveMethod>,
    /// True if the record of the connection arrived through the ring buffer.
    pub(super) record: bool,
}

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct LiveMethod {
    pub(super) method: &'static str,
    pub(super) sees: bool,
}

/// After how many tests whose socket was not connected the command gives up.
const MAX_NOT_CONNECTED: u64 = 3;

/// Runs the test. A failed test is repeated, as in the daemon.
pub(super) fn test(features: &KernelFeatures) -> Result<LiveTest> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let options = TracerOptions {
            hooks: RequestedHooks::default(),
            bind_method: RequestedBindMethod::Off,
            object: ObjectOptions { ring_bytes: 1 << 20, ..ObjectOptions::MINIMAL },
        };
        let mut tracer = Tracer::start(features, options)?;
        let test = SelfTestSocket::prepare().map_err(|why| anyhow!(why))?;
        let mut recognition = Recognition::new(Some(test.cookie()), rustix::process::getuid().as_raw());
        let live: Vec<Method> = tracer.methods().live.iter().map(|(method, ())| *method).collect();
        let mut probe_health = ProbeHealth::new(live.clone(), Duration::ZERO, Instant::now());
        let dead = loop {
            sleep_until(probe_health.next_at()).await;
            probe_health.begin(tracer.counters()?, Instant::now());
            test.connect()?;
            let outcome = loop {
                let mut handle_record = |record: &Record, _: &RefusedCounts| {
                    if let Record::Transition(transition) = record {
                        let is_ours = recognition.is_ours(transition);
                        probe_health.on_record(is_ours, transition.new == state::ESTABLISHED);
                    }
                };
                while tracer.drain(1_024, &mut handle_record) > 0 {}
                let counters = tracer.counters()?;
                if let Some(outcome) = probe_health.evaluate(&counters, test.is_connected(), Instant::now()) {
                    break outcome;
                }
                tokio::time::sleep(DRAIN_INTERVAL).await;
            };
            test.disconnect();
            match outcome {
                SelfTestOutcome::Passed => break DeadProbes::default(),
                SelfTestOutcome::Failed(_) => {}
                SelfTestOutcome::HooksDead(dead) => break dead,
                SelfTestOutcome::NotConnected if probe_health.counts().not_connected < MAX_NOT_CONNECTED => {}
                SelfTestOutcome::NotConnected => bail!("{NOT_CONNECTED}"),
            }
        };
        let sees =
            |method: &Method| LiveMethod { method: method.name(), sees: !dead.methods.contains(method) };
        Ok(LiveTest {
            passed: dead == DeadProbes::default(),
            methods: live.iter().map(sees).collect(),
            record: !dead.ring && dead.methods.len() < live.len(),
        })
    })
}
