//! The record of the perf tracepoint `inet_sock_set_state`.

use aya_ebpf::{EbpfContext, programs::TracePointContext};

use selfconn_ebpf::{ends_listener, is_ordinary};

use super::{
    kernel_read::{Pointer, ProbeRead},
    sock::{SelfAddr, Sock},
};

/// `trace_event_raw_inet_sock_set_state`, include/trace/events/sock.h at v5.10. The layout is the same from v5.6
/// on. The verifier refuses run-time offsets into a context, so they are constants here, and user space compares
/// them with the kernel's `format` file.
pub(crate) struct TracepointRecord {
    pub(crate) sock: Sock<ProbeRead>,
    pub(crate) self_addr: SelfAddr,
    pub(crate) old: u8,
    pub(crate) new: u8,
    /// Host byte order, from `inet_sport`.
    pub(crate) sport: u16,
    /// Host byte order.
    pub(crate) dport: u16,
    pub(crate) protocol: u16,
}

impl TracepointRecord {
    /// True if the source address equals the destination address. The v6 fields also hold IPv4 addresses, as
    /// v4-mapped. The v4 fields are meaningless for IPv6.
    #[inline(always)]
    pub(crate) fn is_self_addressed(ctx: &TracePointContext) -> bool {
        // The lower half is compared first, because two addresses usually differ there.
        field::<u64>(ctx, 48) == field::<u64>(ctx, 64) && field::<u64>(ctx, 40) == field::<u64>(ctx, 56)
    }

    /// See [`is_ordinary`].
    #[inline(always)]
    pub(crate) fn is_ordinary(ctx: &TracePointContext) -> bool {
        let (old, new) = (field::<u32>(ctx, 16) as u8, field::<u32>(ctx, 20) as u8);
        is_ordinary(old, new, field(ctx, 24), field(ctx, 26))
    }

    /// The socket, if it is a listener that is closed.
    #[inline(always)]
    pub(crate) fn former_listener(ctx: &TracePointContext) -> Option<Sock<ProbeRead>> {
        let (old, new) = (field::<u32>(ctx, 16) as u8, field::<u32>(ctx, 20) as u8);
        ends_listener(old, new).then(|| Sock::new(field::<Pointer>(ctx, 8).0))
    }

    /// The record, if the source address equals the destination address.
    #[inline(always)]
    pub(crate) fn new(ctx: &TracePointContext) -> Option<Self> {
        Self::is_self_addressed(ctx).then(|| Self {
            sock: Sock::new(field::<Pointer>(ctx, 8).0),
            self_addr: SelfAddr::new(field::<u16>(ctx, 28) as u8, [field(ctx, 40), field(ctx, 48)]),
            old: field::<u32>(ctx, 16) as u8,
            new: field::<u32>(ctx, 20) as u8,
            sport: field(ctx, 24),
            dport: field(ctx, 26),
            protocol: field(ctx, 30),
        })
    }
}

/// A field of the tracepoint's record.
#[inline(always)]
fn field<T: Copy>(ctx: &TracePointContext, offset: usize) -> T {
    // SAFETY: the record has 72 bytes, each field in it is aligned, and the verifier checks every load.
    unsafe { ctx.as_ptr().cast_const().cast::<u8>().add(offset).cast::<T>().read() }
}
