//! A `blocked` event in preparation: the failed bind, the self-connection that holds the port, how that is known, and
//! what a look at the sockets changes about it.

use std::{rc::Rc, time::Duration};

use jiff::Timestamp;
use selfconn_ebpf::{BindOptions, bind_failure::BindFailure};
use tokio::time::Instant;

use crate::{
    detect::{
        bind_conflict::{self, PortHolder, PossibleHolders, TimeWaitEntry, servers::BindConflict},
        connection::Connection,
    },
    sockets::{CurrentHolders, SocketRef},
    system::process::{Attribution, Holder, ProcessInfo},
};

/// Maximum time that an event waits for the holders. Then it is emitted without them.
pub(super) const DEADLINE: Duration = Duration::from_secs(1);

/// Maximum number of self-connections that are looked at for one event beside the recorded holder.
pub(super) const MAX_OTHERS: usize = 8;

/// The self-connection that held the port when the bind failed.
pub(super) enum KnownHolder {
    Open(Box<Connection>, Attribution),
    TimeWait(Box<TimeWaitEntry>),
}

impl KnownHolder {
    pub(super) fn connection(&self) -> &Connection {
        match self {
            Self::Open(connection, _) => connection,
            Self::TimeWait(entry) => &entry.connection,
        }
    }
}

/// How it is known that the self-connection refuses the bind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proof {
    /// By what was known of its socket when the bind failed.
    Known,
    /// It is not known: see [`bind_conflict::possible_holders`]. No self-connection that was looked at refuses the bind
    /// now, and there are others that may hold the port.
    Missing,
    /// By its socket now. It was not known before.
    Found,
    /// The holder does not refuse the bind. The self-connection with this number does, by its socket now.
    FoundOther(u64),
    /// All self-connections that may hold the port were looked at, and none refuses the bind now.
    Refuted,
}

/// What is looked up next.
pub(super) enum Step {
    /// The process that called bind().
    Binder,
    /// The process that holds the socket now.
    Holder,
    /// The process that connected.
    Opener,
}

/// A `blocked` event in preparation.
pub(super) struct PendingBlocked {
    pub(super) failure: BindFailure,
    /// True if the failure is recorded as one because of the holder.
    pub(super) is_recorded: bool,
    /// What is reported. `None`: nothing yet, or no report is due.
    pub(super) conflict: Option<BindConflict>,
    pub(super) holder: KnownHolder,
    pub(super) proof: Proof,
    /// The other self-connections that may hold the port: their numbers and sockets.
    pub(super) others: Vec<(u64, SocketRef)>,
    /// True if not all possible holders are looked at.
    pub(super) has_more: bool,
    /// The options of the self-connections that were looked at and do not refuse the bind, with the number of each.
    pub(super) options_now: Vec<(u64, BindOptions)>,
    pub(super) step: Step,
    pub(super) binder: Option<Rc<ProcessInfo>>,
    /// The processes that have the socket open now. `None`: unknown.
    pub(super) holders: Option<Vec<Holder>>,
    /// The first of them.
    pub(super) holder_process: Option<Rc<ProcessInfo>>,
    pub(super) time: Timestamp,
    /// When it is emitted without the holders.
    pub(super) deadline: Instant,
}

impl PendingBlocked {
    pub(super) fn new(
        failure: BindFailure,
        holder: &PortHolder<'_>,
        attribution: Attribution,
        time: Timestamp,
    ) -> Self {
        let holder = match *holder {
            PortHolder::Open(connection) => KnownHolder::Open(Box::new(connection.clone()), attribution),
            PortHolder::TimeWait(entry) => KnownHolder::TimeWait(Box::new(entry.clone())),
        };
        // Nobody holds what is in TIME_WAIT.
        let holders = matches!(holder, KnownHolder::TimeWait(_)).then(Vec::new);
        Self {
            failure,
            is_recorded: false,
            conflict: None,
            holder,
            proof: Proof::Known,
            others: Vec::new(),
            has_more: false,
            options_now: Vec::new(),
            step: Step::Binder,
            binder: None,
            holders,
            holder_process: None,
            time,
            deadline: Instant::now() + DEADLINE,
        }
    }

