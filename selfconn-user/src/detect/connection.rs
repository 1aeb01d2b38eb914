//! Turns socket state transitions into connection events: each self-connection is established once and closed
//! once, no matter how many probes reported a transition or missed it. Pure: no clock, no kernel, no I/O.
//!
//! The kernel's socket table is the second input. It is read at intervals: a self-connection that the table
//! lists and the hooks missed is established, a self-connection that the table no longer lists is closed
//! (`connection/reconcile.rs`).
//!
//! Two probes may report the same transition. They run one after the other under the socket's lock. The
//! records of one socket are therefore in order in the ring buffer. Each record is there once or twice, or
//! not at all if it was lost.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
};

use selfconn_ebpf::{BindOptions, COMM_LEN, Endpoint, Opener, Owner, Task, Transition, socket_file, state};

use super::port_set::PortSet;
use crate::sockets::{SocketEntry, SocketRef};
use identity::ClosedSockets;
use table::TrackedTable;

pub use identity::SocketId;

mod identity;
mod reconcile;
mod table;
#[cfg(test)]
mod tests;

/// How long TIME_WAIT lasts: `TCP_TIMEWAIT_LEN`, include/net/tcp.h at v5.10, a constant of the kernel.
pub const TIME_WAIT_NS: u64 = 60_000_000_000;

/// For how long after a close a second report of it is treated as a duplicate. A later report belongs to the
/// next socket at the same kernel address.
const DUPLICATE_WINDOW_NS: u64 = 5_000_000_000;

/// Kernel errnos that show how a socket was closed.
const ECONNABORTED: u16 = 103;
const ECONNRESET: u16 = 104;

/// How a self-connection was detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A hook reported it.
    Live,
    /// The socket table listed it.
    Scan,
}

/// One self-connection, with all that is known about it so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// Counts from 1 in this run. The `id` of the events is made of the run's id and this number.
    pub number: u64,
    /// How it was detected.
    pub source: Source,
    pub cookie: Option<u64>,
    /// Source and destination.
    pub endpoint: Endpoint,
    /// The name of the device that the socket is bound to, as a snapshot found it.
    pub device: Option<Arc<str>>,
    /// The inode of the socket's file. `None`: unknown, or the socket has none.
    pub inode: Option<u64>,
    /// The user that owns the socket.
    pub uid: Option<u32>,
    /// The options of the socket, as they were when it was last seen.
    pub options: BindOptions,
    /// The task that called connect().
    pub opener: Option<Opener>,
    /// True if the kernel itself made and uses the socket: it has no file, so no process can have it open.
    pub is_kernel_socket: Option<bool>,
    /// The socket's initial sequence number and its peer's. They are equal, because the socket is its own
    /// peer.
    pub isns: Option<(u32, u32)>,
    /// The task that closed the socket: the current task at ESTABLISHED -> FIN_WAIT1, or at a CLOSE that a
    /// system call on the socket caused.
    pub closer: Option<Task>,
    /// When it became ESTABLISHED: `CLOCK_BOOTTIME`, nanoseconds. `None`: no hook reported that transition.
    pub established_ns: Option<u64>,
}

/// How a self-connection was closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Orderly, with FINs.
    Fin,
    /// Reset: SO_LINGER with timeout 0, or a close with unread data.
    Rst,
    /// Destroyed with SOCK_DESTROY.
    Destroyed,
}

/// What is known when a self-connection is closed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConnectionEnd {
    /// Time from ESTABLISHED to CLOSE.
    pub duration_ns: Option<u64>,
    /// Payload bytes sent, without retransmissions.
    pub bytes_sent: Option<u64>,
    /// Payload bytes received.
    pub bytes_received: Option<u64>,
    /// `None`: the last transition and the socket's errno match none of the reasons.
    pub reason: Option<CloseReason>,
    /// When TIME_WAIT ends if the host is not suspended before: `CLOCK_BOOTTIME`, nanoseconds. `None`: the port is
    /// free, or it is not known whether there is a TIME_WAIT, because the namespace may have no more of them.
    pub port_blocked_until_ns: Option<u64>,
}

