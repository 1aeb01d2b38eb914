//! The self-connections in TIME_WAIT, which hold their ports. Of the ones for which there is no room, the ports. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Endpoint;

use super::SECOND_NS;
use crate::{
    budget::{
        SharedLimit,
        memory::{self, MAX_TIME_WAITS},
    },
    detect::{
        connection::{Connection, SocketId},
        port_set::PortSet,
    },
    system::process::{Attribution, ClosedAttribution},
};

// Beside an entry: the table that leads to it, with its key, up to 16 bytes of the allocation, and the share of an
// owner. It has no holders, which could be more than the entry.
const _: () = assert!(
    size_of::<TimeWaitEntry>()
        + 16
        + (size_of::<(SocketId, Box<TimeWaitEntry>)>() + 1) * 8 / 7
        + SharedLimit::OWNER_BYTES
        <= memory::TIME_WAIT_BYTES
);

/// A self-connection in TIME_WAIT.
#[derive(Clone, Debug)]
pub struct TimeWaitEntry {
    /// The connection. Its number is 0 if it was closed before this run.
    pub connection: Connection,
    /// The process behind it.
    pub attribution: ClosedAttribution,
    /// When TIME_WAIT ends: `CLOCK_BOOTTIME`, nanoseconds.
    pub until_ns: u64,
}

/// The connections in TIME_WAIT.
#[derive(Debug)]
pub struct TimeWaits {
    /// By socket: a TIME_WAIT has the cookie of its socket (`inet_twsk_alloc`, net/ipv4/inet_timewait_sock.c at
    /// v5.10). Boxed, so that empty slots of the table take little memory.
    by_socket: HashMap<SocketId, Box<TimeWaitEntry>>,
    /// How many an owner has of them.
    shares: SharedLimit,
    /// The TIME_WAITs for which there was no room: the newest ones, and those before.
    unkept: [UnkeptTimeWaits; 2],
    /// When expired entries were last removed.
    last_sweep_ns: u64,
}

/// TIME_WAITs for which there was no room.
#[derive(Clone, Debug, Default)]
struct UnkeptTimeWaits {
    ports: PortSet,
    /// When the last one ends: `CLOCK_BOOTTIME`, nanoseconds.
    until_ns: u64,
}

impl TimeWaitEntry {
    fn id(&self) -> SocketId {
        SocketId::new(self.connection.cookie, &self.connection.endpoint)
    }
}

impl Default for TimeWaits {
    fn default() -> Self {
        Self {
            by_socket: HashMap::new(),
            shares: SharedLimit::new(MAX_TIME_WAITS),
            unkept: Default::default(),
            last_sweep_ns: 0,
        }
    }
}

impl TimeWaits {
    /// Adds a self-connection that was closed and is in TIME_WAIT now.
    pub fn insert(&mut self, entry: TimeWaitEntry, now_ns: u64) {
        // At most once a second, because this visits all entries.
        if now_ns.saturating_sub(self.last_sweep_ns) >= SECOND_NS {
            self.remove_expired(now_ns);
        }
        let (id, owner) = (entry.id(), entry.connection.payer());
        let replaced = self.by_socket.remove(&id).map(|replaced| replaced.connection.payer());
        if replaced != Some(owner) {
            if let Some(other) = replaced {
                self.shares.give_back(other, 1);
            }
            if !self.shares.try_take(owner, 1) {
                self.insert_unkept(&entry, now_ns);
                return;
            }
        }
        self.by_socket.insert(id, Box::new(entry));
    }

    fn insert_unkept(&mut self, entry: &TimeWaitEntry, now_ns: u64) {
        // A set forgets nothing by itself. In a flood each of the two is that of a minute.
        if self.unkept[1].until_ns <= now_ns {
            self.unkept[1] = std::mem::take(&mut self.unkept[0]);
        }
        let newest = &mut self.unkept[0];
        newest.ports.insert(&entry.connection.endpoint);
        newest.until_ns = newest.until_ns.max(entry.until_ns);
    }

    /// Sets the process behind a connection in TIME_WAIT, because its look-up has ended after the close.
    pub fn attribute(&mut self, connection: &Connection, attribution: &Attribution) {
        let entry = self.by_socket.get_mut(&SocketId::new(connection.cookie, &connection.endpoint));
        if let Some(entry) = entry.filter(|entry| entry.connection.number == connection.number) {
            entry.attribution = attribution.into();
        }
    }

    /// Removes the connections that are not in TIME_WAIT any more.
    pub fn remove_expired(&mut self, now_ns: u64) {
        self.remove_ended(|entry| entry.until_ns <= now_ns);
        self.last_sweep_ns = now_ns;
    }

