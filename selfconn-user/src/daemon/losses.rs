//! Reports losses: emits `lost` for what was lost since the last report, by cause. The parts of the daemon,
//! the outputs and the eBPF programs count; this file only compares with what is reported already.

use std::time::Duration;

use tokio::time::Instant;

use crate::{
    bpf::attach::Method,
    detect::probe_health::DeadProbes,
    event::{EventKind, LossCause, Losses, Lost},
    output::Outputs,
};

/// Delay from the first record until the probes' counters are read and losses are reported. While an output
/// is not writable, losses are checked again after the same delay.
const LOSS_REPORT_DELAY: Duration = Duration::from_secs(1);

/// The losses that are reported, and when to look for others.
#[derive(Default)]
pub(super) struct LossReporter {
    reported: Losses,
    report_at: Option<Instant>,
}

impl LossReporter {
    /// Time of the next report.
    pub(super) fn next_at(&self) -> Option<Instant> {
        self.report_at
    }

    /// Schedules a report, because records were drained.
    pub(super) fn on_records(&mut self) {
        self.report_at.get_or_insert_with(|| Instant::now() + LOSS_REPORT_DELAY);
    }

    /// The time of [`Self::next_at`] has come, and the losses are reported. Schedules the next report if an
    /// output has pending events.
    pub(super) fn reschedule(&mut self, out: &Outputs) {
        self.report_at = out.has_pending().then(|| Instant::now() + LOSS_REPORT_DELAY);
    }

    /// Emits `lost` for each cause with more losses than reported. `totals` are those of the run so far.
    pub(super) fn report(&mut self, totals: &Losses, out: &mut Outputs) {
        for cause in LossCause::ALL {
            let (total, reported) = (totals.get(cause), self.reported.get(cause));
            if total > reported && !out.is_pending(cause) {
                self.reported.set(cause, total);
                if cause == LossCause::Suppressed {
                    for events in out.take_suppressed() {
                        out.emit(EventKind::Lost(Lost::suppressed(events)));
                    }
                } else {
                    out.emit(EventKind::Lost(Lost::new(cause, total - reported, None)));
                }
            }
        }
    }

    /// Emits `lost` for each method that no longer observes connections. If all methods do and only the ring
    /// buffer does not, one event has no method.
    pub(super) fn report_dead_hooks(&mut self, dead: &DeadProbes, out: &mut Outputs) {
        let ring_only = (dead.ring && dead.methods.is_empty()).then_some(None);
        for method in dead.methods.iter().copied().map(Some).chain(ring_only) {
            out.emit(EventKind::Lost(Lost::new(LossCause::Hooks, 1, method.map(Method::name))));
            self.reported.set(LossCause::Hooks, self.dead_hooks() + 1);
        }
    }

    /// Number of methods that no longer observe connections. All are reported.
    pub(super) fn dead_hooks(&self) -> u64 {
        self.reported.get(LossCause::Hooks)
    }
}
