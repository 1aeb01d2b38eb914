//! The story: what transitions and readings of the socket table mean for each connection, and the events that come of it.

use std::collections::HashMap;

use selfconn_ebpf::{Task, Transition, state};

use super::{reading::Reading, remedy, victims};
use crate::{
    blocked::Blocked,
    clock::Offset,
    connection::{Connection, Connections, Happening, Listed},
    event::{Ended, Moved, Subject, What},
    metrics,
    process::{Processes, Sighting, Who},
    remedy::Remedy,
    sink::Sinks,
};

/// What is told, and what must be known to tell it.
pub(super) struct Story {
    /// The mark of this run in every `id`: when it began.
    pub(super) run: u64,
    pub(super) connections: Connections,
    pub(super) processes: Processes,
    /// What was learnt of who is behind each open connection, by its number.
    pub(super) whos: HashMap<u64, Who>,
    pub(super) states: bool,
    pub(super) remedy: Option<Remedy>,
    pub(super) blocked: Blocked,
    pub(super) out: Sinks,
    pub(super) opened: metrics::Connections,
    pub(super) missed: u64,
}

impl Story {
    /// Takes in a transition, and makes what events come of it.
    pub(super) fn apply(&mut self, transition: &Transition, clock: Offset) {
        let Self { run, connections, processes, whos, states, remedy, blocked, out, opened, .. } = self;
        let at_ns = transition.at_ns;
        let mut ended = [None; 2];
        connections.apply(transition, |happening| {
            let connection = happening.connection();
            if matches!(happening, Happening::Established(_)) {
                opened.count(connection);
            }
            // At the first event, while the process is there; the last one tells the same.
            let who = whos.entry(connection.number).or_insert_with(|| match connection.opener {
                Some(opener) => Who::opened(processes.look_up(&Sighting::of(&opener), at_ns)),
                None => Who::default(),
            });
            if let Some(what) = tell(happening, who, *run, *states, clock) {
                out.emit_at(clock.wall(at_ns), what);
            }
            if let Some(remedy) = remedy
                && let Some(remedied) = remedy::note(remedy, happening, who, *run, at_ns)
            {
                out.emit_at(clock.wall(at_ns), What::Remedied(Box::new(remedied)));
            }
            victims::note(blocked, happening, who, at_ns);
            if matches!(happening, Happening::Closed(..) | Happening::State(_, _, state::CLOSE)) {
                // The life that was missed ending, and the one that ends.
                ended = [ended[1].filter(|number| *number != connection.number), Some(connection.number)];
            }
        });
        for number in ended.into_iter().flatten() {
            whos.remove(&number);
        }
    }

    /// Takes in the socket table; says how many self-connections were missed.
    pub(super) fn reconcile(&mut self, reading: &Reading, listed: &[Listed], knows_netns: bool) -> u64 {
        let Self { run, connections, processes, whos, states, remedy, out, opened, .. } = self;
        let clock = Offset::now();
        let mut ended = Vec::new();
        let has_read = |netns| !knows_netns || reading.has_read(netns);
        // Outside the initial pid namespace the holders in /proc have other numbers than events tell.
        let can_look_up = processes.can_look_up();
        let holders = |connection: &Connection| can_look_up.then(|| reading.holders(connection)).flatten();
        let missed = connections.reconcile(listed, reading.began_ns(), has_read, |happening| {
            let connection = happening.connection();
            if matches!(happening, Happening::Established(_)) {
                opened.count(connection);
            }
            let who = whos.entry(connection.number).or_insert_with(|| match connection.opener {
                Some(opener) => Who::opened(processes.look_up(&Sighting::of(&opener), reading.began_ns())),
                None => Who::held(holders(connection)),
            });
            if let Some(what) = tell(happening, who, *run, *states, clock) {
                out.emit(what);
            }
            if let Some(remedy) = remedy
                && let Some(remedied) = remedy::note(remedy, happening, who, *run, reading.began_ns())
            {
                out.emit(What::Remedied(Box::new(remedied)));
            }
            if matches!(happening, Happening::Closed(..)) {
                ended.push(connection.number);
            }
        });
        for number in ended {
            whos.remove(&number);
        }
        for connection in connections.iter() {
            if let (Some(who), Some(holders)) =
                (whos.get_mut(&connection.number), reading.holders(connection))
            {
                who.holders = Some(holders);
            }
        }
        missed
    }
}

/// The event that a happening makes, if any.
fn tell(happening: Happening<'_>, who: &Who, run: u64, states: bool, clock: Offset) -> Option<What> {
    let subject = |connection: &Connection| Subject::new(connection, run, who);
    match happening {
        Happening::Established(connection) => Some(What::Established(Box::new(subject(connection)))),
        Happening::State(connection, from, to) => {
            states.then(|| What::State(Box::new(Moved::new(subject(connection), from, to))))
        }
        Happening::Closed(connection, end) => {
            let closer: Option<&Task> = connection.closer.as_ref();
            Some(What::Closed(Box::new(Ended::new(subject(connection), closer, &end, clock))))
        }
    }
}
