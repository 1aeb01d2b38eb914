//! How many sockets of each owner a snapshot keeps, and of which owners it left some out. What is left out is counted,
//! and proves nothing: it may exist.

use std::collections::HashMap;

use selfconn_ebpf::Endpoint;

use super::entry::{DumpedSocket, SocketEntry};
use crate::{
    budget::{SharedLimit, memory::MAX_MORE_HOLDERS, owner_of_user},
    detect::port_set::PortSet,
};

/// Maximum number of owners that are counted each by itself.
const MAX_OWNERS: usize = 1_024;

/// The sockets that a snapshot left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Self-connections by user; 0 if only attempts were left out. `None`: those without a user.
    by_uid: HashMap<Option<u32>, u64>,
    /// Self-connections of the users beyond [`MAX_OWNERS`]. `None`: there are no such users.
    of_other_users: Option<u64>,
    /// Where the self-connections are, also those without a user.
    ports: PortSet,
}

impl LeftOut {
    /// Counts a socket that is left out.
    pub(super) fn count(&mut self, uid: Option<u32>, is_attempt: bool) {
        let is_counted_apart =
            uid.is_none() || self.by_uid.contains_key(&uid) || self.by_uid.len() < MAX_OWNERS;
        let self_connections = match is_counted_apart {
            true => self.by_uid.entry(uid).or_default(),
            false => self.of_other_users.get_or_insert(0),
        };
        *self_connections += u64::from(!is_attempt);
    }

    /// True if self-connections of this user were left out.
    fn has_counted(&self, uid: u32) -> bool {
        self.by_uid.get(&Some(uid)).copied().or(self.of_other_users).is_some_and(|count| count > 0)
    }

    /// True if a self-connection or an attempt of this user may have been left out. `None`: the user is unknown.
    #[must_use]
    pub fn may_have(&self, uid: Option<u32>) -> bool {
        match uid {
            Some(_) => self.of_other_users.is_some() || self.by_uid.contains_key(&uid),
            None => !self.by_uid.is_empty(),
        }
    }

    /// True if nothing was left out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_uid.is_empty() && self.of_other_users.is_none()
    }

    /// The ports of the self-connections that were left out.
    #[must_use]
    pub fn ports(&self) -> &PortSet {
        &self.ports
    }

    /// True if sockets without a user were left out, such as TIME_WAIT.
    #[must_use]
    pub fn has_without_user(&self) -> bool {
        self.by_uid.contains_key(&None)
    }

    /// Number of self-connections by user. `None`: all users beyond [`MAX_OWNERS`].
    pub fn users(&self) -> impl Iterator<Item = (Option<u32>, u64)> {
        let apart = self.by_uid.iter().filter(|(uid, _)| uid.is_some());
        let others = self.of_other_users.map(|count| (None, count));
        apart.map(|(uid, count)| (*uid, *count)).chain(others)
    }
}

#[cfg(test)]
impl LeftOut {
    /// One self-connection of this user.
    pub(crate) fn sample(uid: u32, endpoint: &Endpoint) -> Self {
        let mut limit = SnapshotLimit::new(Some(0));
        assert!(!limit.take(Some(uid), false, endpoint));
        limit.left_out
    }
}

/// The limit of one snapshot.
#[derive(Debug)]
pub(super) struct SnapshotLimit {
    shares: SharedLimit,
    /// For the holders of each socket beside the first one. A user can have each socket in any number of processes.
    more_holders: SharedLimit,
    pub(super) left_out: LeftOut,
    /// What an earlier pass left out, which the next one finds again.
    counted: LeftOut,
    /// The inode of the network namespace whose table is being read.
    netns: u32,
    is_of_command: bool,
}

impl SnapshotLimit {
    /// `None`: no limit.
    pub(super) fn new(max_sockets: Option<usize>) -> Self {
        // A share is a multiple of what is free.
        const UNLIMITED: usize = usize::MAX >> 4;
        Self {
            shares: SharedLimit::new(max_sockets.unwrap_or(UNLIMITED)),
            more_holders: SharedLimit::new(max_sockets.map_or(UNLIMITED, |_| MAX_MORE_HOLDERS)),
            left_out: LeftOut::default(),
            counted: LeftOut::default(),
            netns: 0,
            is_of_command: max_sockets.is_none(),
        }
    }

    /// True if this is a command, which has no limit.
    pub(super) fn is_of_command(&self) -> bool {
        self.is_of_command
    }

    /// The table of the network namespace with this inode is read next.
    pub(super) fn begin_netns(&mut self, inode: u32) {
        self.netns = inode;
    }

    /// True if there is room for one more socket of this user. Otherwise its endpoint is that of a socket that was left
    /// out.
    pub(super) fn take(&mut self, uid: Option<u32>, is_attempt: bool, endpoint: &Endpoint) -> bool {
        let has_room = self.shares.try_take(owner_of_user(uid), 1);
        let is_counted = !is_attempt && uid.is_some_and(|uid| self.counted.has_counted(uid));
        if !has_room && !is_counted {
            self.left_out.count(uid, is_attempt);
        }
        if !has_room && !is_attempt {
            self.left_out.ports.insert(endpoint);
        }
        has_room
    }