    /// Adds the other self-connections that may hold the port. They are looked at, too: the kernel does not say which
    /// one refuses the bind, and the record of the holder may be wrong by now.
    pub(super) fn add_others(&mut self, possible: &PossibleHolders<'_>) {
        let holder = self.holder.connection().number;
        let others = possible.connections.iter().filter(|connection| connection.number != holder);
        self.others = others.filter_map(|other| Some((other.number, other.socket_ref()?))).collect();
        self.has_more = !possible.are_all;
        self.limit_others(MAX_OTHERS);
    }

    /// Looks at no more than this number of them.
    pub(super) fn limit_others(&mut self, max: usize) {
        self.has_more |= self.others.len() > max;
        self.others.truncate(max);
    }

    /// The self-connection that refuses the bind is another one.
    pub(super) fn set_holder(&mut self, holder: KnownHolder) {
        if matches!(holder, KnownHolder::TimeWait(_)) {
            // Nobody holds what is in TIME_WAIT.
            self.holders = Some(Vec::new());
        }
        self.holder = holder;
        (self.is_recorded, self.conflict) = (false, None);
    }

    /// The socket of the holder. `None`: nobody has it open.
    pub(super) fn socket(&self) -> Option<SocketRef> {
        match &self.holder {
            KnownHolder::Open(connection, _) => connection.socket_ref(),
            KnownHolder::TimeWait(_) => None,
        }
    }

    /// The sockets that are looked at.
    pub(super) fn sockets(&self) -> impl Iterator<Item = SocketRef> {
        self.socket().into_iter().chain(self.others.iter().map(|(_, socket)| *socket))
    }

    /// Adds what is known of the sockets now. Options may have been changed since the last transition.
    pub(super) fn update(&mut self, now: &CurrentHolders) {
        let Some(socket) = self.socket() else { return };
        let is_known = self.proof == Proof::Known;
        self.holders = now.of_socket(&socket);
        let refuses = self.look_at(self.holder.connection().number, &socket, now);
        self.proof = match refuses {
            Some(true) if is_known => Proof::Known,
            Some(true) => Proof::Found,
            // No pass sees a descriptor that is in flight through a unix socket.
            None if is_known => match self.look_at_others(false, now) {
                Proof::Missing => Proof::Known,
                proof => proof,
            },
            _ => self.look_at_others(refuses.is_some(), now),
        };
    }

    fn look_at_others(&mut self, is_holder_seen: bool, now: &CurrentHolders) -> Proof {
        let mut are_seen = is_holder_seen && !self.has_more;
        for (number, socket) in std::mem::take(&mut self.others) {
            match self.look_at(number, &socket, now) {
                Some(true) => {
                    self.holders = now.of_socket(&socket);
                    return Proof::FoundOther(number);
                }
                Some(false) => {}
                None => are_seen = false,
            }
        }
        if are_seen { Proof::Refuted } else { Proof::Missing }
    }

