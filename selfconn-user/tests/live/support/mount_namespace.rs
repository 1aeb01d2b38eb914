//! Mount namespaces: daemons for which something else is mounted than for the tests.

use std::{
    fs, io,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Child, Command},
    thread,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe},
};

/// Starts the daemon in a mount namespace of its own, after `prepare` has run there.
pub(crate) fn spawn_in_new_mount_namespace(
    command: &mut Command,
    prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static,
) -> Child {
    // SAFETY: unshare, mount and prctl are safe to call between fork and exec, and they close no descriptor.
    unsafe {
        command.pre_exec(move || {
            unshare_unsafe(UnshareFlags::NEWNS)?;
            mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
            prepare()
        });
    }
    command.spawn().unwrap()
}

/// Mounts a `/proc` that shows only the processes that its reader may trace, as a unit's `ProtectProc=ptraceable` does.
pub(crate) fn mount_proc_with_hidepid() -> io::Result<()> {
    Ok(mount("proc", "/proc", "proc", MountFlags::empty(), Some(c"hidepid=ptraceable"))?)
}

/// Runs `work` in the mount namespace of a process.
pub(crate) fn run_in_mount_namespace_of(pid: u32, work: impl FnOnce() + Send) {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/mnt")).unwrap();
    let enter = || {
        // SAFETY: it closes no descriptor. It is needed because a thread that shares its root with others
        // cannot enter a mount namespace.
        unsafe { unshare_unsafe(UnshareFlags::FS) }.unwrap();
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount)).unwrap();
        work();
    };
    thread::scope(|scope| scope.spawn(enter).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
