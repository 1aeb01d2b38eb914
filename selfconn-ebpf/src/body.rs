//! What every program does with a transition: leave it if the socket's two addresses differ, else judge it and act.
//!
//! The first comparison is the path of every TCP state change on the host: loads and compares, no helper, no store.

use aya_ebpf::{EbpfContext, programs::TracePointContext};
use selfconn_ebpf::{IPPROTO_TCP, Tuple, Verdict, judge, state};

use crate::{
    refusal,
    report::report,
    sock::{Memory, Record, Sock},
    witness,
};

/// A program that was handed the socket.
#[inline(always)]
pub(crate) fn socket<C: EbpfContext, M: Memory>(ctx: &C, witness: u8, sock: Sock<M>, old: u8, new: u8) {
    let Some((family, addr)) = sock.own_address() else { return };
    if sock.protocol() != IPPROTO_TCP {
        return;
    }
    let (source, dport) = (sock.source_port(new), sock.dport());
    act(ctx, witness, sock, Seen { family, addr, source, dport, old, new });
}

/// The program that was handed the tracepoint's record.
#[inline(always)]
pub(crate) fn record(ctx: &TracePointContext, witness: u8, record: &Record) {
    let Some((family, addr)) = record.own_address() else { return };
    if record.protocol != IPPROTO_TCP {
        return;
    }
    let (old, new, dport) = (record.old, record.new, record.dport);
    // The record has inet_sport, which is right but at SYN_SENT: see `judge`.
    let source = if new == state::SYN_SENT { record.sock.num() } else { record.sport };
    act(ctx, witness, record.sock, Seen { family, addr, source, dport, old, new });
}

/// A transition of a TCP socket whose two addresses are equal. Ports in host byte order.
struct Seen {
    family: u8,
    addr: [u32; 4],
    source: u16,
    dport: u16,
    old: u8,
    new: u8,
}

#[inline(always)]
fn act<C: EbpfContext, M: Memory>(ctx: &C, witness: u8, sock: Sock<M>, seen: Seen) {
    let Seen { family, addr, source, dport, old, new } = seen;
    let verdict = judge(old, new, source, dport);
    if matches!(verdict, Verdict::Ignore) {
        return;
    }
    let tuple = Tuple { addr, netns: sock.netns(), dport, family: family.into() };
    match verdict {
        Verdict::Ignore => {}
        Verdict::Remember => witness::remember(ctx, sock.key(), tuple, source),
        Verdict::RememberAndReport => {
            witness::remember(ctx, sock.key(), tuple, source);
            report(ctx, witness, sock, &tuple, old, new);
        }
        Verdict::Report => report(ctx, witness, sock, &tuple, old, new),
        Verdict::ReportAndForget => {
            report(ctx, witness, sock, &tuple, old, new);
            witness::forget(sock.key());
        }
        Verdict::Forget => witness::forget(sock.key()),
        Verdict::CountAndForget => {
            // One witness ends a dial, and so it is counted once.
            if let Some(dialler) = witness::end(sock.key(), &tuple)
                && sock.was_refused()
            {
                refusal::count(ctx, &tuple, &dialler);
            }
        }
    }
}
