//! The running task, and the name and start time of its process.

use core::mem::MaybeUninit;

use aya_ebpf::{
    Global,
    helpers::{bpf_get_current_pid_tgid, bpf_get_current_uid_gid, generated as helpers},
};
use selfconn_ebpf::{
    COMM_LEN, Field, Opener, Owner, Task, cgroup_access,
    guard::CGROUP_LEVELS,
    owner::{MAX_USER_NS_LEVEL, OWNER_CGROUP_LEVEL, is_equal},
    task_access,
};
use zerocopy::transmute;

use super::kernel_read::{DirectLoad, KernelRead, Pointer, ProbeRead, offset};

/// One of [`task_access`].
#[unsafe(no_mangle)]
static TASK_ACCESS: Global<u32> = Global::new(task_access::NONE);

/// One of [`cgroup_access`].
#[unsafe(no_mangle)]
static CGROUP_ACCESS: Global<u32> = Global::new(cgroup_access::NONE);

/// The id of the control group whose processes are one owner's, wherever it is. 0: there is none.
#[unsafe(no_mangle)]
static WATCHED_CGROUP: Global<u64> = Global::new(0);

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
    let (leader, start_ns) = with_current(is_leader, ([0; 2], 0), leader::<DirectLoad>, leader::<ProbeRead>);
    let leader = if is_leader { name } else { leader };
    (Task { pid, tid, comm: transmute!(name), leader: transmute!(leader) }, start_ns)
}

/// Calls one of two functions with the running task, or returns `unknown` if the programs can't read it.
#[inline(always)]
fn with_current<A, T>(
    argument: A,
    unknown: T,
    direct: impl FnOnce(*const u8, A) -> T,
    probe: impl FnOnce(*const u8, A) -> T,
) -> T {
    match TASK_ACCESS.load() {
        // SAFETY: the helper takes no arguments, and its result is valid while the program runs.
        task_access::BTF => direct(unsafe { helpers::bpf_get_current_task_btf() }.cast(), argument),
        // SAFETY: the helper takes no arguments, and its result is only passed to bpf_probe_read_kernel.
        task_access::PROBE => probe(unsafe { helpers::bpf_get_current_task() } as *const u8, argument),
        _ => unknown,
    }
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
    let (arg_start, owner) = current_image_and_owner();
    Opener { at_ns, start_ns, task, arg_start, owner, uid: bpf_get_current_uid_gid() as u32, cause }
}

/// Where the arguments of the running process are (see [`Opener::arg_start`]), and its owner.
#[inline(always)]
pub(crate) fn current_image_and_owner() -> (u64, Owner) {
    let uid = bpf_get_current_uid_gid() as u32;
    let (arg_start, uid, container) =
        with_current(uid, (0, uid, 0), image_and_owner::<DirectLoad>, image_and_owner::<ProbeRead>);
    let (cgroup, watched) = (owner_cgroup(), WATCHED_CGROUP.load());
    // Without a branch, as below.
    let keeps_cgroup = is_equal(container, 0) | (is_equal(cgroup, watched) & !is_equal(watched, 0));
    let cgroup = container ^ (container ^ cgroup) & keeps_cgroup.wrapping_neg();
    (arg_start, Owner::new(uid, cgroup))
}

/// Where the arguments of the process are, the uid of its owner, and the container in place of a control group.
#[inline(always)]
fn image_and_owner<M: KernelRead>(task: *const u8, uid: u32) -> (u64, u32, u64) {
    let mut arg_start = 0;
    if let (Some(mm), Some(at)) = (offset(Field::TaskMm), offset(Field::ArgStart)) {
        let mm: Pointer = M::read(task.wrapping_add(mm));
        arg_start = if mm.0.is_null() { Opener::KERNEL_THREAD } else { M::read(mm.0.wrapping_add(at)) };
    }
    let (uid, container) = owner_uid_and_container::<M>(task, uid);
    (arg_start, uid, container)
}

/// The uid in an [`Owner`] of a task with this real uid, and the container in place of a control group: 0 if there is
/// none. The loop is bounded by the kernel's own limit.
#[inline(always)]
fn owner_uid_and_container<M: KernelRead>(task: *const u8, uid: u32) -> (u32, u64) {
    let (Some(cred), Some(user_ns), Some(level), Some(parent), Some(owner), Some(number)) = (
        offset(Field::TaskCred),
        offset(Field::CredUserNs),
        offset(Field::UserNsLevel),
        offset(Field::UserNsParent),
        offset(Field::UserNsOwner),
        offset(Field::UserNsInum),
    ) else {
        return (uid, 0);
    };
    let cred: Pointer = M::read(task.wrapping_add(cred));
    let mut user_ns: Pointer = M::read(cred.0.wrapping_add(user_ns));
    let depth: u32 = M::read(user_ns.0.wrapping_add(level));
    // Without a branch, because the verifier would follow all that is done with the uid twice.
    let is_initial = is_equal(depth.into(), 0);
    for above in 1..MAX_USER_NS_LEVEL {
        if above >= depth {
            break;
        }
        user_ns = M::read(user_ns.0.wrapping_add(parent));
    }
    let number: u32 = M::read(user_ns.0.wrapping_add(number));
    let owner: u32 = M::read(user_ns.0.wrapping_add(owner));
    let is_roots = is_equal(owner.into(), 0) & !is_initial;
    let container = Owner::of_container(number) & is_roots.wrapping_neg();
    (owner ^ (owner ^ uid) & (is_initial as u32).wrapping_neg(), container)
}

/// The control group in an [`Owner`] of the running task.
#[inline(always)]
fn owner_cgroup() -> u64 {
    match CGROUP_ACCESS.load() {
        cgroup_access::ANCESTOR => {
            let watched = WATCHED_CGROUP.load();
            if watched != 0 && is_in_cgroup(watched) {
                return watched;
            }
            // SAFETY: the helper takes a number. It returns 0 if the group is at a higher level.
            match unsafe { helpers::bpf_get_current_ancestor_cgroup_id(OWNER_CGROUP_LEVEL as i32) } {
                // SAFETY: the helper takes no arguments.
                0 => unsafe { helpers::bpf_get_current_cgroup_id() },
                ancestor => ancestor,
            }
        }
        // SAFETY: the helper takes no arguments.
        cgroup_access::CURRENT => unsafe { helpers::bpf_get_current_cgroup_id() },
        _ => 0,
    }
}

/// True if the running task is in this control group, or below it.
#[inline(always)]
fn is_in_cgroup(group: u64) -> bool {
    for level in 1..=CGROUP_LEVELS {
        // SAFETY: the helper takes a number. It returns 0 below the task's own group.
        match unsafe { helpers::bpf_get_current_ancestor_cgroup_id(level as i32) } {
            0 => return false,
            id if id == group => return true,
            _ => {}
        }
    }
    false
}
