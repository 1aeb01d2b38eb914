//! What an operator with a debugger does: takes a descriptor away from a running process. For a tracing link there is no
//! other way from outside: BPF_LINK_DETACH is for other types (`bpf_link_ops.detach`, kernel/bpf/syscall.c at v6.12).

use std::{ffi::c_void, fs, io, mem::MaybeUninit, ptr};

use rustix::process::{Pid, WaitOptions, waitpid};

/// The links of a process that are of one kind, by what `/proc` says of the descriptor.
pub(crate) fn links(pid: u32, method: &str) -> Vec<i32> {
    let is_wanted = |fd: &str| {
        let target = fs::read_link(format!("/proc/{pid}/fd/{fd}")).unwrap_or_default();
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let kind = info.lines().find_map(|line| line.strip_prefix("link_type:")).map(str::trim);
        match method {
            "tp_btf" => kind == Some("raw_tracepoint"),
            "fentry" => kind == Some("tracing"),
            // Before v5.15 it is the event itself.
            _ => kind == Some("perf") || target.as_os_str() == "anon_inode:[perf_event]",
        }
    };
    let names = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|fd| is_wanted(fd)).map(|fd| fd.parse().unwrap()).collect()
}

/// Has the process put its stdin, which is /dev/null, in the place of a descriptor.
#[cfg(target_arch = "x86_64")]
pub(crate) fn take_away(pid: u32, fd: i32) {
    let is = |pid: u32| Pid::from_raw(pid as i32).unwrap();
    trace(libc::PTRACE_ATTACH, pid, ptr::null_mut()).unwrap();
    waitpid(Some(is(pid)), WaitOptions::empty()).unwrap();
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast()).unwrap();
    // SAFETY: all zero is a value of it, and the kernel has filled it.
    let before = unsafe { registers.assume_init() };
    // It waits in a system call: two bytes before its next instruction is the one that makes one.
    let mut call = before;
    call.rip -= 2;
    (call.rax, call.rdi, call.rsi) = (libc::SYS_dup2 as u64, 0, fd as u64);
    // Nothing is to be restarted.
    call.orig_rax = u64::MAX;
    trace(libc::PTRACE_SETREGS, pid, ptr::from_mut(&mut call).cast()).unwrap();
    trace(libc::PTRACE_SINGLESTEP, pid, ptr::null_mut()).unwrap();
    waitpid(Some(is(pid)), WaitOptions::empty()).unwrap();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast()).unwrap();
    // SAFETY: as above.
    let after = unsafe { registers.assume_init() };
    let mut before = before;
    trace(libc::PTRACE_SETREGS, pid, ptr::from_mut(&mut before).cast()).unwrap();
    trace(libc::PTRACE_DETACH, pid, ptr::null_mut()).unwrap();
    assert_eq!(after.rax, fd as u64, "dup2 in the process");
}

#[cfg(target_arch = "x86_64")]
fn trace(request: libc::c_uint, pid: u32, data: *mut c_void) -> io::Result<()> {
    // SAFETY: of these requests only the two for registers use `data`, which then points to a struct of theirs.
    let outcome = unsafe { libc::ptrace(request, pid as libc::pid_t, ptr::null_mut::<c_void>(), data) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
