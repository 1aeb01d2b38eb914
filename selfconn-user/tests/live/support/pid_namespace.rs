//! Processes in a pid namespace of their own.

use std::process::{Child, Command};

/// Starts a process as the first of a new pid namespace.
pub(crate) fn spawn_in_new_pid_namespace(command: &mut Command) -> Child {
    // A thread that has unshared its pid namespace cannot start threads any more.
    let spawn = || {
        // SAFETY: it closes no descriptor.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }.unwrap();
        command.spawn().unwrap()
    };
    std::thread::scope(|scope| scope.spawn(spawn).join().unwrap())
}
