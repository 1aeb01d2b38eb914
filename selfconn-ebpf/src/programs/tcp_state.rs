//! The common handling of a transition, after a program has found that the source address of the socket
//! equals its destination address: classify the transition, then update the tables and report.
//!
//! Every TCP state change on the host runs the address comparison, so that path has only loads and compares,
//! no helper call and no store. The code after it is in separate functions, because otherwise every run would
//! first save registers and set up the stack for it.

use aya_ebpf::{EbpfContext, Global, helpers::generated::bpf_ktime_get_boot_ns, programs::TracePointContext};
use aya_log_ebpf::warn;
use selfconn_ebpf::{
    Action, Field, IPPROTO_TCP, ListenerClosed, Transition, classify, counter, ends_listener, is_ordinary,
    reported, state, tag,
};

use super::{
    connect_table::{self, ensure_room},
    counters::count,
    guard,
    handled::{self, AttemptState},
    held_ports,
    kernel_read::{BtfOffsets, KernelRead, Layout},
    refused_connects, ring_buffer,
    sock::{Ports, SelfAddr, Sock},
    task::{current_image_and_owner, current_task},
    tracepoint_record::TracepointRecord,
    watched_ports,
};

/// One of [`reported`].
#[unsafe(no_mangle)]
static REPORTED: Global<u32> = Global::new(reported::STATES);

/// The states of a transition.
#[derive(Clone, Copy)]
pub(crate) struct StateChange {
    pub(crate) old: u8,
    pub(crate) new: u8,
}

/// Handles a transition for a program whose context has the socket. Most transitions of ordinary connections end here,
/// before anything is called or stored.
#[inline(always)]
pub(crate) fn on_socket<C: EbpfContext, M: KernelRead, L: Layout, const PROBE_ID: u8>(
    ctx: C,
    sock: Sock<M>,
    self_addr: SelfAddr,
    ports: Ports,
    change: StateChange,
) {
    let StateChange { old, new } = change;
    if !is_ordinary(old, new, ports.held, ports.destination) {
        on_likely_socket::<C, M, L, PROBE_ID>(ctx, sock, self_addr, old, new);
    }
}

#[inline(never)]
fn on_likely_socket<C: EbpfContext, M: KernelRead, L: Layout, const PROBE_ID: u8>(
    ctx: C,
    sock: Sock<M>,
    self_addr: SelfAddr,
    old: u8,
    new: u8,
) {
    // A listener at any address.
    if ends_listener(old, new) {
        return on_listener_closed(sock);
    }
    let Ports { held, destination: dport } = sock.ports::<L>();
    let source = sock.source_port(held, new);
    let action = classify(old, new, source, dport);
    if matches!(action, Action::Ignore)
        || action.is_about_attempt()
            && !handled::is_to_do::<M, L, PROBE_ID>(sock, AttemptState::new(old, new, dport))
    {
        return;
    }
    // The protocol is checked last, because it is in another cache line and the ports already exclude most
    // sockets.
    if sock.protocol() != IPPROTO_TCP {
        return;
    }
    let transition = SocketTransition { probe_id: PROBE_ID, self_addr, source, dport, old, new };
    handle(&ctx, sock, action, &transition);
}

/// Handles a transition for the program whose context is the tracepoint's record.
#[inline(never)]
pub(crate) fn on_tracepoint_record<const PROBE_ID: u8>(ctx: TracePointContext) {
    let Some(record) = TracepointRecord::new(&ctx).filter(|record| record.protocol == IPPROTO_TCP) else {
        return;
    };
    let TracepointRecord { sock, self_addr, old, new, sport, dport, .. } = record;
    if ends_listener(old, new) {
        return on_listener_closed(sock);
    }
    // The record has inet_sport, which is the right port except at SYN_SENT: see `classify`. Zero is right there, too,
    // because a socket that holds a port has it in inet_sport (`__inet_bind`, net/ipv4/af_inet.c at v5.10).
    let source = if new == state::SYN_SENT && sport != 0 { sock.num() } else { sport };
    let action = classify(old, new, source, dport);
    if matches!(action, Action::Ignore)
        || action.is_about_attempt()
            && !handled::is_to_do::<_, BtfOffsets, PROBE_ID>(sock, AttemptState::new(old, new, dport))
    {
        return;
    }
    let transition = SocketTransition { probe_id: PROBE_ID, self_addr, source, dport, old, new };
    handle(&ctx, sock, action, &transition);
}

/// Reports the end of a listener for which user space waits.
#[inline(never)]
pub(crate) fn on_listener_closed<M: KernelRead>(sock: Sock<M>) {
    if sock.protocol() != IPPROTO_TCP {
        return;
    }
    let endpoint = sock.endpoint(0, [0; 4], sock.source_port(sock.num(), state::CLOSE));
    watched_ports::report_once(&endpoint, || {
        ring_buffer::submit(|| ListenerClosed {
            tag: tag::LISTENER_CLOSED,
            padding: 0,
            more_padding: 0,
            endpoint,
        })
    });
}

