//! Links that aya does not make as they are needed: bpf(2) for commands that return a descriptor.

use std::{
    io,
    os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
};

/// `enum bpf_cmd`, include/uapi/linux/bpf.h at v5.11.
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;

/// `enum bpf_attach_type` there.
const BPF_TRACE_ITER: u32 = 28;

/// Attaches an iterator program. aya creates links of iterators too, but a link of aya can be opened only once.
pub(super) fn create_iter_link(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = [0_u32; 8];
    attributes[0] = program.as_raw_fd().cast_unsigned();
    attributes[2] = BPF_TRACE_ITER;
    bpf(BPF_LINK_CREATE, attributes)
}

/// Which tasks a pass visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IterTasks {
    /// Those of the process with this pid.
    OfProcess(u32),
    /// The first thread of the process with this pid. Another thread can't be named before Linux 6.12
    /// (`task_seq_get_next`, kernel/bpf/task_iter.c at v6.1, looks for a process).
    FirstThread(u32),
}

/// As [`create_iter_link`], but a pass visits these tasks only. Needs no capability from Linux 5.19 on.
///
/// # Errors
/// `E2BIG` before Linux 6.1, whose iterators visit all tasks.
pub(super) fn create_iter_link_of(program: BorrowedFd<'_>, tasks: IterTasks) -> io::Result<OwnedFd> {
    /// The member `task` of `union bpf_iter_link_info`, include/uapi/linux/bpf.h at v6.1.
    #[repr(C)]
    struct TaskInfo {
        tid: u32,
        pid: u32,
        pid_fd: u32,
    }
    let (tid, pid) = match tasks {
        IterTasks::OfProcess(pid) => (0, pid),
        IterTasks::FirstThread(pid) => (pid, 0),
    };
    let info = TaskInfo { tid, pid, pid_fd: 0 };
    let mut attributes = [0_u32; 8];
    attributes[0] = program.as_raw_fd().cast_unsigned();
    attributes[2] = BPF_TRACE_ITER;
    let address = (&raw const info).expose_provenance() as u64;
    (attributes[4], attributes[5]) = split(address);
    attributes[6] = size_of_val(&info) as u32;
    bpf(BPF_LINK_CREATE, attributes)
}

/// A 64-bit number as two words in the order of this machine's memory.
fn split(number: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = number.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

/// Begins a pass of an iterator.
pub(super) fn create_iter(link: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mut attributes = [0_u32; 8];
    attributes[0] = link.as_raw_fd().cast_unsigned();
    bpf(BPF_ITER_CREATE, attributes)
}

/// Attaches a program to the egress of a device in the network namespace of the calling thread: as the first one, or
/// after the program with the number `after` if that is not 0. A link of aya does not give its descriptor, and whether
/// a link is still attached is read through that.
pub(super) fn create_tcx_egress(program: BorrowedFd<'_>, device: u32, after: u32) -> io::Result<OwnedFd> {
    /// include/uapi/linux/bpf.h at v6.6.
    const BPF_TCX_EGRESS: u32 = 47;
    const BPF_F_BEFORE: u32 = 1 << 3;
    const BPF_F_AFTER: u32 = 1 << 4;
    const BPF_F_ID: u32 = 1 << 5;
    let position = if after == 0 { BPF_F_BEFORE } else { BPF_F_AFTER | BPF_F_ID };
    let program = program.as_raw_fd().cast_unsigned();
    bpf(BPF_LINK_CREATE, [program, device, BPF_TCX_EGRESS, position, after, 0, 0, 0])
}

/// The attributes have the length that these commands have in the kernel that introduced them, or are padded with
/// zeroes.
fn bpf(command: libc::c_int, mut attributes: [u32; 8]) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads this many bytes of `attributes`, and what an address in them leads to, which is the
    // caller's; it writes none of them for these commands.
    let created =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes)) };
    match libc::c_int::try_from(created) {
        // SAFETY: the kernel has just returned this descriptor, so nothing else owns it.
        Ok(created) if created >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(created) }),
        _ => Err(io::Error::last_os_error()),
    }
}
