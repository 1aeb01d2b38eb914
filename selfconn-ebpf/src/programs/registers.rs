//! The arguments of a function in the registers that a kprobe gets. Nothing else in the programs depends on the
//! architecture of the kernel.

use aya_ebpf::{EbpfContext as _, programs::ProbeContext};

/// Where the first two arguments lie in the context, in bytes.
pub(crate) trait Registers {
    const FIRST: usize;
    const SECOND: usize;
}

/// `di` and `si` of `struct pt_regs`, arch/x86/include/asm/ptrace.h at v5.10; the same at v6.12.
pub(crate) struct X86_64;

impl Registers for X86_64 {
    const FIRST: usize = 112;
    const SECOND: usize = 104;
}

/// `regs[0]` and `regs[1]` of `struct user_pt_regs`, which is the context there:
/// arch/arm64/include/uapi/asm/ptrace.h and bpf_perf_event.h at v5.10; the same at v6.12.
pub(crate) struct Arm64;

impl Registers for Arm64 {
    const FIRST: usize = 0;
    const SECOND: usize = 8;
}

/// The first two arguments.
#[inline(always)]
pub(crate) fn arguments<R: Registers>(ctx: &ProbeContext) -> (u64, u64) {
    let registers = ctx.as_ptr().cast_const().cast::<u8>();
    // SAFETY: both are aligned words of the context, and the verifier checks every load. Volatile, so that each is
    // one load of eight bytes.
    let read = |offset: usize| unsafe { registers.add(offset).cast::<u64>().read_volatile() };
    (read(R::FIRST), read(R::SECOND))
}
