//! The eBPF programs: one per hook and attach method. A program only converts its context into arguments for
//! `programs/tcp_state.rs` or `programs/bind_failure.rs`. It contains no logic of its own.
//!
//! On the host this file is an empty `main`, so that the whole workspace can be checked, linted and formatted
//! there.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]
// build-std needs an unstable compiler anyway. Inline assembly is used for instructions that core does not
// offer here.
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(target_arch = "bpf")]
mod programs;

#[cfg(target_arch = "bpf")]
mod entry_points {
    use aya_ebpf::{
        macros::{btf_tracepoint, classifier, fentry, fexit, kprobe, tracepoint},
        programs::{
            BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, TcContext, TracePointContext,
        },
    };

    use selfconn_ebpf::{
        ends_listener,
        names::{FENTRY, KPROBE, PERF, TP_BTF, probe_id},
        state,
    };

    use crate::programs::{
        bind_failure,
        descriptors::{self, DescriptorContext},
        guard,
        kernel_read::{BtfOffsets, DirectLoad, Layout, ProbeRead, StaticOffsets},
        namespaces::{self, TaskContext},
        registers::{self, Arm64, Registers, X86_64},
        sock::{Ports, SelfAddr, Sock},
        tcp_state::{self, StateChange},
        tracepoint_record::TracepointRecord,
    };

    /// `inet_sock_set_state(sk, oldstate, newstate)`, called after the state is set.
    #[btf_tracepoint(function = "inet_sock_set_state")]
    fn selfconn_tp_btf(ctx: BtfTracePointContext) -> i32 {
        tp_btf::<StaticOffsets>(ctx)
    }

    /// The same program with address offsets from BTF.
    #[btf_tracepoint(function = "inet_sock_set_state")]
    fn selfconn_tp_btf_offsets(ctx: BtfTracePointContext) -> i32 {
        tp_btf::<BtfOffsets>(ctx)
    }

    #[inline(always)]
    fn tp_btf<L: Layout>(ctx: BtfTracePointContext) -> i32 {
        let sock = Sock::<DirectLoad>::new(ctx.arg(0));
        if let Some(self_addr) = sock.self_addr::<L>() {
            let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
            let change = StateChange { old: old as u8, new: new as u8 };
            tcp_state::on_socket::<_, _, L, { probe_id(TP_BTF) }>(
                ctx,
                sock,
                self_addr,
                sock.ports::<L>(),
                change,
            );
        } else if ends_listener(ctx.arg::<i32>(1) as u8, ctx.arg::<i32>(2) as u8) {
            tcp_state::on_listener_closed(sock);
        }
        0
    }

    /// The same tracepoint through perf: the context is the tracepoint's record instead of its arguments.
    #[tracepoint(category = "sock", name = "inet_sock_set_state")]
    fn selfconn_perf(ctx: TracePointContext) -> u32 {
        if TracepointRecord::is_self_addressed(&ctx) && !TracepointRecord::is_ordinary(&ctx) {
            tcp_state::on_tracepoint_record::<{ probe_id(PERF) }>(ctx);
        } else if let Some(sock) = TracepointRecord::former_listener(&ctx) {
            tcp_state::on_listener_closed(sock);
        }
        0
    }

    /// Entry of `tcp_set_state(sk, state)`: the socket still has its old state.
    #[fentry(function = "tcp_set_state")]
    fn selfconn_fentry(ctx: FEntryContext) -> i32 {
        fentry::<StaticOffsets>(ctx)
    }

    /// The same program with address offsets from BTF.
    #[fentry(function = "tcp_set_state")]
    fn selfconn_fentry_btf_offsets(ctx: FEntryContext) -> i32 {
        fentry::<BtfOffsets>(ctx)
    }

    #[inline(always)]
    fn fentry<L: Layout>(ctx: FEntryContext) -> i32 {
        let sock = Sock::<DirectLoad>::new(ctx.arg(0));
        if let Some(self_addr) = sock.self_addr::<L>() {
            let new: i32 = ctx.arg(1);
            let change = StateChange { old: sock.state::<L>(), new: new as u8 };
            tcp_state::on_socket::<_, _, L, { probe_id(FENTRY) }>(
                ctx,
                sock,
                self_addr,
                sock.ports::<L>(),
                change,
            );
        } else if ends_listener(sock.state::<L>(), ctx.arg::<i32>(1) as u8) {
            tcp_state::on_listener_closed(sock);
        }
        0
    }

