//! Processes and threads that share tables of many descriptors.

use std::{
    fs,
    io::{self, Read as _},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Resource, getrlimit};

use super::{FirstThread, MAX_DESCRIPTORS, check, print_output};

/// Has as many descriptors as it may, and shares them with 2,000 processes. Ends them all when stdin ends.
pub(super) fn share_descriptors() {
    const PROCESSES: usize = 2_000;
    const STACK_BYTES: usize = 16 << 10;
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        // SAFETY: neither has a pointer. The process ends with the one that made it.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::pause()
        }
    }
    // A duplicate takes no memory but its place in the table.
    let duplicates = (0..MAX_DESCRIPTORS).map_while(|_| rustix::io::dup(io::stdin()).ok());
    let count = duplicates.map(std::mem::forget).count() as u64;
    assert!(count > MAX_DESCRIPTORS / 2, "{count} descriptors");
    let mut stacks = vec![0_u8; PROCESSES * STACK_BYTES];
    let mut processes = Vec::with_capacity(PROCESSES);
    for stack in stacks.chunks_exact_mut(STACK_BYTES) {
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
        let top = stack.as_mut_ptr_range().end;
        // SAFETY: the stack is the new process's own, is aligned as `malloc` aligns, and stays.
        let process = unsafe { libc::clone(wait, top.cast(), flags, std::ptr::null_mut()) };
        check(process).unwrap();
        processes.push(process);
    }
    print_output(&format!("{count} descriptors"));
    io::stdin().read_to_end(&mut Vec::new()).unwrap();
    for process in processes {
        // SAFETY: no memory is involved. The process is a child of this one until it is waited for.
        unsafe {
            libc::kill(process, libc::SIGKILL);
            libc::waitpid(process, std::ptr::null_mut(), 0);
        }
    }
}

/// Makes a child with 5,000 threads that share the largest permitted table, without a descriptor.
pub(super) fn share_large_table(first_thread: FirstThread) {
    const THREADS: usize = 5_000;
    const STACK_BYTES: usize = 16 << 10;
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    let mut stacks = vec![0_u8; THREADS * STACK_BYTES];
    let slots = getrlimit(Resource::Nofile).current.unwrap();
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    check(child).unwrap();
    if child == 0 {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        // SAFETY: all arguments are valid. Each stack is its thread's own, is aligned as `malloc` aligns, and stays.
        unsafe {
            // The child ends with the process that made it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // A table never shrinks.
            let last = libc::c_int::try_from(slots - 1).unwrap_or(0);
            if libc::dup2(0, last) != last || libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) != 0 {
                libc::_exit(1);
            }
            for stack in stacks.chunks_exact_mut(STACK_BYTES) {
                let top = stack.as_mut_ptr_range().end;
                if libc::clone(wait, top.cast(), flags, std::ptr::null_mut()) < 0 {
                    libc::_exit(2);
                }
            }
            if first_thread == FirstThread::HasEnded {
                libc::syscall(libc::SYS_exit, 0);
            }
            // The new table has room for the descriptors that there are: none.
            libc::unshare(libc::CLONE_FILES);
        }
        wait(std::ptr::null_mut());
    }
    let until = Instant::now() + Duration::from_secs(30);
    let is_made = || {
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok())
        };
        let first_slots = match first_thread {
            FirstThread::HasEnded => 0..1,
            FirstThread::HasAnotherTable => 1..1_024,
        };
        let threads = field("Threads:").unwrap_or(0);
        // A child that has given up has no other thread.
        assert!(!status.contains("zombie") || threads > 1, "{status}");
        threads == THREADS as u64 + 1 && first_slots.contains(&field("FDSize:").unwrap_or(0))
    };
    while !is_made() {
        assert!(Instant::now() < until, "the threads are not made in time");
        thread::sleep(Duration::from_millis(10));
    }
    print_output(&format!("{THREADS} threads of {child}"));
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}
