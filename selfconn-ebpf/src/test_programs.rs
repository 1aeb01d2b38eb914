//! Programs for tests and measurements: a busy tracepoint program like that of another monitoring agent, and
//! empty programs on selfconn's hooks, which show the minimum cost of a hook. They are built into a separate
//! object, which the daemon never contains.
#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        helpers::generated::bpf_ktime_get_ns,
        macros::{btf_tracepoint, classifier, fentry, fexit, kprobe, tracepoint},
        programs::{
            BtfTracePointContext, FEntryContext, FExitContext, ProbeContext, TcContext, TracePointContext,
        },
    };

    /// Some microseconds of work on every system call, like the program of an expensive monitoring agent.
    #[tracepoint(category = "raw_syscalls", name = "sys_enter")]
    fn busy_sys_enter(_ctx: TracePointContext) -> u32 {
        let mut last = 0;
        for _ in 0..200 {
            // SAFETY: no arguments.
            last = unsafe { bpf_ktime_get_ns() };
        }
        u32::from(last == 0)
    }

    #[btf_tracepoint(function = "inet_sock_set_state")]
    fn empty_tp_btf(_ctx: BtfTracePointContext) -> i32 {
        0
    }

    #[tracepoint(category = "sock", name = "inet_sock_set_state")]
    fn empty_perf(_ctx: TracePointContext) -> u32 {
        0
    }

    #[fentry(function = "tcp_set_state")]
    fn empty_fentry(_ctx: FEntryContext) -> i32 {
        0
    }

    #[kprobe(function = "tcp_set_state")]
    fn empty_kprobe(_ctx: ProbeContext) -> u32 {
        0
    }

    #[tracepoint(category = "syscalls", name = "sys_enter_bind")]
    fn empty_bind_enter(_ctx: TracePointContext) -> u32 {
        0
    }

    #[tracepoint(category = "syscalls", name = "sys_exit_bind")]
    fn empty_bind_exit(_ctx: TracePointContext) -> u32 {
        0
    }

    /// Lets each packet pass, and ends the chain of programs (`TC_ACT_OK`, include/uapi/linux/pkt_cls.h at v5.10).
    #[classifier]
    fn ends_the_chain(_ctx: TcContext) -> i32 {
        0
    }

    /// Leaves each packet to the next program (`TC_ACT_UNSPEC`, include/uapi/linux/pkt_cls.h at v5.10).
    #[classifier]
    fn empty_lo(_ctx: TcContext) -> i32 {
        -1
    }

    #[fexit(function = "inet_csk_get_port")]
    fn empty_bind_fexit(_ctx: FExitContext) -> i32 {
        0
    }

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
