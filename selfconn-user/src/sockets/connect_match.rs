//! Matches the probes' connect table with a snapshot: who opened the sockets that it lists, and which entries of the
//! table are of sockets that no longer exist. The table is taken entry by entry, because a copy of it, and tables that
//! lead to its entries, would have no bound in the memory budget. What is kept here is a few bytes for each socket of
//! the snapshot.
//!
//! The family does not count: an IPv4 socket and an IPv6 socket with a v4-mapped address cannot have the same endpoint
//! at the same time.

use std::ops::Range;

use selfconn_ebpf::{ConnectEntry, Endpoint};

use super::snapshot::SocketSnapshot;
use crate::budget::memory;

// A socket that connects to itself is both an entry and an attempt.
const _: () = assert!(size_of::<ListedSocket>() + size_of::<u32>() <= memory::MATCHED_SOCKET_BYTES);

/// A snapshot, and the order in which its sockets are found.
pub struct ConnectMatch<'a> {
    snapshot: &'a mut SocketSnapshot,
    knows_netns: bool,
    /// The entries of the snapshot, in the order of their keys.
    entries: Vec<ListedSocket>,
    /// The places of the attempts, in the order of their keys.
    attempts: Vec<u32>,
}

/// An entry of the snapshot.
#[derive(Clone, Copy, Debug)]
struct ListedSocket {
    /// Its place in the snapshot.
    at: u32,
    /// True if a connect to its endpoint was found, and its kernel address is unknown.
    has_connect: bool,
}

/// What sockets are matched by. If the probes do not know namespaces, it has none.
fn key_of(endpoint: &Endpoint, knows_netns: bool) -> Endpoint {
    let known = if knows_netns { *endpoint } else { Endpoint { netns: 0, netns_cookie: 0, ..*endpoint } };
    known.table_key()
}

/// The places from 0 on of this many sockets.
fn places(count: usize) -> impl Iterator<Item = u32> {
    0..u32::try_from(count).unwrap_or(u32::MAX)
}

impl<'a> ConnectMatch<'a> {
    /// If the probes do not know the network namespace of a socket, it becomes unknown in the snapshot, too:
    /// transitions of these sockets have none.
    pub fn new(snapshot: &'a mut SocketSnapshot, knows_netns: bool) -> Self {
        for entry in &mut snapshot.entries {
            entry.connect_entry = None;
            if !knows_netns {
                (entry.endpoint.netns, entry.endpoint.netns_cookie) = (0, 0);
            }
        }
        let SocketSnapshot { entries: listed, attempts: connecting, .. } = &*snapshot;
        let mut entries: Vec<_> =
            places(listed.len()).map(|at| ListedSocket { at, has_connect: false }).collect();
        entries.sort_unstable_by_key(|socket| key_of(&listed[socket.at as usize].endpoint, knows_netns));
        let mut attempts: Vec<_> = places(connecting.len()).collect();
        attempts.sort_unstable_by_key(|at| key_of(&connecting[*at as usize], knows_netns));
        Self { snapshot, knows_netns, entries, attempts }
    }

    /// The entries at this key.
    fn entries_at(&self, key: &Endpoint) -> Range<usize> {
        let key_at = |socket: &ListedSocket| {
            key_of(&self.snapshot.entries[socket.at as usize].endpoint, self.knows_netns)
        };
        let first = self.entries.partition_point(|socket| key_at(socket) < *key);
        first..first + self.entries[first..].partition_point(|socket| key_at(socket) == *key)
    }

    /// True if an attempt has this key.
    fn is_attempted(&self, key: &Endpoint) -> bool {
        let key_at = |at: &u32| key_of(&self.snapshot.attempts[*at as usize], self.knows_netns);
        self.attempts.binary_search_by(|at| key_at(at).cmp(key)).is_ok()
    }

