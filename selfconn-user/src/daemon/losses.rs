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
    budget::OwnerLosses,
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

    /// Schedules a report, because something has happened of which a part may be lost.
    pub(super) fn schedule(&mut self) {
        self.report_at.get_or_insert_with(|| Instant::now() + LOSS_REPORT_DELAY);
    }

    /// The time of [`Self::next_at`] has come, and the losses are reported. Schedules the next report if an
    /// output has pending events.
    pub(super) fn reschedule(&mut self, out: &Outputs) {
        self.report_at = out.has_pending().then(|| Instant::now() + LOSS_REPORT_DELAY);
    }

    /// Emits `lost` for each cause with more losses than reported. `totals` are those of the run so far. `owners` are
    /// asked for only if an owner has lost something; `counted` gives what the daemon counted by owner since the last
    /// call. A report names few owners, because a container's root may lose something as any of its users: the other
    /// losses are in one event.
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
                    let mut by_owner = OwnerLosses::default();
                    let counted = match cause {
                        LossCause::Log => out.take_over_share(),
                        _ => counted(cause),
                    };
                    for (owner, count) in counted {
                        by_owner.count(owner, count);
                    }
                    if let Some(key) = LossKey::of(cause) {
                        for (owner, state) in owners() {
                            let count = self.unreported(owner, key, &state);
                            if count > 0 {
                                by_owner.count(owner, count);
                            }
                        }
                    }
                    let mut rest = total - reported;
                    for (owner, count) in by_owner.take_unreported() {
                        let count = count.min(rest);
                        if owner != Owner::UNKNOWN && count > 0 {
                            rest -= count;
                            out.emit(EventKind::Lost(Lost::of_user(cause, count, owner.uid)));
                        }
                    }
                    // Also those of owners whose entries the programs have evicted.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        budget::{cmdline::CmdlineLimit, log::LogRate},
        event::Envelope,
        output::{OutputLimits, log_file::LogFile},
        system::identity::Identity,
    };

    #[test]
    fn a_report_names_few_owners_and_has_the_losses_of_all() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let envelope = Envelope::new(&Identity::read(None).unwrap());
        let limits = OutputLimits { rate: LogRate::new(1), cmdline: CmdlineLimit::Off };
        let mut out = Outputs::new(None, Some(LogFile::open(&path).unwrap()), envelope, limits).unwrap();
        let mut reporter = LossReporter::default();
        // A container's root that fails to bind as one user after another.
        let owners = || {
            (0..1_000).map(|uid| {
                let mut state = OwnerState::ZERO;
                state.lost_bind_failures = 2;
                (Owner::new(uid, 7), state)
            })
        };
        let totals = Losses::from([(LossCause::Binds, 2_003)]);
        for _ in 0..2 {
            reporter.report(&totals, owners, |_| vec![(Owner::new(5_000, 8), 3)], &mut out);
        }
        out.flush().unwrap();
        let lines = std::fs::read_to_string(&path).unwrap();
        let counts: Vec<u64> = lines
            .lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()["count"].as_u64().unwrap())
            .collect();
        assert_eq!((counts.len(), counts.iter().sum::<u64>()), (65, 2_003));
        assert!(lines.contains(r#""uid":5000"#), "who is counted by the daemon comes first");
    }
}
