//! Finds tracefs, and where nobody has mounted it, mounts it for one thread only, so that the host's mounts stay as
//! they are.

use std::{fs, path::Path, thread};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Where aya looks, in this order; the first is where the kernel wants it.
const MOUNT_POINTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// Whether tracefs can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracefs {
    /// It is mounted here.
    At(&'static str),
    /// The kernel has it, but nobody has mounted it.
    NotMounted,
    /// The kernel was built without it.
    Absent,
}

/// Looks for it.
#[must_use]
pub fn find() -> Tracefs {
    let is_mounted = |at: &&&str| Path::new(at).join("events").is_dir();
    match MOUNT_POINTS.iter().find(is_mounted) {
        Some(at) => Tracefs::At(at),
        None if Path::new(MOUNT_POINTS[0]).is_dir() => Tracefs::NotMounted,
        None => Tracefs::Absent,
    }
}

/// The text of a tracepoint's `format` file, as this thread sees it; it is named as `sock/inet_sock_set_state`.
///
/// # Errors
/// Why it can't be read, and the cure.
pub fn read_format(event: &str) -> Result<String, String> {
    match find() {
        Tracefs::At(at) => {
            let path = Path::new(at).join("events").join(event).join("format");
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        }
        Tracefs::NotMounted => {
            let at = MOUNT_POINTS[0];
            Err(format!("tracefs is not mounted, and no events are there: mount -t tracefs tracefs {at}"))
        }
        Tracefs::Absent => Err("the kernel was built without tracefs".to_owned()),
    }
}

/// Runs `work` where tracefs can be seen, if that is possible at all.
///
/// Where it isn't mounted, `work` runs on a thread with a mount namespace of its own. What it opens stays open; the
/// mount goes with the thread.
pub fn with<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if find() != Tracefs::NotMounted {
        return work();
    }
    let outcome = thread::scope(|scope| {
        scope
            .spawn(|| {
                if let Err(error) = mount_privately() {
                    log::debug!("tracefs can't be mounted for this process alone: {error}");
                }
                work()
            })
            .join()
    });
    match outcome {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

fn mount_privately() -> rustix::io::Result<()> {
    // SAFETY: only FILES, which is not among the flags, can take descriptors away from other threads.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tracefs", MOUNT_POINTS[0], "tracefs", flags, None)
}
