//! Does what the remedy's policy says: hands it what is opened and ended, and its questions to the reader's thread.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use super::{
    Daemon,
    reader::{Answer, Question},
};
use crate::{
    clock::{self, Offset},
    connection::{Connection, Happening},
    event::{Remedied, Subject, What},
    process::Who,
    remedy::{Case, Outcome, Remedy, Step},
    sockets::{Cookie, Target},
};

/// For how long the end of the run waits to tell what was begun.
const LAST: Duration = Duration::from_secs(1);

impl Daemon {
    /// How often the remedy had which outcome; nothing without `--remedy`.
    pub fn remedies(&self) -> impl Iterator<Item = (Outcome, u64)> {
        self.story.remedy.iter().flat_map(Remedy::counts)
    }

    /// When the remedy has something to do.
    pub(super) fn remedy_at(&self) -> Option<Instant> {
        let next_ns = self.story.remedy.as_ref()?.next_ns()?;
        Some(Instant::now() + Duration::from_nanos(next_ns.saturating_sub(clock::boot_ns())))
    }

    /// Begins what is due.
    pub(super) fn remedy(&mut self) {
        let Some(remedy) = &mut self.story.remedy else { return };
        for step in remedy.due(clock::boot_ns()) {
            self.take_step(step);
        }
    }

    /// The reader's thread has looked a self-connection up.
    pub(super) fn looked_up(&mut self, number: u64, found: Result<Option<Cookie>, String>) {
        // Only if it hasn't ended by now is it the one that was found.
        while self.take() > 0 {}
        let Some(remedy) = &mut self.story.remedy else { return };
        if let Some(step) = remedy.looked_up(number, found) {
            self.take_step(step);
        }
    }

    /// The reader's thread has destroyed a self-connection, or has not.
    pub(super) fn destroyed(&mut self, number: u64, began_ns: u64, outcome: Result<bool, String>) {
        let Some(remedy) = &mut self.story.remedy else { return };
        if let Some(remedied) = remedy.destroyed(number, outcome) {
            // As of before the close that it brings about.
            self.story.out.emit_at(Offset::now().wall(began_ns), What::Remedied(Box::new(remedied)));
        }
    }

    fn take_step(&mut self, step: Step) {
        match step {
            Step::LookUp(asked) => self.reader.ask(Question::LookUp(asked)),
            Step::Destroy(asked, cookie) => self.reader.ask(Question::Destroy(asked, cookie)),
            Step::Tell(remedied) => self.story.out.emit(What::Remedied(remedied)),
        }
    }

    /// Before the run ends: waits for what is being destroyed. What was only looked up is left alone.
    pub(super) async fn end_remedy(&mut self) {
        let until = Instant::now() + LAST;
        while self.story.remedy.as_ref().is_some_and(Remedy::is_destroying) {
            match timeout_at(until, self.reader.answer()).await {
                Ok(Some(Answer::Destroyed(number, began_ns, outcome))) => {
                    self.destroyed(number, began_ns, outcome);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// Tells the remedy what has happened, `at_ns`; gives what it has to say at once.
pub(super) fn note(
    remedy: &mut Remedy,
    happening: Happening<'_>,
    who: &Who,
    run: u64,
    at_ns: u64,
) -> Option<Remedied> {
    match happening {
        Happening::Established(connection) => {
            let subject = Subject::new(connection, run, who);
            remedy.opened(connection.number, case(connection, subject), at_ns)
        }
        Happening::State(..) => None,
        Happening::Closed(connection, _) => {
            remedy.ended(connection.number);
            None
        }
    }
}

fn case(connection: &Connection, subject: Subject) -> Case {
    let &Connection { addr, port, is_ipv6, ifindex, .. } = connection;
    let target = connection.netns.map(|netns| Target { netns, addr, port, is_ipv6, ifindex });
    let opener = connection.opener.iter().flat_map(|opener| [opener.task.tid, opener.task.pid]);
    let holders = subject.holders.iter().flatten().map(|holder| holder.pid);
    Case { near: opener.chain(holders).collect(), subject, target }
}