    /// Adds an entry of the connect table, with the kernel address of its socket, to the socket of the snapshot. False:
    /// that socket no longer exists. Then the entry is older than the snapshot, its namespace was read, and the
    /// snapshot lists neither a self-connection nor a connection attempt for it, and left out nothing of the user. Or
    /// its namespace has ended.
    ///
    /// Anybody can connect to the address and port of a self-connection at any time. An entry is that of a listed
    /// socket only if it is from before the snapshot and has the socket's kernel address; where that is unknown, only
    /// if neither another socket nor an attempt is there.
    pub fn add(&mut self, sock: u64, connect: &ConnectEntry) -> bool {
        let key = key_of(&connect.endpoint, self.knows_netns);
        let (places, is_attempted) = (self.entries_at(&key), self.is_attempted(&key));
        let is_older = connect.opener.at_ns < self.snapshot.began_ns;
        let exists = !places.is_empty() || is_attempted;
        let is_alone = places.len() == 1 && !is_attempted;
        for socket in &mut self.entries[places] {
            let entry = &mut self.snapshot.entries[socket.at as usize];
            let is_its_own = match entry.sock {
                Some(known) if known != sock => continue,
                Some(_) => true,
                // Of two connects there it is not known whose the socket is.
                None => is_alone && !std::mem::replace(&mut socket.has_connect, true),
            };
            entry.connect_entry = (is_its_own && is_older).then(|| Box::new((sock, connect.opener)));
        }
        let is_stale = || {
            let SocketSnapshot { left_out, .. } = &*self.snapshot;
            self.snapshot.proves_end_of_netns(&connect.endpoint)
                || self.snapshot.covers(&connect.endpoint)
                    && !left_out.may_have(Some(connect.opener.uid))
                    && !exists
        };
        !(is_older && is_stale())
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::{Opener, state};

    use super::*;
    use crate::{
        budget::memory::MAX_SNAPSHOT_SOCKETS,
        detect::samples,
        sockets::{SocketEntry, limit::SnapshotLimit},
    };

    fn connect(sock: u64, endpoint: Endpoint, at_ns: u64) -> (u64, ConnectEntry) {
        (sock, ConnectEntry::new(sock as u32, endpoint, Opener { at_ns, ..Opener::UNKNOWN }, 0))
    }

    /// Adds these entries of the connect table. Returns the addresses of the sockets that no longer exist.
    fn add(snapshot: &mut SocketSnapshot, connects: &[(u64, ConnectEntry)], knows_netns: bool) -> Vec<u64> {
        let mut matching = ConnectMatch::new(snapshot, knows_netns);
        let stale = connects.iter().filter(|(sock, connect)| !matching.add(*sock, connect));
        stale.map(|(sock, _)| *sock).collect()
    }

    #[test]
    fn a_socket_and_its_connect_match_in_either_family_and_an_old_connect_without_a_socket_is_stale() {
        let [v4, mapped] = [false, true].map(|is_ipv6| Endpoint::new(1, [127, 0, 0, 1].into(), 4, is_ipv6));
        let other = samples::endpoint("::1", 4);
        let elsewhere = Endpoint { netns: 2, ..other };
        let connects = [connect(7, mapped, 5), connect(8, other, 5), connect(9, elsewhere, 5)];
        let mut snapshot = SocketSnapshot {
            entries: vec![samples::entry(v4, state::ESTABLISHED)],
            namespaces: [(1, 0)].into(),
            began_ns: 6,
            ..SocketSnapshot::default()
        };
        assert_eq!(add(&mut snapshot, &connects, true), [8], "9 is in a namespace that was not read");
        assert_eq!(snapshot.entries[0].connect_entry.as_ref().map(|entry| entry.0), Some(7));
        for (uid, stale) in [(Opener::UNKNOWN.uid, vec![]), (1_000, vec![8])] {
            let mut limit = SnapshotLimit::new(Some(0));
            assert!(!limit.take(Some(uid), true, &other));
            snapshot.left_out = limit.left_out;
            assert_eq!(add(&mut snapshot, &connects, true), stale, "an attempt of {uid} was left out");
        }
        assert!(add(&mut snapshot, &[connect(8, other, 6)], true).is_empty(), "8 began later");
        snapshot.attempts.push(other);
        assert!(add(&mut snapshot, &connects, true).is_empty(), "8 is still connecting");
        // Without BTF.
        let unknown = connect(7, Endpoint { netns: 0, ..v4 }, 5);
        assert!(
            add(&mut snapshot, &[unknown, connect(9, Endpoint { netns: 0, ..other }, 5)], false).is_empty()
        );
        let entry = &snapshot.entries[0];
        assert_eq!((entry.endpoint.netns, entry.connect_entry.as_ref().map(|entry| entry.0)), (0, Some(7)));
    }

    #[test]
    fn who_connects_to_the_port_of_a_listed_socket_is_not_its_opener() {
        let endpoint = samples::endpoint("127.0.0.1", 4);
        let at_device = Endpoint { ifindex: 1, ..endpoint };
        let listed = |sock| SocketEntry { sock, ..samples::entry(endpoint, state::ESTABLISHED) };
        let other = samples::entry(at_device, state::ESTABLISHED);
        let own = connect(7, endpoint, 5);
        let (of_other, later) = (connect(8, endpoint, 5), connect(7, endpoint, 6));
        // (listed sockets, attempts, connect table, the first socket has the opener)
        for (entries, attempts, connects, is_known) in [
            (vec![listed(Some(7))], vec![], vec![own], true),
            (vec![listed(Some(7))], vec![endpoint], vec![of_other, own], true),
            (vec![listed(Some(7))], vec![endpoint], vec![of_other], false),
            (vec![listed(Some(7))], vec![], vec![later], false),
            (vec![listed(Some(7))], vec![], vec![connect(7, at_device, 5)], false),
            // The address is unknown.
            (vec![listed(None)], vec![], vec![own], true),
            (vec![listed(None), other], vec![at_device], vec![own], true),
            (vec![listed(None)], vec![endpoint], vec![of_other], false),
            (vec![listed(None)], vec![], vec![of_other, own], false),
            (vec![listed(None)], vec![], vec![later], false),
            (vec![listed(None), listed(None)], vec![], vec![own], false),
        ] {
            let mut snapshot = SocketSnapshot { entries, attempts, began_ns: 6, ..SocketSnapshot::default() };
            add(&mut snapshot, &connects, true);
            let opener = snapshot.entries[0].connect_entry.as_deref();
            assert_eq!(opener, is_known.then_some(&(7, own.1.opener)), "{snapshot:?} {connects:?}");
        }
    }

    #[test]
    fn each_socket_of_a_full_snapshot_is_found_and_what_that_takes_is_bounded() {
        let endpoint = |number: u16| Endpoint { netns: number.into(), ..samples::endpoint("127.0.0.1", 4) };
        let numbers = 1..=MAX_SNAPSHOT_SOCKETS as u16;
        let mut snapshot = SocketSnapshot {
            entries: numbers.clone().map(|n| samples::entry(endpoint(n), state::ESTABLISHED)).collect(),
            attempts: numbers.clone().map(|n| Endpoint { port: 5, ..endpoint(n) }).collect(),
            began_ns: 6,
            ..SocketSnapshot::default()
        };
        let mut matching = ConnectMatch::new(&mut snapshot, true);
        let bytes = matching.entries.capacity() * size_of::<ListedSocket>()
            + matching.attempts.capacity() * size_of::<u32>();
        assert!(bytes <= MAX_SNAPSHOT_SOCKETS * memory::MATCHED_SOCKET_BYTES, "{bytes}");
        // Most of the table is of other sockets.
        for number in 1..=u16::MAX {
            assert!(matching.add(number.into(), &connect(number.into(), endpoint(number), 5).1));
        }
        let opener = |entry: &SocketEntry| entry.connect_entry.as_ref().unwrap().0;
        assert!(snapshot.entries.iter().all(|entry| opener(entry) == u64::from(entry.endpoint.netns)));
    }
}
