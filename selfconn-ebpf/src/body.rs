//! What every program does with a transition: leave it if the socket's two addresses differ, else judge it and act.
//!
//! The comparison is the path of every TCP state change on the host: loads and compares, no helper, no store. What
//! comes after it is a function of its own, for its registers and its stack would else be saved and set up first.

use aya_ebpf::{EbpfContext, programs::TracePointContext};
use selfconn_ebpf::{IPPROTO_TCP, Tuple, Verdict, judge, state};

use crate::{
    refusal,
    report::{Step, report},
    sock::{Memory, Own, Record, Sock},
    witness::{self, Dialling},
};

/// A program that was handed the socket.
#[inline(never)]
pub(crate) fn socket<C: EbpfContext, M: Memory, const WITNESS: u8>(
    ctx: C,
    sock: Sock<M>,
    own: Own,
    old: u8,
    new: u8,
) {
    let (source, dport) = (sock.source_port(new), sock.dport());
    // The protocol last: it is in another cache line, and the ports of most say already that they are not ours.
    if matches!(judge(old, new, source, dport), Verdict::Ignore) || sock.protocol() != IPPROTO_TCP {
        return;
    }
    act(&ctx, sock, &Seen { witness: WITNESS, own, source, dport, old, new });
}

/// The program that was handed the tracepoint's record.
#[inline(never)]
pub(crate) fn record<const WITNESS: u8>(ctx: TracePointContext) {
    let Some(record) = Record::new(&ctx).filter(|record| record.protocol == IPPROTO_TCP) else { return };
    let Record { sock, own, old, new, dport, .. } = record;
    // The record has inet_sport, which is right but at SYN_SENT: see `judge`.
    let source = if new == state::SYN_SENT { sock.num() } else { record.sport };
    act(&ctx, sock, &Seen { witness: WITNESS, own, source, dport, old, new });
}

/// A transition of a TCP socket whose two addresses are equal. Ports in host byte order.
struct Seen {
    witness: u8,
    own: Own,
    source: u16,
    dport: u16,
    old: u8,
    new: u8,
}

#[inline(always)]
fn act<C: EbpfContext, M: Memory>(ctx: &C, sock: Sock<M>, seen: &Seen) {
    let Seen { witness, own, source, dport, old, new } = *seen;
    // One place for each step, for each is inlined: the stack of a program is small.
    let (remembers, reports, ends, forgets) = match judge(old, new, source, dport) {
        Verdict::Ignore => return,
        Verdict::Remember => (true, false, false, false),
        Verdict::RememberAndReport => (true, true, false, false),
        Verdict::Report => (false, true, false, false),
        Verdict::ReportAndForget => (false, true, false, true),
        Verdict::CountAndForget => (false, false, true, false),
        Verdict::Forget => (false, false, false, true),
    };
    let tuple = || Tuple { addr: own.addr(), netns: sock.netns(), dport, family: own.family().into() };
    if remembers {
        let dialling =
            Dialling { witness, addr: own.addr(), dport, family: own.family(), source_port: source };
        witness::remember(ctx, sock, &dialling);
    }
    if reports {
        report(ctx, sock, &Step { witness, tuple: tuple(), old, new });
    }
    if ends {
        refused(ctx, sock, &tuple());
    }
    if forgets {
        witness::forget(sock);
    }
}

/// Ends a dial that came to nothing, and counts it if it was refused. One witness ends it, and so it is counted once. A
/// function of its own, for a stack of its own.
#[inline(never)]
fn refused<C: EbpfContext, M: Memory>(ctx: &C, sock: Sock<M>, tuple: &Tuple) {
    if let Some(dialler) = witness::end(sock, tuple)
        && sock.was_refused()
    {
        refusal::count(ctx, tuple, &dialler);
    }
}