    /// The same function through a kprobe, on x86-64.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe(ctx: ProbeContext) -> u32 {
        kprobe::<StaticOffsets, X86_64>(ctx, Sock::head_by_fewest_reads)
    }

    /// The same program with address offsets from BTF.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe_btf_offsets(ctx: ProbeContext) -> u32 {
        kprobe::<BtfOffsets, X86_64>(ctx, head_by_btf_offsets)
    }

    /// The same function through a kprobe, on arm64.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe_arm64(ctx: ProbeContext) -> u32 {
        kprobe::<StaticOffsets, Arm64>(ctx, Sock::head_by_fewest_reads)
    }

    /// The same program with address offsets from BTF.
    #[kprobe(function = "tcp_set_state")]
    fn selfconn_kprobe_arm64_btf_offsets(ctx: ProbeContext) -> u32 {
        kprobe::<BtfOffsets, Arm64>(ctx, head_by_btf_offsets)
    }

    #[inline(always)]
    fn head_by_btf_offsets(sock: Sock<ProbeRead>) -> Option<(SelfAddr, Ports, u8)> {
        let self_addr = sock.self_addr::<BtfOffsets>()?;
        Some((self_addr, sock.ports::<BtfOffsets>(), sock.state::<BtfOffsets>()))
    }

    #[inline(always)]
    fn kprobe<L: Layout, R: Registers>(
        ctx: ProbeContext,
        read_head: impl Fn(Sock<ProbeRead>) -> Option<(SelfAddr, Ports, u8)>,
    ) -> u32 {
        let (sk, new) = registers::arguments::<R>(&ctx);
        let sock = Sock::<ProbeRead>::new(sk as *const u8);
        if let Some((self_addr, ports, old)) = read_head(sock) {
            let change = StateChange { old, new: new as u8 };
            tcp_state::on_socket::<_, _, L, { probe_id(KPROBE) }>(ctx, sock, self_addr, ports, change);
        } else if new as u8 == state::CLOSE && sock.state::<L>() == state::LISTEN {
            // The state is read only where a socket ends, because each read is a call.
            tcp_state::on_listener_closed(sock);
        }
        0
    }

    /// Exit of `inet_csk_get_port(sk, port)`. In the context, the return value follows the arguments.
    #[fexit(function = "inet_csk_get_port")]
    fn selfconn_bind_fexit(ctx: FExitContext) -> i32 {
        let (port, result): (u64, i32) = (ctx.arg(1), ctx.arg(2));
        bind_failure::on_get_port_exit(Sock::<DirectLoad>::new(ctx.arg(0)), port as u16, result);
        0
    }

    /// Entry of the system call `bind()`, through perf.
    #[tracepoint(category = "syscalls", name = "sys_enter_bind")]
    fn selfconn_bind_enter(ctx: TracePointContext) -> u32 {
        bind_failure::on_bind_enter(ctx);
        0
    }

    /// Exit of the system call `bind()`, through perf.
    #[tracepoint(category = "syscalls", name = "sys_exit_bind")]
    fn selfconn_bind_exit(ctx: TracePointContext) -> u32 {
        bind_failure::on_bind_exit(&ctx);
        0
    }

    /// Each packet that leaves through a loopback device.
    #[classifier]
    fn selfconn_guard(ctx: TcContext) -> i32 {
        guard::on_egress(&ctx)
    }

    /// The same program, with another name in the kernel's lists.
    #[classifier]
    fn selfconn_dryrun(ctx: TcContext) -> i32 {
        guard::on_egress(&ctx)
    }

    /// Each descriptor of each task, while user space reads the iterator. aya has no macro for this section.
    #[unsafe(link_section = "iter/task_file")]
    #[unsafe(no_mangle)]
    extern "C" fn selfconn_descriptors(context: &DescriptorContext) -> i32 {
        // 0: go on, whatever became of this descriptor.
        descriptors::visit(context);
        0
    }

    /// Each task, while user space reads the iterator. The tasks only give the walk its turns.
    #[unsafe(link_section = "iter/task")]
    #[unsafe(no_mangle)]
    extern "C" fn selfconn_namespaces(context: &TaskContext) -> i32 {
        namespaces::visit(context);
        0
    }

    /// The licence string for the kernel: only GPL-compatible programs may call `bpf_probe_read_kernel`.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

    #[panic_handler]
    fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
        // Never reached: the verifier rejects a program with a reachable endless loop.
        loop {}
    }
}

#[cfg(not(target_arch = "bpf"))]
fn main() {}
