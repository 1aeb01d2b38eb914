//! `doctor --live`: attaches what `run` would, makes a self-connection of its own, and asks each method whether it saw it.

use std::time::Duration;

use anyhow::{Result, anyhow};
use selfconn_ebpf::{Record, state};
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use crate::{
    kernel::{
        attach::{Method, Wanted},
        host::Host,
        tracer::{Options, Tracer},
    },
    selftest::SelfTest,
    watchdog::{Dead, Verdict, Watchdog},
};

/// How often the ring buffer is looked at while a test goes on.
const LOOK: Duration = Duration::from_millis(10);

/// What came of it.
#[derive(Debug, Serialize)]
pub(super) struct Live {
    /// Whether every method saw it, and its record came through the ring buffer.
    pub(super) passed: bool,
    /// Each method that `run` would attach.
    pub(super) methods: Vec<Sees>,
    /// Whether the record came.
    pub(super) record: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Sees {
    pub(super) method: &'static str,
    pub(super) sees: bool,
}

/// Tries it. A test that fails is repeated, as the daemon does.
pub(super) fn test(host: &Host) -> Result<Live> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let options = Options {
            wanted: Wanted::default(),
            binds: crate::kernel::tracer::binds::WantedBinds::Off,
            ring_bytes: 1 << 20,
            dials: 64,
            refusals: 64,
            states: false,
            log: false,
        };
        let mut tracer = Tracer::start(host, options)?;
        let test = SelfTest::prepare().map_err(|why| anyhow!(why))?;
        let live: Vec<Method> = tracer.methods().live.iter().map(|(method, ())| *method).collect();
        let mut watchdog = Watchdog::new(live.clone(), Duration::ZERO, Instant::now());
        let dead = loop {
            sleep_until(watchdog.next()).await;
            watchdog.begin(tracer.counters()?, Instant::now());
            test.connect()?;
            let verdict = loop {
                let mut hear = |record: &Record| {
                    if let Record::Transition(t) = record {
                        watchdog.record(test.owns(t), t.new == state::ESTABLISHED);
                    }
                };
                while tracer.drain(1_024, &mut hear) > 0 {}
                if let Some(verdict) = watchdog.judge(&tracer.counters()?, Instant::now()) {
                    break verdict;
                }
                tokio::time::sleep(LOOK).await;
            };
            test.disconnect();
            match verdict {
                Verdict::Passed => break Dead::default(),
                Verdict::Failed(_) => {}
                Verdict::Blind(dead) => break dead,
            }
        };
        let sees = |method: &Method| Sees { method: method.name(), sees: !dead.methods.contains(method) };
        Ok(Live {
            passed: dead == Dead::default(),
            methods: live.iter().map(sees).collect(),
            record: !dead.ring && dead.methods.len() < live.len(),
        })
    })
}
