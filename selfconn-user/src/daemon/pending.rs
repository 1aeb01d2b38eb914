//! Connection events that wait for the look-up of their process, or after it for room in the outputs. The events of one
//! connection stay in order; those of other connections pass them.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use jiff::Timestamp;
use selfconn_ebpf::state;
use tokio::time::Instant;

use crate::{
    budget::memory,
    detect::connection::{Connection, ConnectionEnd, ConnectionEvent},
};

/// A connection event that can be kept: with the connection as it was then.
#[derive(Debug)]
pub(super) struct QueuedEvent {
    pub(super) connection: Connection,
    change: Change,
    /// `CLOCK_BOOTTIME`, nanoseconds.
    pub(super) at_ns: u64,
    pub(super) time: Timestamp,
}

const _: () = assert!(size_of::<QueuedEvent>() + 128 <= memory::PENDING_EVENT_BYTES);

#[derive(Clone, Copy, Debug)]
enum Change {
    Established,
    State(u8, u8),
    Closed(ConnectionEnd),
}

impl QueuedEvent {
    pub(super) fn new(event: ConnectionEvent<'_>, at_ns: u64, time: Timestamp) -> Self {
        let (connection, change) = match event {
            ConnectionEvent::Established(connection) => (connection, Change::Established),
            ConnectionEvent::State(connection, from, to) => (connection, Change::State(from, to)),
            ConnectionEvent::Closed(connection, end) => (connection, Change::Closed(end)),
        };
        Self { connection: connection.clone(), change, at_ns, time }
    }

    pub(super) fn event(&self) -> ConnectionEvent<'_> {
        match self.change {
            Change::Established => ConnectionEvent::Established(&self.connection),
            Change::State(from, to) => ConnectionEvent::State(&self.connection, from, to),
            Change::Closed(end) => ConnectionEvent::Closed(&self.connection, end),
        }
    }

    /// Whether and how long TIME_WAIT holds the port is not known any more.
    pub(super) fn forget_time_wait(&mut self) {
        if let Change::Closed(end) = &mut self.change {
            end.port_blocked_until_ns = None;
        }
    }

    /// True if only events of the same transition may follow.
    pub(super) fn is_last(&self) -> bool {
        matches!(self.change, Change::Closed(_) | Change::State(_, state::CLOSE))
    }
}

/// The events that wait, by the number of their connection.
#[derive(Debug, Default)]
pub(super) struct PendingEvents {
    by_connection: HashMap<u64, Vec<QueuedEvent>>,
    len: usize,
    /// Connections that are looked up, and whose events are emitted in portions.
    backlog: VecDeque<u64>,
    /// When there was last none, or room for its next events.
    backlog_since: Option<Instant>,
}

impl PendingEvents {
    /// True if events of this connection wait, so that its next event must wait as well.
    pub(super) fn contains(&self, number: u64) -> bool {
        self.by_connection.contains_key(&number)
    }

    pub(super) fn push(&mut self, event: QueuedEvent) {
        // Most connections have one event here.
        let events =
            self.by_connection.entry(event.connection.number).or_insert_with(|| Vec::with_capacity(1));
        events.reserve_exact(1);
        events.push(event);
        self.len += 1;
    }

    /// Number of events.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The events of this connection, in order. From now on none of them waits.
    pub(super) fn take(&mut self, number: u64) -> Vec<QueuedEvent> {
        let events = self.by_connection.remove(&number).unwrap_or_default();
        self.len -= events.len();
        events
    }

    /// The events of this connection may be emitted when there is time.
    pub(super) fn push_backlog(&mut self, number: u64) {
        self.backlog.push_back(number);
        self.backlog_since.get_or_insert_with(Instant::now);
    }

    /// The next connection. `has_room`: the outputs have room, so that nothing has waited in vain.
    pub(super) fn pop_backlog(&mut self, has_room: bool) -> Option<u64> {
        let number = self.backlog.pop_front();
        if self.backlog.is_empty() {
            self.backlog_since = None;
        } else if has_room {
            self.backlog_since = Some(Instant::now());
        }
        number
    }

    /// For how long there has been a backlog, and no room.
    pub(super) fn backlog_age(&self) -> Duration {
        self.backlog_since.map_or(Duration::ZERO, |since| since.elapsed())
    }

    /// The events of this connection, in order.
    pub(super) fn of_connection(&self, number: u64) -> &[QueuedEvent] {
        self.by_connection.get(&number).map_or(&[], Vec::as_slice)
    }

    pub(super) fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    #[test]
    fn events_of_a_connection_are_kept_in_order_and_counted() {
        let connection = |number| Connection {
            number,
            ..Connection::from_entry(
                number,
                &samples::entry(samples::endpoint("127.0.0.1", 80), state::ESTABLISHED),
            )
        };
        let (first, second) = (connection(1), connection(2));
        let mut pending = PendingEvents::default();
        let time = Timestamp::UNIX_EPOCH;
        pending.push(QueuedEvent::new(ConnectionEvent::Established(&first), 1, time));
        pending.push(QueuedEvent::new(ConnectionEvent::Established(&second), 2, time));
        let end = ConnectionEnd::default();
        pending.push(QueuedEvent::new(ConnectionEvent::Closed(&first, end), 3, time));
        assert!(pending.contains(1) && pending.len() == 3);
        let taken = pending.take(1);
        assert_eq!(taken[0].event(), ConnectionEvent::Established(&first));
        assert_eq!(taken[1].event(), ConnectionEvent::Closed(&first, end));
        assert_eq!(taken.iter().map(QueuedEvent::is_last).collect::<Vec<_>>(), [false, true]);
        assert!(!pending.contains(1) && pending.contains(2) && pending.len() == 1);
    }

    #[test]
    fn a_backlog_is_as_old_as_it_has_waited_for_room() {
        const STEP: Duration = Duration::from_millis(2);
        let mut pending = PendingEvents::default();
        pending.push_backlog(1);
        std::thread::sleep(STEP);
        pending.push_backlog(2);
        std::thread::sleep(STEP);
        assert_eq!(pending.pop_backlog(false), Some(1));
        assert!(pending.backlog_age() >= STEP * 2);
        pending.push_backlog(3);
        let room = Instant::now();
        assert_eq!(pending.pop_backlog(true), Some(2));
        assert!(pending.backlog_age() <= room.elapsed());
        assert_eq!(pending.pop_backlog(false), Some(3));
        assert_eq!(pending.backlog_age(), Duration::ZERO);
        let again = Instant::now();
        pending.push_backlog(3);
        assert!(pending.backlog_age() <= again.elapsed());
    }
}
