//! Reports losses: emits `lost` for what was lost since the last report, by cause. The parts of the daemon,
//! the outputs and the eBPF programs count; this file only compares with what is reported already.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use selfconn_ebpf::{Owner, owner::OwnerState};
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

/// Maximum number of owners and causes. Beyond it, the owners are dropped that the programs do not count any more.
const MAX_REPORTED_OWNERS: usize = 4_096;

/// The losses that are reported, and when to look for others.
#[derive(Default)]
pub(super) struct LossReporter {
    reported: Losses,
    /// What is reported of each owner.
    reported_by_owner: HashMap<(Owner, LossKey), u64>,
    report_at: Option<Instant>,
}

/// The causes that the programs count by owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum LossKey {
    Openers,
    RefusedConnects,
    BindFailures,
}

impl LossKey {
    fn of(cause: LossCause) -> Option<Self> {
        match cause {
            LossCause::OpenerTable => Some(Self::Openers),
            LossCause::RefusedTable => Some(Self::RefusedConnects),
            LossCause::Binds => Some(Self::BindFailures),
            _ => None,
        }
    }
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

    /// Emits `lost` for each cause with more losses than reported. `totals` are those of the run so far. `owners` are
    /// asked for only if an owner has lost something; `counted` gives what the daemon counted by owner since the last
    /// call.
    pub(super) fn report<I: Iterator<Item = (Owner, OwnerState)>>(
        &mut self,
        totals: &Losses,
        owners: impl Fn() -> I,
        mut counted: impl FnMut(LossCause) -> Vec<(Owner, u64)>,
        out: &mut Outputs,
    ) {
        self.prune(&owners);
        for cause in LossCause::ALL {
            let (total, reported) = (totals.get(cause), self.reported.get(cause));
            if total > reported && !out.is_pending(cause) {
                self.reported.set(cause, total);
                if cause == LossCause::Suppressed {
                    for events in out.take_suppressed() {
                        out.emit(EventKind::Lost(Lost::suppressed(events)));
                    }
                } else {
                    let mut rest = total - reported;
                    for (owner, count) in counted(cause) {
                        let count = count.min(rest);
                        if owner != Owner::UNKNOWN && count > 0 {
                            rest -= count;
                            out.emit(EventKind::Lost(Lost::of_user(cause, count, owner.uid)));
                        }
                    }
                    if let Some(key) = LossKey::of(cause) {
                        for (owner, state) in owners() {
                            let count = self.unreported(owner, key, &state).min(rest);
                            rest -= count;
                            if count > 0 {
                                out.emit(EventKind::Lost(Lost::of_user(cause, count, owner.uid)));
                            }
                        }
                    }
                    // Losses of owners whose entries the programs have evicted.
                    if rest > 0 {
                        out.emit(EventKind::Lost(Lost::new(cause, rest, None)));
                    }
                }
            }
        }
    }

    /// Forgets the owners whose entries the programs have evicted.
    fn prune<I: Iterator<Item = (Owner, OwnerState)>>(&mut self, owners: impl Fn() -> I) {
        if self.reported_by_owner.len() > MAX_REPORTED_OWNERS {
            let known: HashSet<Owner> = owners().map(|(owner, _)| owner).collect();
            self.reported_by_owner.retain(|(owner, _), _| known.contains(owner));
        }
    }

    /// What this owner has lost since the last call.
    fn unreported(&mut self, owner: Owner, key: LossKey, state: &OwnerState) -> u64 {
        let total = match key {
            LossKey::Openers => state.lost_openers,
            LossKey::RefusedConnects => state.lost_refused_connects,
            LossKey::BindFailures => state.lost_bind_failures,
        };
        let reported = self.reported_by_owner.insert((owner, key), total).unwrap_or(0);
        // The programs may have dropped the owner meanwhile, and counted from zero again.
        total.checked_sub(reported).unwrap_or(total)
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
