//! Finds tracefs. If it is not mounted, mounts it in a mount namespace of one thread only, so that the mounts
//! of the host do not change.

use std::{fs, io, path::Path, thread};

use rustix::{
    fs::{FsWord, statfs},
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    thread::{UnshareFlags, unshare_unsafe},
};

pub mod format;

use crate::system::sysfs;

/// The directories in which aya looks for tracefs, in this order. The first one is the kernel's standard
/// mount point.
const MOUNT_POINTS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The type of the file system (include/uapi/linux/magic.h at v5.10).
const TRACEFS_MAGIC: FsWord = 0x7472_6163;

/// The state of tracefs on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracefs {
    /// tracefs is mounted on this directory.
    At(&'static str),
    /// This process may not look into it: only root may, and who has CAP_DAC_READ_SEARCH.
    Denied,
    /// The kernel has tracefs, but it is not mounted.
    NotMounted,
    /// It is mounted and has no tracepoints: a lockdown from the kernel's start on disables tracing
    /// (`tracing_init_dentry`, kernel/trace/trace.c at v5.10).
    Empty,
    /// The kernel was built without tracefs, or /sys is masked.
    Absent,
}

/// What [`Tracefs::Empty`] means.
pub const EMPTY: &str = "mounted, but empty: lockdown disables tracing";

#[must_use]
pub fn find() -> Tracefs {
    let is_mounted = |at: &&&str| Path::new(at).join("events").is_dir();
    let is_denied = || {
        let events = fs::metadata(Path::new(MOUNT_POINTS[0]).join("events"));
        events.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied)
    };
    match MOUNT_POINTS.iter().find(is_mounted) {
        Some(at) => Tracefs::At(at),
        None if is_denied() => Tracefs::Denied,
        None if statfs(MOUNT_POINTS[0]).is_ok_and(|at| at.f_type == TRACEFS_MAGIC) => Tracefs::Empty,
        None if Path::new(MOUNT_POINTS[0]).is_dir() => Tracefs::NotMounted,
        None => Tracefs::Absent,
    }
}

/// Why it is not where it should be: `missing`, unless something covers its mount point or /sys.
pub fn why_missing(missing: &str) -> String {
    sysfs::why_missing(MOUNT_POINTS[0], missing)
}

/// True if something covers its mount point or /sys.
#[must_use]
pub fn is_masked() -> bool {
    sysfs::masked(MOUNT_POINTS[0]).is_some()
}

/// The text of a tracepoint's `format` file in the mount namespace of this thread. `event` is, for example,
/// `sock/inet_sock_set_state`.
///
/// # Errors
/// The reason why the file cannot be read, with a hint.
pub fn read_format(event: &str) -> Result<String, String> {
    match find() {
        Tracefs::At(at) => {
            let path = Path::new(at).join("events").join(event).join("format");
            fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))
        }
        Tracefs::Denied => Err(format!(
            "{}: only root may read it: grant CAP_DAC_READ_SEARCH (the drop-in older-kernel.conf has it)",
            MOUNT_POINTS[0]
        )),
        Tracefs::NotMounted => {
            let (at, why) = (MOUNT_POINTS[0], why_missing("tracefs is not mounted"));
            Err(format!("{why}, so no tracepoints are visible: mount -t tracefs tracefs {at}"))
        }
        Tracefs::Empty => Err(format!("tracefs is {EMPTY}")),
        Tracefs::Absent => Err(why_missing("the kernel was built without tracefs")),
    }
}

/// Runs `work` on a thread that sees tracefs, if that is possible.
///
/// If tracefs is not mounted, `work` runs on a thread with its own mount namespace. Files that `work` opens
/// stay open; the mount disappears with the thread.
pub fn with<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    if find() != Tracefs::NotMounted {
        return work();
    }
    let outcome = thread::scope(|scope| {
        scope
            .spawn(|| {
                if let Err(error) = mount_privately() {
                    log::debug!("cannot mount tracefs in a private mount namespace: {error}");
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
    // SAFETY: only the flag FILES can affect descriptors that other threads use, and it is not set here.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tracefs", MOUNT_POINTS[0], "tracefs", flags, None)
}
