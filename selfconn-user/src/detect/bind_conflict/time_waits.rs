//! The self-connections in TIME_WAIT, which hold their ports. Of the ones for which there is no room, the ports. Pure.

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, RandomState},
};

use selfconn_ebpf::Endpoint;

use super::SECOND_NS;
use crate::{
    budget::{
        SharedLimit,
        memory::{self, MAX_TIME_WAITS},
    },
    detect::{
        connection::{Connection, SocketId, TIME_WAIT_NS},
        port_set::PortSet,
    },
    system::process::{Attribution, ClosedAttribution},
};

// Beside an entry: the two tables that lead to it, with their keys, up to 16 bytes of the allocation, and the share of
// an owner. It has no holders, which could be more than the entry.
const _: () = assert!(
    size_of::<TimeWaitEntry>()
        + 16
        + (size_of::<(SocketId, Box<TimeWaitEntry>)>() + 1) * 8 / 7
        + (size_of::<(u64, u64)>() + 1) * 8 / 7
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
    /// The cookies of the newest ones, by a hash of the [key](Endpoint::table_key) of the endpoint. A reader must compare
    /// the endpoint of the entry, because hashes can collide.
    cookies: HashMap<u64, u64>,
    hashes: RandomState,
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
            cookies: HashMap::new(),
            hashes: RandomState::new(),
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
        let replaced = self.take(id).map(|replaced| replaced.connection.payer());
        if replaced != Some(owner) {
            if let Some(other) = replaced {
                self.shares.give_back(other, 1);
            }
            if !self.shares.try_take(owner, 1) {
                self.insert_unkept(&entry, now_ns);
                return;
            }
        }
        if let SocketId::Cookie(cookie) = id {
            self.cookies.insert(self.hashes.hash_one(entry.connection.endpoint.table_key()), cookie);
        }
        self.by_socket.insert(id, Box::new(entry));
    }

    /// Takes an entry out of the tables. It keeps its share.
    fn take(&mut self, id: SocketId) -> Option<Box<TimeWaitEntry>> {
        let entry = self.by_socket.remove(&id)?;
        let key = self.hashes.hash_one(entry.connection.endpoint.table_key());
        if let SocketId::Cookie(cookie) = id
            && self.cookies.get(&key) == Some(&cookie)
        {
            self.cookies.remove(&key);
        }
        Some(entry)
    }

    fn remove(&mut self, id: SocketId) {
        if let Some(entry) = self.take(id) {
            self.shares.give_back(entry.connection.payer(), 1);
        }
    }

    /// A self-connection was established at this time. It has taken over the TIME_WAIT that was at the same endpoint
    /// (`__inet_check_established`, net/ipv4/inet_hashtables.c at v6.12): there is one socket at most.
    pub fn on_established(&mut self, endpoint: &Endpoint, at_ns: u64) {
        let key = endpoint.table_key();
        let cookie = self.cookies.get(&self.hashes.hash_one(key)).copied().map(SocketId::Cookie);
        for id in cookie.into_iter().chain([SocketId::Endpoint(key)]) {
            let is_taken_over = self.by_socket.get(&id).is_some_and(|entry| {
                let began_ns = entry.until_ns.saturating_sub(TIME_WAIT_NS);
                entry.connection.endpoint.table_key() == key && began_ns < at_ns
            });
            if is_taken_over {
                self.remove(id);
            }
        }
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
        let ended = self.by_socket.iter().filter(|(_, entry)| has_ended(entry)).map(|(id, _)| *id);
        for id in ended.collect::<Vec<_>>() {
            self.remove(id);
        }
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
    fn two_sockets_at_one_endpoint_have_a_time_wait_each() {
        let mut time_waits = TimeWaits::default();
        let of = |number, cookie| {
            let mut entry = entry(number, "127.0.0.1", 80, 60 + number);
            entry.connection.cookie = Some(cookie);
            entry
        };
        for (number, cookie) in [(1, 11), (2, 12)] {
            time_waits.insert(of(number, cookie), 0);
        }
        // The snapshot lists the second one, and not the first.
        time_waits.insert_listed(of(0, 12), SECOND_NS);
        time_waits.remove_ended(|entry| entry.connection.cookie == Some(11));
        let left: Vec<_> = time_waits.iter().map(|entry| entry.connection.number).collect();
        assert_eq!((left, time_waits.shares.used()), (vec![2], 1));
    }

    #[test]
    fn a_self_connection_takes_over_the_time_wait_at_its_endpoint_and_no_other() {
        for cookies in [[Some(11), Some(12), Some(13)], [None; 3]] {
            let mut time_waits = TimeWaits::default();
            for (number, cookie) in (1..).zip(cookies) {
                let mut entry = entry(number, "127.0.0.1", if number == 3 { 81 } else { 80 }, 60 + number);
                entry.connection.cookie = cookie;
                entry.connection.endpoint.ifindex = u32::from(number == 2);
                time_waits.insert(entry, 0);
            }
            let mut left = |at_s: u64| {
                time_waits.on_established(&samples::endpoint("127.0.0.1", 80), at_s * SECOND_NS);
                let mut left: Vec<_> = time_waits.iter().map(|entry| entry.connection.number).collect();
                left.sort_unstable();
                (left, time_waits.shares.used(), time_waits.cookies.len())
            };
            let has_cookies = usize::from(cookies[0].is_some());
            // The first one began after a second. What a snapshot of before found was not established after it.
            assert_eq!(left(1), (vec![1, 2, 3], 3, 3 * has_cookies));
            assert_eq!(left(2), (vec![2, 3], 2, 2 * has_cookies));
            assert_eq!(left(3), (vec![2, 3], 2, 2 * has_cookies));
        }
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
