//! The last transition of a connection attempt that a probe has handled on this CPU. The two probes of a pair run one
//! right after the other, so the second one finds here that it has nothing to do. If the first one missed the
//! transition, or if something ran in between, the second one finds another transition and handles this one.

use aya_ebpf::{helpers::bpf_get_current_pid_tgid, macros::map, maps::PerCpuArray};

use super::{
    kernel_read::{KernelRead, Layout},
    sock::Sock,
};

/// A transition that was handled.
#[repr(C)]
struct HandledTransition {
    /// Kernel address of the socket.
    sock: u64,
    /// The running task: its process, its thread. So what an earlier attempt has left here stands at most for the same
    /// task, and no attempt gets the name of another. [`NO_ENTRY`]: there was nothing to do.
    task: u64,
    /// Lower half: states and destination port. Upper half: one more than the id of the probe.
    states: u64,
}

/// The attempt has no entry in the connect table.
const NO_ENTRY: u64 = u64::MAX;

#[map]
static HANDLED: PerCpuArray<HandledTransition> = PerCpuArray::with_max_entries(1, 0);

/// The states of a transition and the destination port, in a register.
#[derive(Clone, Copy)]
pub(crate) struct AttemptState(u32);

impl AttemptState {
    #[inline(always)]
    pub(crate) fn new(old: u8, new: u8, dport: u16) -> Self {
        Self(u32::from(old) | u32::from(new) << 8 | u32::from(dport) << 16)
    }

    #[inline(always)]
    fn dport(self) -> u16 {
        (self.0 >> 16) as u16
    }
}

/// True if the calling probe has to handle this transition of an attempt: the other probe has not just done so, and
/// the kernel can choose the destination port, so that the attempt has an entry in the connect table. Not inlined, so
/// that the stack that it needs is free again before a record is made.
#[inline(never)]
pub(crate) fn is_to_do<M: KernelRead, L: Layout, const PROBE_ID: u8>(
    sock: Sock<M>,
    AttemptState(states): AttemptState,
) -> bool {
    let can_choose = || sock.can_choose::<L>(AttemptState(states).dport());
    let Some(last) = HANDLED.get_ptr_mut(0) else { return can_choose() };
    let own = u64::from(PROBE_ID) + 1;
    // Another program can run on this CPU between any two of these accesses, and write a transition of its own. The
    // address of the socket is written last and cleared first, so that what such a program leaves is whole or nothing.
    // SAFETY: a value of an array stays valid as long as the program is loaded, and its fields are aligned.
    let (last_sock, last_task, last_states) = unsafe {
        (
            (&raw const (*last).sock).read_volatile(),
            (&raw const (*last).task).read_volatile(),
            (&raw const (*last).states).read_volatile(),
        )
    };
    let is_handled = last_sock == sock.key()
        && last_states as u32 == states
        && last_states >> 32 != own
        && (last_task == NO_ENTRY || last_task == bpf_get_current_pid_tgid());
    // SAFETY: as above. After this it can't stand for the next attempt.
    unsafe { (&raw mut (*last).sock).write_volatile(0) };
    if is_handled {
        return false;
    }
    let is_to_do = can_choose();
    let task = if is_to_do { bpf_get_current_pid_tgid() } else { NO_ENTRY };
    // SAFETY: as above.
    unsafe {
        (&raw mut (*last).task).write_volatile(task);
        (&raw mut (*last).states).write_volatile(own << 32 | u64::from(states));
        (&raw mut (*last).sock).write_volatile(sock.key());
    }
    is_to_do
}
