//! The eBPF programs, one for each method of each hook. A program turns its context into what `body.rs` works on,
//! and does nothing else.
//!
//! On the host this file is an empty `main`, so that the whole workspace checks, lints and formats there.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// build-std asks for an unstable compiler anyway; inline assembly is for the one instruction that core lacks here.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod body;
#[cfg(target_arch = "bpf")]
mod refusal;
#[cfg(target_arch = "bpf")]
mod report;
#[cfg(target_arch = "bpf")]
mod sock;
#[cfg(target_arch = "bpf")]
mod victim;
#[cfg(target_arch = "bpf")]
mod witness;

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        macros::{btf_tracepoint, fentry, fexit, kprobe, tracepoint},
        programs::{BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, TracePointContext},
    };

    use crate::{
        body,
        sock::{Any, Direct, Layout, Own, Probe, Record, Sock, Usual},
        victim,
    };

    /// `inet_sock_set_state(sk, oldstate, newstate)`, after the state is set.
    #[btf_tracepoint(function = "inet_sock_set_state")]
    fn selfconn_tp_btf(ctx: BtfTracePointContext) -> i32 {
        tp_btf::<Usual>(ctx)
    }

    /// The same where the addresses are elsewhere.
    #[btf_tracepoint(function = "inet_sock_set_state")]
    fn selfconn_tp_btf_any(ctx: BtfTracePointContext) -> i32 {
        tp_btf::<Any>(ctx)
    }

    #[inline(always)]
    fn tp_btf<L: Layout>(ctx: BtfTracePointContext) -> i32 {
        let sock = Sock::<Direct>::new(ctx.arg(0));
        if let Some(own) = sock.own_address::<L>() {
            let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
            body::socket::<_, _, 0>(ctx, sock, own, old as u8, new as u8);
        }
        0
    }

    /// The same tracepoint through perf: the record instead of the arguments.
    #[tracepoint(category = "sock", name = "inet_sock_set_state")]
    fn selfconn_perf(ctx: TracePointContext) -> u32 {
        if Record::is_own(&ctx) {
            body::record::<1>(ctx);
        }
        0
    }

    /// `tcp_set_state(sk, state)` on entry: the socket still has its old state.
    #[fentry(function = "tcp_set_state")]
    fn selfconn_fentry(ctx: FEntryContext) -> i32 {
        fentry::<Usual>(ctx)
    }

    /// The same where the addresses are elsewhere.
    #[fentry(function = "tcp_set_state")]
    fn selfconn_fentry_any(ctx: FEntryContext) -> i32 {
        fentry::<Any>(ctx)
    }

    #[inline(always)]
    fn fentry<L: Layout>(ctx: FEntryContext) -> i32 {
        let sock = Sock::<Direct>::new(ctx.arg(0));
        if let Some(own) = sock.own_address::<L>() {
            let (old, new): (u8, i32) = (sock.state(), ctx.arg(1));
            body::socket::<_, _, 2>(ctx, sock, own, old, new as u8);
        }
        0
    }

    /// The same function through a kprobe.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe(ctx: ProbeContext) -> u32 {
        kprobe(ctx, Sock::own_address_at_once)
    }

    /// The same where the addresses are elsewhere.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe_any(ctx: ProbeContext) -> u32 {
        kprobe(ctx, Sock::own_address::<Any>)
    }

    #[inline(always)]
    fn kprobe(ctx: ProbeContext, own_address: impl Fn(Sock<Probe>) -> Option<Own>) -> u32 {
        if let (Some(sk), Some(new)) = (ctx.arg::<*const u8>(0), ctx.arg::<i32>(1)) {
            let sock = Sock::<Probe>::new(sk);
            if let Some(own) = own_address(sock) {
                body::socket::<_, _, 3>(ctx, sock, own, sock.state(), new as u8);
            }
        }
        0
    }

    /// `inet_csk_get_port(sk, port)` after it has returned; what it returned comes after its arguments.
    #[fexit(function = "inet_csk_get_port")]
    fn selfconn_bind_fexit(ctx: FExitContext) -> i32 {
        let (port, failed): (u64, i32) = (ctx.arg(1), ctx.arg(2));
        victim::got_port(Sock::<Direct>::new(ctx.arg(0)), port as u16, failed);
        0
    }

    /// `bind()`, through perf.
    #[tracepoint(category = "syscalls", name = "sys_enter_bind")]
    fn selfconn_bind_enter(ctx: TracePointContext) -> u32 {
        victim::bind_begins(&ctx);
        0
    }

    /// And its end.
    #[tracepoint(category = "syscalls", name = "sys_exit_bind")]
    fn selfconn_bind_exit(ctx: TracePointContext) -> u32 {
        victim::bind_ends(&ctx);
        0
    }

    /// The licence the kernel asks for: `bpf_probe_read_kernel` is for GPL-compatible programs.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        // Never reached: the verifier refuses a program with a reachable endless loop.
        loop {}
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
