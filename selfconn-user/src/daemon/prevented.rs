//! `prevented` events: what the guard refused, with the process.

use std::rc::Rc;

use selfconn_ebpf::guard::Prevention;

use super::{
    guarding::{self, DuePrevention},
    reporting::{Reporting, Waiter, opener_target},
};
use crate::{
    event::{ConnectionFields, EventKind, Prevented},
    guard::GuardMode,
    system::{
        clock::Offset,
        process::{Attribution, ProcessInfo, Subject},
    },
};

/// The events so far.
pub(super) struct Preventions {
    mode: GuardMode,
    /// Their number, which is in their `id`.
    events: u64,
}

impl Preventions {
    pub(super) fn new(mode: GuardMode) -> Self {
        Self { mode, events: 0 }
    }

    /// Looks up the process whose connects to itself the guard refused, and emits the event.
    pub(super) fn report(&mut self, due: &DuePrevention, reporting: &mut Reporting) {
        let DuePrevention { newest, count } = *due;
        let Some(prevention) = newest else {
            let prevented = self.next(None, count, reporting.run_id);
            return reporting.out.emit(EventKind::Prevented(Box::new(prevented)));
        };
        let Some(target) = opener_target(&guarding::connection_of(&prevention)) else {
            return self.emit(&prevention, count, Rc::default(), reporting);
        };
        match reporting.lookups.known(&target, prevention.at_ns) {
            Some(process) => self.emit(&prevention, count, process, reporting),
            None => reporting.lookups.begin(target, Waiter::Prevented(Box::new(prevention), count)),
        }
    }

    /// Emits the event of a process that is looked up.
    pub(super) fn emit(
        &mut self,
        prevention: &Prevention,
        count: u64,
        process: Rc<ProcessInfo>,
        reporting: &mut Reporting,
    ) {
        let attribution = Attribution { subject: Subject::Opener, process, ..Attribution::default() };
        let connection = guarding::connection_of(prevention);
        let fields = ConnectionFields::new(&connection, reporting.run_id, &attribution);
        let prevented = self.next(Some(fields), count, reporting.run_id);
        let time = Offset::now().wall(prevention.at_ns);
        reporting.out.emit_at(time, EventKind::Prevented(Box::new(prevented)));
    }

    fn next(&mut self, fields: Option<ConnectionFields>, count: u64, run_id: u64) -> Prevented {
        self.events += 1;
        Prevented::new(run_id, self.events, fields, self.mode.name(), count)
    }
}
