//! The running task, and the name and start time of its process.

use core::mem::MaybeUninit;

use aya_ebpf::{
    Global,
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated as helpers},
};
use selfconn_ebpf::{COMM_LEN, Field, Opener, Task, task_access};
use zerocopy::transmute;

use super::kernel_read::{DirectLoad, KernelRead, Pointer, ProbeRead, offset};

/// One of [`task_access`].
#[unsafe(no_mangle)]
static TASK_ACCESS: Global<u32> = Global::new(task_access::NONE);

/// A task name as two words, because bytes would be copied one by one.
pub(super) type Name = [u64; COMM_LEN / 8];

/// The running task, and the start time of its process: `start_boottime` of the leader, nanoseconds. 0:
/// unknown.
#[inline(always)]
pub(crate) fn current_task() -> (Task, u64) {
    let pid_tgid = bpf_get_current_pid_tgid();
    let (pid, tid) = ((pid_tgid >> 32) as u32, pid_tgid as u32);
    let mut name = MaybeUninit::<Name>::uninit();
    // SAFETY: the helper always writes the full size. It fails only if there is no task, and then writes
    // zeroes.
    let name = unsafe {
        helpers::bpf_get_current_comm(name.as_mut_ptr().cast(), COMM_LEN as u32);
        name.assume_init()
    };
    let is_leader = pid == tid;
    let (leader, start_ns) = match TASK_ACCESS.load() {
        // SAFETY: the helper takes no arguments, and its result is valid while the program runs.
        task_access::BTF => {
            leader::<DirectLoad>(unsafe { helpers::bpf_get_current_task_btf() }.cast(), is_leader)
        }
        // SAFETY: the helper takes no arguments, and its result is only passed to bpf_probe_read_kernel.
        task_access::PROBE => {
            leader::<ProbeRead>(unsafe { helpers::bpf_get_current_task() } as *const u8, is_leader)
        }
        _ => ([0; 2], 0),
    };
    let leader = if is_leader { name } else { leader };
    (Task { pid, tid, comm: transmute!(name), leader: transmute!(leader) }, start_ns)
}

/// Name and start time of the process, from its leader thread. The name is read only if the task is not the
/// leader.
#[inline(always)]
pub(super) fn leader<M: KernelRead>(task: *const u8, is_leader: bool) -> (Name, u64) {
    let (mut name, mut start_ns) = ([0; 2], 0);
    if let Some(group_leader) = offset(Field::GroupLeader) {
        let leader: Pointer = M::read(task.wrapping_add(group_leader));
        if let Some(start) = offset(Field::StartBoottime) {
            start_ns = M::read(leader.0.wrapping_add(start));
        }
        if let Some(comm) = offset(Field::TaskComm)
            && !is_leader
        {
            name = [M::read(leader.0.wrapping_add(comm)), M::read(leader.0.wrapping_add(comm + 8))];
        }
    }
    (name, start_ns)
}

/// An [`Opener`] for the running task.
#[inline(always)]
pub(crate) fn opener(at_ns: u64, cause: u32) -> Opener {
    let (task, start_ns) = current_task();
    Opener { at_ns, start_ns, task, uid: bpf_get_current_uid_gid() as u32, cause }
}