    /// True if there is room for one more holder of a socket of this user, beside its first one.
    pub(super) fn take_holder(&mut self, uid: u32) -> bool {
        self.more_holders.try_take(owner_of_user(Some(uid)), 1)
    }

    /// The next pass finds the sockets of this one again.
    pub(super) fn begin_next_pass(&mut self) {
        self.counted = LeftOut { ports: PortSet::default(), ..self.left_out.clone() };
    }
}

/// Where the readers of the socket tables put what they find.
pub(super) trait RowSink {
    /// What [`Self::restore`] goes back to.
    type Mark;

    fn push(&mut self, row: DumpedSocket);

    fn mark(&self) -> Self::Mark;

    /// Takes out what was added since `mark`.
    fn restore(&mut self, mark: &Self::Mark);
}

/// Keeps all, without a limit: for a command.
impl RowSink for Vec<DumpedSocket> {
    type Mark = usize;

    fn push(&mut self, row: DumpedSocket) {
        self.push(row);
    }

    fn mark(&self) -> usize {
        self.len()
    }

    fn restore(&mut self, mark: &usize) {
        self.truncate(*mark);
    }
}

/// Keeps the first socket that matches.
pub(super) struct FirstMatch<F> {
    is_match: F,
    pub(super) found: Option<DumpedSocket>,
}

impl<F: Fn(&DumpedSocket) -> bool> FirstMatch<F> {
    pub(super) fn new(is_match: F) -> Self {
        Self { is_match, found: None }
    }
}

impl<F: Fn(&DumpedSocket) -> bool> RowSink for FirstMatch<F> {
    /// Whether one was found.
    type Mark = bool;

    fn push(&mut self, row: DumpedSocket) {
        if self.found.is_none() && (self.is_match)(&row) {
            self.found = Some(row);
        }
    }

    fn mark(&self) -> bool {
        self.found.is_some()
    }

    fn restore(&mut self, was_found: &bool) {
        if !was_found {
            self.found = None;
        }
    }
}

/// Keeps self-connections and attempts within a limit.
pub(super) struct LimitedRows<'a> {
    pub(super) rows: &'a mut Vec<DumpedSocket>,
    pub(super) limit: &'a mut SnapshotLimit,
    /// True if the socket is known already. Its network namespace is the one that is being read.
    pub(super) is_known: &'a dyn Fn(&SocketEntry) -> bool,
}

