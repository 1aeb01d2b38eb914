//! Servers that can't bind a port, wired: a bind failed, `blocked` knows which self-connection is in the way.

use selfconn_ebpf::{bind::FailedBind, state};

use super::{Daemon, Story, reading::Reading};
use crate::{
    blocked::{Blocked, Holder, Leftover},
    clock::Offset,
    connection::{Happening, Listed},
    event::{self, Subject, What},
    process::{Sighting, Who},
};

impl Daemon {
    /// How many binds failed for a self-connection.
    #[must_use]
    pub fn blocked_binds(&self) -> u64 {
        self.story.blocked.failures()
    }
}

/// A self-connection that ends may leave TIME_WAIT behind.
pub(super) fn note(blocked: &mut Blocked, happening: Happening<'_>, who: &Who, now_ns: u64) {
    if let Happening::Closed(connection, end) = happening
        && let Some(until_ns) = end.port_blocked_until_ns
    {
        let leftover = Leftover { connection: connection.clone(), who: who.clone(), until_ns };
        blocked.left(leftover, now_ns);
    }
}

impl Story {
    /// A bind failed: tells it, if a self-connection is in the way.
    pub(super) fn blame(&mut self, failed: &FailedBind, clock: Offset) {
        let Self { connections, blocked, processes, whos, .. } = self;
        let Some(holder) = blocked.holder(failed, connections.iter()) else { return };
        let connection = holder.connection();
        let unknown = Who::default();
        let who = match holder {
            Holder::Open(connection) => whos.get(&connection.number).unwrap_or(&unknown),
            Holder::TimeWait(leftover) => &leftover.who,
        };
        let subject = Subject::new(connection, self.run, who);
        let seen = Sighting { task: failed.task, start_ns: failed.start_ns, at_ns: failed.at_ns };
        let facts = processes.look_up(&seen, failed.at_ns);
        let mut told = event::Blocked::new(failed, &facts, &holder, subject, clock);
        let number = connection.number;
        if let Some(failures) = blocked.count(failed, number) {
            told.failures = failures;
            self.out.emit_at(clock.wall(failed.at_ns), What::Blocked(Box::new(told)));
        }
    }

    /// What is in TIME_WAIT without this run having seen it end.
    pub(super) fn remember_time_wait(&mut self, reading: &Reading, listed: &[Listed]) {
        for (listed, left) in reading.time_waits(listed) {
            let connection = listed.connection(0);
            let left_ns = u64::try_from(left.as_nanos()).unwrap_or(u64::MAX);
            let until_ns = reading.began_ns().saturating_add(left_ns);
            debug_assert_eq!(listed.state, state::TIME_WAIT);
            self.blocked.found(Leftover { connection, who: Who::default(), until_ns }, reading.began_ns());
        }
    }
}
