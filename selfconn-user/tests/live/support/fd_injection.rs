//! Removes a descriptor from a running process with ptrace, as an operator with a debugger can. For a tracing
//! link there is no other way from outside: BPF_LINK_DETACH works only for other link types
//! (`bpf_link_ops.detach`, kernel/bpf/syscall.c at v6.12).

use std::{ffi::c_void, fs, io, mem::MaybeUninit, ptr};

use rustix::process::{Pid, WaitOptions, waitpid};

/// The descriptors of a process that are links of one attach method, according to `/proc`.
pub(crate) fn link_fds(pid: u32, method: &str) -> Vec<i32> {
    let is_of_method = |fd: &str| {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let kind = info.lines().find_map(|line| line.strip_prefix("link_type:")).map(str::trim);
        match method {
            "tp_btf" => kind == Some("raw_tracepoint"),
            "fentry" => kind == Some("tracing"),
            // Before v5.15 the descriptor is the perf event itself.
            _ => kind == Some("perf") || target.as_os_str() == "anon_inode:[perf_event]",
        }
    };
    let names = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|fd| is_of_method(fd)).map(|fd| fd.parse().unwrap()).collect()
}

/// Makes the process replace a descriptor by a duplicate of its stdin, which is /dev/null.
pub(crate) fn replace_fd_with_stdin(pid: u32, fd: i32) {
    let to_pid = |pid: u32| Pid::from_raw(pid as i32).unwrap();
    trace(libc::PTRACE_ATTACH, pid, ptr::null_mut()).unwrap();
    waitpid(Some(to_pid(pid)), WaitOptions::empty()).unwrap();
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast()).unwrap();
    // SAFETY: all zero is a valid value of this struct, and the kernel has filled it.
    let saved = unsafe { registers.assume_init() };
    // The process waits in a system call. The system call instruction is the two bytes before its next
    // instruction.
    let mut call = saved;
    call.rip -= 2;
    (call.rax, call.rdi, call.rsi) = (libc::SYS_dup2 as u64, 0, fd as u64);
    // No system call may be restarted.
    call.orig_rax = u64::MAX;
    trace(libc::PTRACE_SETREGS, pid, ptr::from_mut(&mut call).cast()).unwrap();
    trace(libc::PTRACE_SINGLESTEP, pid, ptr::null_mut()).unwrap();
    waitpid(Some(to_pid(pid)), WaitOptions::empty()).unwrap();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast()).unwrap();
    // SAFETY: as above, the kernel has filled it.
    let after = unsafe { registers.assume_init() };
    let mut saved = saved;
    trace(libc::PTRACE_SETREGS, pid, ptr::from_mut(&mut saved).cast()).unwrap();
    trace(libc::PTRACE_DETACH, pid, ptr::null_mut()).unwrap();
    assert_eq!(after.rax, fd as u64, "dup2 in the process");
}

fn trace(request: libc::c_uint, pid: u32, data: *mut c_void) -> io::Result<()> {
    // SAFETY: only PTRACE_GETREGS and PTRACE_SETREGS use `data`, which then points to a `user_regs_struct`.
    let outcome = unsafe { libc::ptrace(request, pid as libc::pid_t, ptr::null_mut::<c_void>(), data) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