    /// The host was suspended for `duration_ns`, at some time after `after_ns`. TIME_WAIT did not go on meanwhile.
    pub fn on_suspension(&mut self, after_ns: u64, duration_ns: u64) {
        self.remove_expired(after_ns);
        for unkept in &mut self.unkept {
            unkept.until_ns = unkept.until_ns.saturating_add(duration_ns);
        }
        for entry in self.by_socket.values_mut() {
            entry.until_ns = entry.until_ns.saturating_add(duration_ns);
        }
    }

    /// Adds a self-connection that the socket table lists in TIME_WAIT, unless it is known.
    pub fn insert_listed(&mut self, entry: TimeWaitEntry, now_ns: u64) {
        let known = self.by_socket.get(&entry.id());
        if known.is_none_or(|known| known.until_ns < now_ns) {
            self.insert(entry, now_ns);
        }
    }

    /// Removes the TIME_WAIT entries that have ended early. `has_ended` returns true if the kernel does not have this
    /// one any more.
    pub fn remove_ended(&mut self, has_ended: impl Fn(&TimeWaitEntry) -> bool) {
        let Self { by_socket, shares, .. } = self;
        by_socket.retain(|_, entry| {
            let has_ended = has_ended(entry);
            if has_ended {
                shares.give_back(entry.connection.payer(), 1);
            }
            !has_ended
        });
    }

    /// Where the connections in TIME_WAIT are.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.by_socket.values().map(|entry| &entry.connection.endpoint)
    }

    /// All of them.
    pub(super) fn iter(&self) -> impl Iterator<Item = &TimeWaitEntry> {
        self.by_socket.values().map(|entry| &**entry)
    }

    /// True if one for which there was no room may hold this port until later than this.
    pub(super) fn may_lack_one_at(&self, endpoint: &Endpoint, at_ns: u64) -> bool {
        self.unkept.iter().any(|unkept| at_ns < unkept.until_ns && unkept.ports.may_have(endpoint))
    }

    /// The ports of the TIME_WAITs for which there was no room, and that last until later than this.
    #[must_use]
    pub fn unkept_ports(&self, at_ns: u64) -> PortSet {
        let mut ports = PortSet::default();
        self.unkept.iter().filter(|unkept| at_ns < unkept.until_ns).for_each(|one| ports.extend(&one.ports));
        ports
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    fn entry(number: u64, addr: &str, port: u16, until_s: u64) -> TimeWaitEntry {
        let connection = samples::connection(number, samples::endpoint(addr, port));
        TimeWaitEntry { connection, attribution: ClosedAttribution::default(), until_ns: until_s * SECOND_NS }
    }

    #[test]
    fn expired_entries_are_removed_long_before_the_limit() {
        let mut time_waits = TimeWaits::default();
        for second in 0..600_u64 {
            let port = u16::try_from(second).unwrap() + 1;
            time_waits.insert(entry(second, "127.0.0.1", port, second + 60), second * SECOND_NS);
            assert!(time_waits.by_socket.len() <= 60, "{} after {second} s", time_waits.by_socket.len());
        }
        time_waits.remove_expired(700 * SECOND_NS);
        assert!(time_waits.by_socket.is_empty());
    }

    #[test]
    fn the_number_of_time_waits_is_bounded() {
        let mut time_waits = TimeWaits::default();
        for port in 1..=u16::try_from(MAX_TIME_WAITS).unwrap() + 9 {
            time_waits.insert(entry(1, "127.0.0.1", port, 60), 0);
        }
        assert_eq!(time_waits.by_socket.len(), MAX_TIME_WAITS * 3 / 4, "the share of one owner");
        time_waits.insert(entry(2, "127.0.0.1", 9_999, 120), 61 * SECOND_NS);
        assert_eq!(time_waits.by_socket.len(), 1, "expired entries are removed first");
    }

    #[test]
    fn the_ports_of_time_waits_without_room_are_forgotten_when_these_have_ended() {
        let mut time_waits = TimeWaits::default();
        let share = MAX_TIME_WAITS as u64 * 3 / 4;
        for number in 1..=share {
            time_waits.insert(entry(number, "127.0.0.1", number as u16, 100_000), 0);
        }
        // One more each second, for ten minutes.
        let port = |second: u64| 10_000 + second as u16;
        for second in 0..600 {
            let unkept = entry(share + second, "127.0.0.1", port(second), second + 60);
            time_waits.insert(unkept, second * SECOND_NS);
            let ports = time_waits.unkept_ports(second * SECOND_NS);
            for earlier in second.saturating_sub(59)..=second {
                assert!(ports.may_have(&samples::endpoint("127.0.0.1", port(earlier))), "{earlier} {second}");
            }
            assert!(ports.slots().count() <= 122, "of two minutes: {} at {second}", ports.slots().count());
        }
    }
}