/// What a transition, or the socket table, means for a self-connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionEvent<'a> {
    /// The self-connection is established.
    Established(&'a Connection),
    /// Its state changed from the first state to the second.
    State(&'a Connection, u8, u8),
    /// It is closed.
    Closed(&'a Connection, ConnectionEnd),
}

impl<'a> ConnectionEvent<'a> {
    /// The connection that the event is about.
    #[must_use]
    pub fn connection(self) -> &'a Connection {
        let (Self::Established(connection) | Self::State(connection, ..) | Self::Closed(connection, _)) =
            self;
        connection
    }
}

/// All tracked sockets, by their kernel address.
#[derive(Debug, Default)]
pub struct Connections {
    tracked: TrackedTable,
    /// Keys of connections that the socket table listed and whose kernel address is not known yet.
    provisional_keys: HashMap<SocketId, u64>,
    /// The connections closed since the current snapshot of the socket table began. `None`: no snapshot is in
    /// progress.
    closed_during_snapshot: Option<ClosedSockets>,
    /// Closed sockets whose close a second probe may still report: time of the close, and kernel address. A
    /// kernel address is queued at most once: the kernel reuses addresses of sockets, and in a flood a few
    /// addresses are closed thousands of times a second.
    duplicate_queue: VecDeque<(u64, u64)>,
    /// The kernel addresses in `duplicate_queue`.
    awaiting_duplicates: HashSet<u64>,
    /// See [`Self::set_left_out`].
    left_out: HashMap<Option<u32>, u64>,
    left_out_ports: PortSet,
    probe_count: u8,
    /// See [`Self::with_own_pid`].
    own_pid: Option<u32>,
    last_number: u64,
}

#[derive(Debug)]
struct Tracked {
    connection: Connection,
    /// Who pays for it in the table.
    payer: Owner,
    /// The last transition, and one bit for each probe that reported it.
    last: (u8, u8),
    reported_by: u8,
    /// Time of the last report: `CLOCK_BOOTTIME`, nanoseconds.
    last_seen_ns: u64,
    /// True if `established` has been emitted.
    established_emitted: bool,
    /// True if the snapshot that is compared lists it.
    is_listed: bool,
    /// True if the last snapshot that should have listed it did not.
    was_absent: bool,
    closed_ns: Option<u64>,
}

impl Connections {
    /// `probe_count` is the number of probes that report transitions.
    #[must_use]
    pub fn new(probe_count: u8) -> Self {
        Self { probe_count, ..Self::default() }
    }

    /// `own_pid` is the pid of this process as the programs see it. What closes in it without being destroyed is the
    /// socket of another process: whoever walks over descriptors holds the file of each for a moment, and if the
    /// process that has it closes it in that moment, the kernel closes it in the walking thread (`fput` in
    /// `task_file_seq_next`, kernel/bpf/task_iter.c, and in `proc_fd_link`, fs/proc/fd.c, at v6.12).
    #[must_use]
    pub fn with_own_pid(self, own_pid: Option<u32>) -> Self {
        Self { own_pid, ..self }
    }

    /// Applies one transition. Calls `each` for every resulting event.
    pub fn apply(&mut self, t: &Transition, mut each: impl FnMut(ConnectionEvent<'_>)) {
        self.expire_duplicates(t.at_ns);
        self.assign_socket(t, &mut each);
        if let Some(tracked) = self.tracked.get_mut(t.sock) {
            if tracked.is_duplicate(t) {
                tracked.reported_by |= 1 << t.probe_id;
                tracked.update(t, self.own_pid);
                if tracked.closed_ns.is_some()
                    && tracked.reported_by.count_ones() >= u32::from(self.probe_count)
                {
                    self.tracked.remove(t.sock);
                }
                return;
            }
            if !tracked.can_follow(t) {
                self.close_missed(t.sock, &mut each);
            }
        }
        if self.tracked.get(t.sock).is_none() {
            let payer = table::payer_of_transition(t);
            if !self.tracked.take_room(payer) {
                self.tracked.on_untracked(payer, t);
                return;
            }
            self.last_number += 1;
            self.tracked.insert(t.sock, Tracked::new(self.last_number, payer, t));
        }
        let Some(tracked) = self.tracked.get_mut(t.sock) else { return };
        tracked.last = (t.old, t.new);
        tracked.reported_by = 1 << t.probe_id;
        tracked.last_seen_ns = t.at_ns;
        tracked.update(t, self.own_pid);
        if !tracked.established_emitted && proves_established(t.old, t.new) {
            tracked.established_emitted = true;
            each(ConnectionEvent::Established(&tracked.connection));
        }
        each(ConnectionEvent::State(&tracked.connection, t.old, t.new));
        if t.new == state::CLOSE {
            if tracked.established_emitted {
                close(
                    &mut self.closed_during_snapshot,
                    &tracked.connection,
                    end(&tracked.connection, t),
                    &mut each,
                );
            }
            tracked.closed_ns = Some(t.at_ns);
            if self.probe_count > 1 {
                if self.awaiting_duplicates.insert(t.sock) {
                    self.duplicate_queue.push_back((t.at_ns, t.sock));
                }
            } else {
                self.tracked.remove(t.sock);
            }
        }
    }

    /// This kernel address is that of another socket now. If the one before is still tracked as open, its close was
    /// missed.
    fn close_missed(&mut self, sock: u64, mut each: impl FnMut(ConnectionEvent<'_>)) {
        let tracked = self.tracked.remove(sock);
        if let Some(tracked) = tracked.filter(|one| one.established_emitted && one.closed_ns.is_none()) {
            close(&mut self.closed_during_snapshot, &tracked.connection, ConnectionEnd::default(), &mut each);
        }
    }

    /// The numbers of all tracked connections, established or not, in order.
    #[must_use]
    pub fn numbers(&self) -> Vec<u64> {
        let mut numbers = Vec::with_capacity(self.tracked.count());
        numbers.extend(self.tracked.iter().map(|(_, tracked)| tracked.connection.number));
        numbers.sort_unstable();
        numbers
    }

    /// All open self-connections.
    pub fn iter(&self) -> impl Iterator<Item = &Connection> {
        let is_open = |tracked: &&Tracked| tracked.established_emitted && tracked.closed_ns.is_none();
        self.tracked.iter().map(|(_, tracked)| tracked).filter(is_open).map(|tracked| &tracked.connection)
    }

    /// The sockets of the self-connections with these numbers have these options now.
    pub fn set_options(&mut self, options: &HashMap<u64, BindOptions>) {
        if options.is_empty() {
            return;
        }
        for (_, Tracked { connection, .. }) in self.tracked.iter_mut() {
            if let Some(now) = options.get(&connection.number) {
                connection.options = *now;
            }
        }
    }

    /// Number of self-connections for which there was no room. They have no event, unless there is room when they are
    /// closed or listed.
    #[must_use]
    pub fn untracked(&self) -> u64 {
        self.tracked.untracked.total()
    }

    /// True if a self-connection that is not tracked, and may still be open, may hold this port.
    #[must_use]
    pub fn may_lack_open_at(&self, endpoint: &Endpoint) -> bool {
        self.tracked.may_lack_open_at(endpoint)
    }

    /// The ports of the self-connections that are not tracked, and may still be open.
    #[must_use]
    pub fn untracked_ports(&self) -> PortSet {
        self.tracked.untracked_ports()
    }

    /// Those since the last call, by owner.
    pub fn take_untracked(&mut self) -> Vec<(Owner, u64)> {
        self.tracked.untracked.take_unreported()
    }

    fn expire_duplicates(&mut self, now_ns: u64) {
        while let Some((closed_ns, sock)) = self.duplicate_queue.front().copied() {
            // The close of the socket that is at this address now. That socket may still be open.
            let current_closed_ns = self.tracked.get(sock).and_then(|tracked| tracked.closed_ns);
            let is_awaited = current_closed_ns
                .is_some_and(|closed_ns| now_ns.saturating_sub(closed_ns) < DUPLICATE_WINDOW_NS);
            if is_awaited && current_closed_ns == Some(closed_ns) {
                break;
            }
            self.duplicate_queue.pop_front();
            if let Some(current_closed_ns) = current_closed_ns.filter(|_| is_awaited) {
                self.duplicate_queue.push_back((current_closed_ns, sock));
                continue;
            }
            if current_closed_ns.is_some() {
                self.tracked.remove(sock);
            }
            self.awaiting_duplicates.remove(&sock);
        }
    }
}

/// Emits the close of a self-connection, and records it for the snapshot of the socket table that is in
/// progress.
fn close(
    closed_during_snapshot: &mut Option<ClosedSockets>,
    connection: &Connection,
    end: ConnectionEnd,
    each: &mut impl FnMut(ConnectionEvent<'_>),
) {
    if let Some(closed) = closed_during_snapshot {
        closed.insert(connection);
    }
    each(ConnectionEvent::Closed(connection, end));
}

impl Connection {
    /// A connection of which only this is known.
    pub(crate) fn new(number: u64, source: Source, endpoint: Endpoint) -> Self {
        Self {
            number,
            source,
            cookie: None,
            endpoint,
            device: None,
            inode: None,
            uid: None,
            options: BindOptions::UNKNOWN,
            opener: None,
            is_kernel_socket: None,
            isns: None,
            closer: None,
            established_ns: None,
        }
    }

    /// Who pays for it: the opener or, if the opener is unknown, the user that owns the socket.
    #[must_use]
    pub fn payer(&self) -> Owner {
        table::payer(self.opener.as_ref(), self.uid.unwrap_or(0))
    }

    /// What the socket is recognized by. `None`: it has no file, or its inode is unknown.
    #[must_use]
    pub fn socket_ref(&self) -> Option<SocketRef> {
        let Self { cookie, inode, endpoint, .. } = *self;
        Some(SocketRef { cookie, inode: inode?, endpoint: Some(endpoint) })
    }

    /// A connection with all that the socket table says.
    #[must_use]
    pub fn from_entry(number: u64, entry: &SocketEntry) -> Self {
        Self {
            cookie: entry.cookie,
            device: entry.device.clone(),
            inode: (entry.inode != 0).then_some(entry.inode),
            uid: entry.uid,
            options: entry.options,
            opener: entry.connect_entry.as_ref().map(|entry| entry.1),
            is_kernel_socket: entry.is_held.then_some(false),
            ..Self::new(number, Source::Scan, entry.endpoint)
        }
    }
}

impl Tracked {
    fn new(number: u64, payer: Owner, t: &Transition) -> Self {
        Self {
            payer,
            connection: Connection::new(number, Source::Live, t.endpoint),
            last: (t.old, t.new),
            reported_by: 0,
            last_seen_ns: t.at_ns,
            established_emitted: false,
            is_listed: false,
            was_absent: false,
            closed_ns: None,
        }
    }

    /// True if this transition is about this socket, and not about another one at the same kernel address.
    fn is_same_socket(&self, t: &Transition) -> bool {
        let connection = &self.connection;
        if let Some(cookie) = connection.cookie
            && t.cookie != 0
        {
            return cookie == t.cookie;
        }
        let connected_ns = connection.opener.map_or(0, |opener| opener.at_ns);
        // Each probe records the opener at SYN_SENT. The second probe overwrites the first one's entry a
        // moment later.
        let is_same_attempt = connected_ns == 0 || t.opener.at_ns == 0 || connected_ns == t.opener.at_ns;
        (is_same_attempt || t.new == state::SYN_SENT)
            && connection.endpoint.table_key() == t.endpoint.table_key()
    }

    /// True if another probe has already reported this transition.
    fn is_duplicate(&self, t: &Transition) -> bool {
        self.last == (t.old, t.new)
            && self.reported_by & 1 << t.probe_id == 0
            && self.is_same_socket(t)
            && self.closed_ns.is_none_or(|closed_ns| t.at_ns.saturating_sub(closed_ns) < DUPLICATE_WINDOW_NS)
    }

    /// True if this can be the next transition of the same socket. False if it belongs to a later socket at
    /// the same kernel address.
    fn can_follow(&self, t: &Transition) -> bool {
        self.closed_ns.is_none()
            && t.new != state::SYN_SENT
            && rank(t.old) >= rank(self.last.1)
            && self.is_same_socket(t)
    }

    fn update(&mut self, t: &Transition, own_pid: Option<u32>) {
        let connection = &mut self.connection;
        if t.cookie != 0 {
            connection.cookie = Some(t.cookie);
        }
        if t.inode != 0 {
            (connection.inode, connection.uid) = (Some(t.inode), Some(t.uid));
        }
        if t.options.is_known() {
            connection.options = t.options;
        }
        if t.opener.at_ns != 0 {
            connection.opener = Some(t.opener);
        }
        let opener = connection.opener.as_ref();
        match t.socket_file {
            // Who has the file shows in who connected the socket. If nobody saw that, a process that has it open shows.
            socket_file::PRESENT => {
                if let Some(opener) = opener {
                    connection.is_kernel_socket = Some(opener.is_kernel_thread());
                }
            }
            socket_file::ABSENT => connection.is_kernel_socket = Some(true),
            socket_file::OF_MPTCP => connection.is_kernel_socket = Some(false),
            _ => {}
        }
        if (t.old, t.new) == (state::SYN_RECV, state::ESTABLISHED) && t.has_counters != 0 {
            connection.isns = Some((t.snd_una.wrapping_sub(1), t.rcv_nxt.wrapping_sub(1)));
        }
        let is_call = t.new == state::FIN_WAIT1 || (t.new == state::CLOSE && t.is_owned != 0);
        let is_destroyed = t.new == state::CLOSE && (t.has_counters == 0 || t.error == ECONNABORTED);
        let is_by_walk = own_pid == Some(t.current.pid) && !is_destroyed;
        if is_call && !is_by_walk && connection.closer.is_none() && rank(t.old) == rank(state::ESTABLISHED) {
            connection.closer = Some(t.current);
        }
        if t.new == state::ESTABLISHED && connection.established_ns.is_none() {
            connection.established_ns = Some(t.at_ns);
        }
    }
}

/// Progress of a socket through its states. The rank of one socket never decreases.
const fn rank(state: u8) -> u8 {
    match state {
        state::SYN_SENT => 1,
        state::SYN_RECV => 2,
        state::ESTABLISHED => 3,
        state::FIN_WAIT1 | state::CLOSE_WAIT => 4,
        state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK => 5,
        state::TIME_WAIT => 6,
        // A new socket starts in CLOSE, too, but its first transition is to SYN_SENT. The caller checks that
        // first.
        _ => 0,
    }
}

/// True if a socket with this transition is, or has been, ESTABLISHED.
const fn proves_established(old: u8, new: u8) -> bool {
    new == state::ESTABLISHED || rank(old) >= rank(state::ESTABLISHED)
}

fn end(connection: &Connection, t: &Transition) -> ConnectionEnd {
    // A FIN was received. The kernel counts it as one received byte.
    let fin_received =
        matches!(t.old, state::CLOSING | state::TIME_WAIT | state::CLOSE_WAIT | state::LAST_ACK);
    let has_counters = t.has_counters != 0;
    let reason = match (t.error, t.old) {
        _ if !has_counters => None,
        (ECONNABORTED, _) => Some(CloseReason::Destroyed),
        (ECONNRESET, _) | (0, state::ESTABLISHED) => Some(CloseReason::Rst),
        (0, _) if fin_received => Some(CloseReason::Fin),
        _ => None,
    };
    ConnectionEnd {
        duration_ns: connection.established_ns.map(|since_ns| t.at_ns.saturating_sub(since_ns)),
        bytes_sent: has_counters.then(|| t.bytes_sent.saturating_sub(t.bytes_retrans)),
        bytes_received: has_counters.then(|| t.bytes_received.saturating_sub(u64::from(fin_received))),
        reason,
        port_blocked_until_ns: (reason == Some(CloseReason::Fin) && t.is_time_wait_full == 0)
            .then_some(t.at_ns.saturating_add(TIME_WAIT_NS)),
    }
}

/// A task name of the kernel as text, up to the NUL. It is not escaped: the code that prints it must escape
/// it.
#[must_use]
pub fn comm(bytes: &[u8; COMM_LEN]) -> String {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..len]).into_owned()
}