/// A transition of a TCP socket whose source address equals its destination address. Ports are in host byte
/// order.
struct SocketTransition {
    probe_id: u8,
    self_addr: SelfAddr,
    source: u16,
    dport: u16,
    old: u8,
    new: u8,
}

#[inline(always)]
fn handle<C: EbpfContext, M: KernelRead>(
    ctx: &C,
    sock: Sock<M>,
    action: Action,
    transition: &SocketTransition,
) {
    match action {
        Action::Ignore => {}
        Action::Insert | Action::InsertAndReport => {
            insert(ctx, sock, transition);
            guard::on_connect(sock);
            if matches!(action, Action::InsertAndReport) {
                report(ctx, sock, transition, false);
            }
        }
        Action::Report => report(ctx, sock, transition, false),
        // Here and not in `report`, so that the verifier follows `report` no more often.
        Action::ReportAndRemove
            if transition.old == state::SYN_SENT && REPORTED.load() & reported::FAILED_ATTEMPTS == 0 =>
        {
            connect_table::remove(sock);
        }
        Action::ReportAndRemove => report(ctx, sock, transition, true),
        Action::Remove => connect_table::remove(sock),
        Action::RemoveAndCount => end_failed_connect(ctx, sock, transition),
    }
}

// The following functions are not inlined, so that each has its own stack frame.

/// Stores the connecting task in the connect table. If another CPU has changed a full set between choice and eviction,
/// the choice is made once more.
#[inline(always)]
fn insert<C: EbpfContext, M: KernelRead>(ctx: &C, sock: Sock<M>, transition: &SocketTransition) {
    let has_room = ensure_room(sock) || ensure_room(sock);
    if !(has_room && insert_entry(sock, transition)) {
        count_not_stored();
        warn!(ctx, "the connect table is full: an opener is not stored");
    }
}

#[inline(never)]
fn insert_entry<M: KernelRead>(sock: Sock<M>, transition: &SocketTransition) -> bool {
    let SocketTransition { probe_id, self_addr, source, dport, .. } = *transition;
    connect_table::insert(sock, probe_id, self_addr, source, dport)
}

/// The running task is not in the connect table.
#[inline(never)]
fn count_not_stored() {
    connect_table::count_loss(&current_image_and_owner().1);
}

/// Reports the transition of a self-connection, unless the other probe has reported it. `removes`: also removes
/// the entry from the connect table.
#[inline(never)]
fn report<C: EbpfContext, M: KernelRead>(
    ctx: &C,
    sock: Sock<M>,
    transition: &SocketTransition,
    removes: bool,
) {
    let SocketTransition { probe_id, self_addr, dport, old, new, .. } = *transition;
    if REPORTED.load() & 1 << (new & 31) == 0 {
        return;
    }
    // User space uses these counters to check that each program observes transitions.
    count(counter::SEEN_BY_PROBE + u32::from(probe_id));
    let endpoint = self_addr.endpoint(sock, dport);
    // SAFETY: the helper takes no arguments.
    let at_ns = unsafe { bpf_ktime_get_boot_ns() };
    if new == state::ESTABLISHED {
        held_ports::set(&endpoint, at_ns);
    }
    let (already_reported, opener) = connect_table::mark_reported(sock, &endpoint, new, removes);
    if already_reported {
        return;
    }
    let is_submitted = ring_buffer::submit(|| {
        let counters = sock.tcp_counters();
        let has_counters = u8::from(counters.is_some());
        let counters = counters.unwrap_or_default();
        Transition {
            tag: tag::TRANSITION,
            old,
            new,
            probe_id,
            has_counters,
            is_owned: u8::from(sock.is_owned()),
            socket_file: sock.file(),
            at_ns,
            sock: sock.key(),
            cookie: sock.cookie(),
            endpoint,
            bytes_sent: counters.bytes_sent,
            bytes_retrans: counters.bytes_retrans,
            bytes_received: counters.bytes_received,
            snd_una: counters.snd_una,
            rcv_nxt: counters.rcv_nxt,
            uid: sock.get(Field::SockUid),
            error: sock.get::<u32>(Field::Error) as u16,
            options: sock.bind_options(),
            is_time_wait_full: u8::from(new == state::CLOSE && sock.is_time_wait_full()),
            inode: sock.inode(),
            current: current_task().0,
            opener,
        }
    });
    if !is_submitted {
        connect_table::mark_not_reported(sock, new);
        warn!(ctx, "ring buffer full: transition {} -> {} of port {} is lost", old, new, dport);
    }
}

/// Removes the entry of a failed connection attempt, and counts the attempt if it was refused. Only one of
/// the two probes finds the entry, so the attempt is counted once.
#[inline(never)]
fn end_failed_connect<C: EbpfContext, M: KernelRead>(ctx: &C, sock: Sock<M>, transition: &SocketTransition) {
    let endpoint = transition.self_addr.endpoint(sock, transition.dport);
    if let Some(opener) = connect_table::take(sock, &endpoint)
        && sock.was_refused()
    {
        refused_connects::count_refused(ctx, sock, &endpoint, &opener);
    }
}