impl RowSink for LimitedRows<'_> {
    /// The number of rows, and what was left out.
    type Mark = (usize, LeftOut);

    fn push(&mut self, row: DumpedSocket) {
        let is_attempt = row.is_attempt();
        let is_wanted = is_attempt || row.is_self_connection() && !(self.is_known)(&row.entry);
        let endpoint = Endpoint { netns: self.limit.netns, ..row.entry.endpoint };
        if is_wanted && self.limit.take(row.entry.uid, is_attempt, &endpoint) {
            self.rows.push(row);
        }
    }

    fn mark(&self) -> Self::Mark {
        (self.rows.len(), self.limit.left_out.clone())
    }

    fn restore(&mut self, (len, left_out): &Self::Mark) {
        for row in self.rows.drain(len..) {
            self.limit.shares.give_back(owner_of_user(row.entry.uid), 1);
        }
        self.limit.left_out.clone_from(left_out);
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::state;

    use super::*;
    use crate::sockets::entry::tests::row;

    fn of_user(uid: Option<u32>, inode: u64) -> DumpedSocket {
        let mut row = row("127.0.0.1:4", "127.0.0.1:4", state::ESTABLISHED);
        (row.entry.uid, row.entry.inode) = (uid, inode);
        row
    }

    #[test]
    fn one_user_leaves_room_for_the_next_and_what_is_left_out_is_counted_by_user() {
        let mut limit = SnapshotLimit::new(Some(1_000));
        let mut take = |uid| (0..2_000).filter(|_| limit.take(uid, false, &Endpoint::UNKNOWN)).count();
        assert_eq!([take(Some(1)), take(Some(2)), take(None)], [750, 187, 47]);
        assert!(take(Some(3)) > 0);
        let LeftOut { by_uid, .. } = &limit.left_out;
        assert_eq!((by_uid[&Some(1)], by_uid[&Some(2)], by_uid[&None]), (1_250, 1_813, 1_953));
        assert!(limit.left_out.may_have(Some(1)) && limit.left_out.has_without_user());
        assert!(!limit.left_out.may_have(Some(9)) && limit.left_out.may_have(None));
        assert!(!LeftOut::default().may_have(None));
        limit.begin_next_pass();
        assert!(
            !limit.take(Some(1), false, &Endpoint::UNKNOWN) && limit.left_out.by_uid[&Some(1)] == 1_250,
            "counted once"
        );
    }

    #[test]
    fn all_uids_that_a_user_namespace_maps_have_one_share_together() {
        let mut limit = SnapshotLimit::new(Some(8_000));
        for uid in (200_000..260_000).step_by(100) {
            for _ in 0..100 {
                let _ = limit.take(Some(uid), false, &Endpoint::UNKNOWN);
            }
        }
        let others = (0..1_000).filter(|_| limit.take(Some(1_000), false, &Endpoint::UNKNOWN)).count();
        assert!(others >= 400, "{others}");
    }

    #[test]
    fn users_beyond_a_number_are_counted_together() {
        let mut limit = SnapshotLimit::new(Some(0));
        let users = MAX_OWNERS as u32 + 7;
        for uid in (0..users).map(Some).chain([None]) {
            assert!(!limit.take(uid, false, &Endpoint::UNKNOWN));
        }
        let counts: HashMap<_, _> = limit.left_out.users().collect();
        assert_eq!((counts.len(), counts[&None]), (MAX_OWNERS + 1, 7));
        assert_eq!(counts.values().sum::<u64>(), u64::from(users), "TIME_WAIT is no connection");
        limit.begin_next_pass();
        assert!(
            !limit.take(Some(users - 1), false, &Endpoint::UNKNOWN)
                && limit.left_out.of_other_users == Some(7),
            "counted once"
        );
    }

    #[test]
    fn attempts_that_are_left_out_concern_only_their_user() {
        let mut limit = SnapshotLimit::new(Some(0));
        assert!(!limit.take(Some(1), true, &Endpoint::UNKNOWN));
        let LeftOut { by_uid, .. } = &limit.left_out;
        assert_eq!((by_uid[&Some(1)], by_uid.len()), (0, 1));
        assert!(limit.left_out.may_have(Some(1)) && !limit.left_out.may_have(Some(2)));
        limit.begin_next_pass();
        assert!(!limit.take(Some(1), false, &Endpoint::UNKNOWN) && limit.left_out.by_uid[&Some(1)] == 1);
    }

    #[test]
    fn a_second_try_counts_nothing_twice_and_known_sockets_take_no_room() {
        let (mut rows, mut limit) = (Vec::new(), SnapshotLimit::new(Some(4)));
        let is_known = |entry: &SocketEntry| entry.inode == 9;
        let mut limited = LimitedRows { rows: &mut rows, limit: &mut limit, is_known: &is_known };
        let push_ten = |limited: &mut LimitedRows<'_>| {
            for _ in 0..5 {
                limited.push(of_user(Some(1), 8));
                limited.push(of_user(Some(1), 9));
            }
        };
        // sock_diag fails in the second of its dumps, of which each is tried twice, and then procfs is read.
        let all = limited.mark();
        for _ in 0..2 {
            let dump = limited.mark();
            push_ten(&mut limited);
            limited.restore(&dump);
            push_ten(&mut limited);
        }
        limited.restore(&all);
        push_ten(&mut limited);
        assert_eq!((rows.len(), limit.left_out.by_uid[&Some(1)]), (3, 2));
    }

    #[test]
    fn the_ports_of_what_is_left_out_are_known_in_their_namespace() {
        let mut limit = SnapshotLimit::new(Some(0));
        limit.begin_netns(7);
        let mut limited = LimitedRows { rows: &mut Vec::new(), limit: &mut limit, is_known: &|_| false };
        let before = limited.mark();
        // Of a user, and in TIME_WAIT.
        limited.push(of_user(Some(1), 8));
        limited.push(row("127.0.0.1:5", "127.0.0.1:5", state::TIME_WAIT));
        limited.push(row("127.0.0.1:6", "127.0.0.1:9", state::SYN_SENT));
        let at = |netns, port| Endpoint { netns, port, ..Endpoint::UNKNOWN };
        let ports = limited.limit.left_out.ports();
        assert!(ports.may_have(&at(7, 4)) && ports.may_have(&at(7, 5)));
        assert!(
            !ports.may_have(&at(8, 4)) && !ports.may_have(&at(7, 6)),
            "an attempt holds no port of its own"
        );
        limited.restore(&before);
        assert!(limit.left_out.ports().is_empty());
    }

    #[test]
    fn the_first_match_is_kept_unless_its_dump_is_repeated() {
        let mut first = FirstMatch::new(|row: &DumpedSocket| row.entry.uid == Some(1));
        first.push(of_user(Some(2), 20));
        let dump = first.mark();
        first.push(of_user(Some(1), 10));
        first.restore(&dump);
        assert_eq!(first.found, None);
        for inode in [11, 12] {
            first.push(of_user(Some(1), inode));
        }
        let next_dump = first.mark();
        first.restore(&next_dump);
        assert_eq!(first.found, Some(of_user(Some(1), 11)));
    }
}
