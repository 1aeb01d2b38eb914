//! The common handling of a transition, after a program has found that the source address of the socket
//! equals its destination address: classify the transition, then update the tables and report.
//!
//! Every TCP state change on the host runs the address comparison, so that path has only loads and compares,
//! no helper call and no store. The code after it is in separate functions, because otherwise every run would
//! first save registers and set up the stack for it.

use aya_ebpf::{EbpfContext, programs::TracePointContext};
use selfconn_ebpf::{Action, Endpoint, IPPROTO_TCP, classify, state};

use super::{
    connect_table::{self, NewAttempt},
    refused_connects,
    ring_buffer::{ReportedTransition, report},
    sock::{KernelRead, SelfAddr, Sock, TracepointRecord},
};

/// Handles a transition for a program whose context has the socket.
#[inline(never)]
pub(crate) fn on_socket<C: EbpfContext, M: KernelRead, const PROBE_ID: u8>(
    ctx: C,
    sock: Sock<M>,
    self_addr: SelfAddr,
    old: u8,
    new: u8,
) {
    let (source, dport) = (sock.source_port(new), sock.dport());
    // The protocol is checked last, because it is in another cache line and the ports already exclude most
    // sockets.
    if matches!(classify(old, new, source, dport), Action::Ignore) || sock.protocol() != IPPROTO_TCP {
        return;
    }
    handle(&ctx, sock, &SocketTransition { probe_id: PROBE_ID, self_addr, source, dport, old, new });
}

/// Handles a transition for the program whose context is the tracepoint's record.
#[inline(never)]
pub(crate) fn on_tracepoint_record<const PROBE_ID: u8>(ctx: TracePointContext) {
    let Some(record) = TracepointRecord::new(&ctx).filter(|record| record.protocol == IPPROTO_TCP) else {
        return;
    };
    let TracepointRecord { sock, self_addr, old, new, dport, .. } = record;
    // The record has inet_sport, which is the right port except at SYN_SENT: see `classify`.
    let source = if new == state::SYN_SENT { sock.num() } else { record.sport };
    handle(&ctx, sock, &SocketTransition { probe_id: PROBE_ID, self_addr, source, dport, old, new });
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
fn handle<C: EbpfContext, M: KernelRead>(ctx: &C, sock: Sock<M>, transition: &SocketTransition) {
    let SocketTransition { probe_id, self_addr, source, dport, old, new } = *transition;
    // Each step has exactly one call site, because each is inlined and the stack of a program is small.
    let (inserts, reports, removes_and_counts, removes) = match classify(old, new, source, dport) {
        Action::Ignore => return,
        Action::Insert => (true, false, false, false),
        Action::InsertAndReport => (true, true, false, false),
        Action::Report => (false, true, false, false),
        Action::ReportAndRemove => (false, true, false, true),
        Action::RemoveAndCount => (false, false, true, false),
        Action::Remove => (false, false, false, true),
    };
    let endpoint = || Endpoint {
        addr: self_addr.addr(),
        netns: sock.netns(),
        port: dport,
        family: self_addr.family().into(),
    };
    if inserts {
        let attempt = NewAttempt {
            probe_id,
            addr: self_addr.addr(),
            dport,
            family: self_addr.family(),
            source_port: source,
        };
        connect_table::insert(ctx, sock, &attempt);
    }
    if reports {
        report(ctx, sock, &ReportedTransition { probe_id, endpoint: endpoint(), old, new });
    }
    if removes_and_counts {
        end_failed_connect(ctx, sock, &endpoint());
    }
    if removes {
        connect_table::remove(sock);
    }
}

/// Removes the entry of a failed connection attempt, and counts the attempt if it was refused. Only one of
/// the two probes finds the entry, so the attempt is counted once. This function is not inlined, so that it
/// has its own stack frame.
#[inline(never)]
fn end_failed_connect<C: EbpfContext, M: KernelRead>(ctx: &C, sock: Sock<M>, endpoint: &Endpoint) {
    if let Some(opener) = connect_table::take(sock, endpoint)
        && sock.was_refused()
    {
        refused_connects::count_refused(ctx, endpoint, &opener);
    }
}
