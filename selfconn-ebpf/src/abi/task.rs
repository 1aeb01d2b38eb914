//! Tasks: the one that runs, and the one that called `connect()`.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::owner::Owner;

/// `TASK_COMM_LEN`: a kernel task name, NUL-terminated within.
pub const COMM_LEN: usize = 16;

/// How the socket got its source port: the values of [`Opener::cause`].
pub mod cause {
    /// `connect()` chose the source port.
    pub const EPHEMERAL: u32 = 1;
    /// The socket had a port before `connect()`.
    pub const BOUND: u32 = 2;
}

/// A task, with its ids in the initial pid namespace.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Task {
    /// Process id (the kernel's tgid).
    pub pid: u32,
    /// Thread id (the kernel's pid).
    pub tid: u32,
    /// Name of the thread, NUL-padded.
    pub comm: [u8; COMM_LEN],
    /// Name of the process, which is the name of its leader thread. All zero: could not be read.
    pub leader: [u8; COMM_LEN],
}

impl Task {
    /// No task is known.
    pub const UNKNOWN: Self = Self { pid: 0, tid: 0, comm: [0; COMM_LEN], leader: [0; COMM_LEN] };
}

/// The connecting task, as observed at CLOSE -> SYN_SENT: the only transition that always runs in that task.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Opener {
    /// Time of the `connect()`: `CLOCK_BOOTTIME`, nanoseconds. 0: the attempt was not observed, so all fields
    /// are unknown.
    pub at_ns: u64,
    /// Start time of the process (`start_boottime` of its leader), nanoseconds. 0: unknown.
    pub start_ns: u64,
    /// The thread that called `connect()`.
    pub task: Task,
    /// Where the process has its arguments: `arg_start` of its `mm_struct`, which differs after each `execve()`
    /// because the kernel places the stack at random. 0: unknown. [`Self::KERNEL_THREAD`]: it has none.
    pub arg_start: u64,
    /// Who is charged for what this connection takes.
    pub owner: Owner,
    /// Real user id, in the initial user namespace.
    pub uid: u32,
    /// One of [`cause`]. 0: unknown.
    pub cause: u32,
}

impl Opener {
    /// The attempt was not observed.
    pub const UNKNOWN: Self = Self {
        at_ns: 0,
        start_ns: 0,
        task: Task::UNKNOWN,
        arg_start: 0,
        owner: Owner::UNKNOWN,
        uid: 0,
        cause: 0,
    };

    /// [`Self::arg_start`] of a kernel thread. No process has its arguments in its first page.
    pub const KERNEL_THREAD: u64 = 1;

    /// True if the kernel itself called `connect()`. False also if that is unknown.
    #[must_use]
    pub const fn is_kernel_thread(&self) -> bool {
        self.arg_start == Self::KERNEL_THREAD
    }
}

/// How the programs read the `task_struct` of the current task: the values of the global
/// [`names::TASK_ACCESS`].
pub mod task_access {
    /// No access: only the helpers for pid and thread name are used.
    pub const NONE: u32 = 0;
    /// `bpf_get_current_task_btf` and direct loads (v5.11; works under lockdown=confidentiality).
    pub const BTF: u32 = 1;
    /// `bpf_get_current_task` and `bpf_probe_read_kernel`.
    pub const PROBE: u32 = 2;
}

/// How the programs find the control group of the current task: the values of the global
/// [`names::CGROUP_ACCESS`].
pub mod cgroup_access {
    /// Not at all.
    pub const NONE: u32 = 0;
    /// `bpf_get_current_cgroup_id`: only the group of the task.
    pub const CURRENT: u32 = 1;
    /// `bpf_get_current_ancestor_cgroup_id`, too.
    pub const ANCESTOR: u32 = 2;
}
