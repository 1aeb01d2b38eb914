//! Early warning, wired: the programs say that a port is dialled often, the range of its namespace is asked for, and
//! `risk` decides what is told. While no port is dialled often there is no clock running here.

use std::{collections::HashMap, io, rc::Rc, time::Duration};

use selfconn_ebpf::risk::Target;

use super::ranges::{Answer, Ranges};
use crate::{
    clock::{self, Offset},
    connection::Place,
    event::{
        What,
        risk::{AtRisk, AtRiskOver},
    },
    kernel::tracer::Refusals,
    process::{Processes, Sighting},
    risk::{Dials, Happening, Risks},
    sink::Sinks,
};

pub(super) struct Watch {
    risks: Risks,
    ranges: Ranges,
    /// What was asked about, until the answer is there.
    asked: Vec<Target>,
}

/// What it takes to tell an event.
pub(super) struct Teller<'a> {
    pub(super) processes: &'a mut Processes,
    pub(super) out: &'a mut Sinks,
}

impl Watch {
    pub(super) fn start() -> io::Result<Self> {
        Ok(Self { risks: Risks::default(), ranges: Ranges::start()?, asked: Vec::new() })
    }

    /// The programs say that this port is dialled often.
    pub(super) fn heed(&mut self, target: Target) {
        self.risks.heed(target);
    }

    /// How many ports are at risk now.
    pub(super) fn at_risk(&self) -> usize {
        self.risks.at_risk()
    }

    /// How long nothing is to be done here. `None`: until something is heard.
    pub(super) fn idle(&self) -> Option<Duration> {
        let look_ns = self.risks.next_look_ns().filter(|_| self.asked.is_empty())?;
        Some(Duration::from_nanos(look_ns.saturating_sub(clock::boot_ns())))
    }

    /// Ends what nobody dials any more, and asks for the ranges of what is to be looked at.
    pub(super) fn look(&mut self, refusals: &mut Refusals, mut teller: Teller<'_>) {
        if !self.asked.is_empty() {
            return;
        }
        let now_ns = clock::boot_ns();
        let mut question = HashMap::new();
        for target in self.risks.due(now_ns) {
            let tally = refusals.get(&target);
            match (self.risks.end(&target, tally.as_ref(), now_ns), tally) {
                (None, Some(tally)) => {
                    question.insert(target.netns, tally.newest.task.pid);
                    self.asked.push(target);
                }
                (ended, _) => {
                    refusals.forget(&target);
                    if let Some(happening) = ended.flatten() {
                        teller.tell(&happening, now_ns);
                    }
                }
            }
        }
        if !question.is_empty() {
            self.ranges.ask(question);
        }
    }

    /// The next answer.
    pub(super) async fn answer(&mut self) -> Option<Answer> {
        self.ranges.answer().await
    }

    /// Looks at what was asked about. `is_taken` says whether a self-connection is there.
    pub(super) fn judge(
        &mut self,
        answer: &Answer,
        refusals: &Refusals,
        is_taken: impl Fn(&Place) -> bool,
        mut teller: Teller<'_>,
    ) {
        let now_ns = clock::boot_ns();
        for target in std::mem::take(&mut self.asked) {
            let (Some(tally), Some(ports)) = (refusals.get(&target), answer.get(&target.netns)) else {
                continue;
            };
            if let Err(why) = ports {
                log::info!("whether port {} can be hit is unknown: {why}", target.port);
            }
            let dials = Dials::new(&target, &tally);
            let is_taken = is_taken(&(dials.netns, dials.addr, dials.port));
            if let Some(happening) = self.risks.look(&target, &tally, ports, is_taken, now_ns) {
                teller.tell(&happening, now_ns);
            }
        }
        log::debug!("ports at risk: {}", self.at_risk());
    }

    /// Ends the counts of ports that were never dialled often.
    pub(super) fn sweep(&self, refusals: &mut Refusals) {
        refusals.sweep(clock::boot_ns(), |target| self.risks.knows(target));
    }
}

impl Teller<'_> {
    fn tell(&mut self, happening: &Happening, now_ns: u64) {
        let (Happening::AtRisk(dials, _) | Happening::Over(dials, _)) = happening;
        // What two CPUs wrote into a tally at once may be of two dials; only a start that fits can tell.
        let newest = Sighting::of(&dials.newest);
        let facts = match newest.start_ns {
            0 => Rc::default(),
            _ => self.processes.look_up(&newest, now_ns),
        };
        let what = match happening {
            Happening::AtRisk(dials, chance) => What::AtRisk(Box::new(AtRisk::new(dials, chance, &facts))),
            Happening::Over(dials, why) => What::AtRiskOver(Box::new(AtRiskOver::new(dials, *why, &facts))),
        };
        self.out.emit_at(Offset::now().wall(now_ns), what);
    }
}