    /// True if the kernel refuses the bind because of this socket now. `None`: the socket was not seen.
    fn look_at(&mut self, number: u64, socket: &SocketRef, now: &CurrentHolders) -> Option<bool> {
        let entry = now.entry(socket)?;
        let refuses = bind_conflict::is_refused_by_entry(&self.failure, entry)?;
        if !refuses {
            self.options_now.push((number, entry.options));
        }
        Some(refuses)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{detect::samples, sockets::SocketEntry};

    const PLAIN: BindOptions = BindOptions::new(false, false, false);
    const REUSE: BindOptions = BindOptions::new(true, false, false);

    /// The number is the inode, the cookie, and the last byte of the address.
    fn connection(number: u64) -> Connection {
        let endpoint = samples::endpoint(&format!("127.0.0.{number}"), 80);
        Connection { inode: Some(number), cookie: Some(number), ..samples::connection(number, endpoint) }
    }

    /// What a look shows of these connections.
    fn look(options: &[(u64, BindOptions)]) -> CurrentHolders {
        let entries = options.iter().map(|(number, options)| {
            let connection = connection(*number);
            let entry = samples::entry(connection.endpoint, selfconn_ebpf::state::ESTABLISHED);
            SocketEntry { inode: *number, cookie: connection.cookie, options: *options, ..entry }
        });
        CurrentHolders::of_entries(entries)
    }

    /// A server of any address that has SO_REUSEADDR.
    pub(in crate::daemon) fn blocked_by(holder: u64, others: impl Iterator<Item = u64>) -> PendingBlocked {
        let failure =
            BindFailure { options: REUSE, ..samples::bind_failure(samples::endpoint("0.0.0.0", 80), 0) };
        let holder = connection(holder);
        let holder = PortHolder::Open(&holder);
        let mut blocked =
            PendingBlocked::new(failure, &holder, Attribution::default(), Timestamp::UNIX_EPOCH);
        let others: Vec<_> = others.map(connection).collect();
        blocked.add_others(&bind_conflict::possible_holders(&failure, others.iter(), 1 + MAX_OTHERS));
        blocked
    }

    #[test]
    fn what_a_look_shows_proves_or_refutes_that_the_socket_refuses_the_bind() {
        for (before, now, proof) in [
            (Proof::Known, PLAIN, Proof::Known),
            (Proof::Known, REUSE, Proof::Refuted),
            (Proof::Missing, PLAIN, Proof::Found),
            (Proof::Missing, REUSE, Proof::Refuted),
            (Proof::Known, BindOptions::UNKNOWN, Proof::Known),
            (Proof::Missing, BindOptions::UNKNOWN, Proof::Missing),
        ] {
            let mut blocked = PendingBlocked { proof: before, ..blocked_by(1, std::iter::empty()) };
            blocked.update(&look(&[(1, now)]));
            assert_eq!(blocked.proof, proof, "{before:?} {now:?}");
            let changed = (proof == Proof::Refuted).then_some((1, now));
            assert_eq!(blocked.options_now, changed.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn all_that_may_hold_the_port_are_looked_at() {
        let reuse = |numbers: std::ops::RangeInclusive<u64>| numbers.map(|number| (number, REUSE));
        let many = 2 + MAX_OTHERS as u64;
        for (before, others, now, proof) in [
            (Proof::Known, 3, vec![(1, REUSE), (2, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Missing, 3, vec![(1, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Missing, 3, vec![(3, PLAIN)], Proof::FoundOther(3)),
            // The holder was not seen, because its descriptor is in flight.
            (Proof::Known, 3, vec![(2, REUSE), (3, PLAIN)], Proof::FoundOther(3)),
            (Proof::Known, 3, vec![(2, REUSE), (3, REUSE)], Proof::Known),
            (Proof::Known, 3, vec![], Proof::Known),
            (Proof::Missing, 3, vec![(2, REUSE), (3, REUSE)], Proof::Missing),
            // Another one was not.
            (Proof::Known, 3, vec![(1, REUSE), (3, REUSE)], Proof::Missing),
            (Proof::Known, 3, reuse(1..=3).collect(), Proof::Refuted),
            (Proof::Missing, many - 1, reuse(1..=many).collect(), Proof::Refuted),
            (Proof::Missing, many, reuse(1..=many).collect(), Proof::Missing),
        ] {
            // The holder may be among them.
            let mut blocked = PendingBlocked { proof: before, ..blocked_by(1, 1..=others) };
            assert_eq!(blocked.sockets().count(), (others as usize).min(1 + MAX_OTHERS));
            blocked.update(&look(&now));
            assert_eq!(blocked.proof, proof, "{before:?} {others} {now:?}");
        }
    }
}
