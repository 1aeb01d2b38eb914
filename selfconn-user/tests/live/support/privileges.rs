//! Daemons with the capabilities that a service manager gives them, and the capabilities of their threads as the kernel
//! shows them.

use std::{
    fs, io,
    os::unix::{fs::chown, process::CommandExt as _},
    process::{Command, Stdio},
};

use rustix::thread::{
    CapabilitySet, CapabilitySets, configure_capability_in_ambient_set, set_capabilities,
    set_keep_capabilities,
};

use super::daemon::{HookVariant, TestDaemon, selfconn};

/// The fields of `/proc/PID/task/TID/status`.
#[derive(Debug)]
pub(crate) struct ThreadCapabilities {
    pub(crate) name: String,
    pub(crate) effective: CapabilitySet,
    pub(crate) permitted: CapabilitySet,
    pub(crate) inheritable: CapabilitySet,
    pub(crate) ambient: CapabilitySet,
    pub(crate) bounding: CapabilitySet,
    pub(crate) no_new_privs: bool,
}

pub(crate) fn thread_capabilities(pid: u32) -> Vec<ThreadCapabilities> {
    let of_one = |task: io::Result<fs::DirEntry>| {
        // A short-lived thread may have ended.
        let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
            line.trim_start_matches(':').trim().to_owned()
        };
        let set = |name| CapabilitySet::from_bits_retain(u64::from_str_radix(&field(name), 16).unwrap());
        Some(ThreadCapabilities {
            name: field("Name"),
            effective: set("CapEff"),
            permitted: set("CapPrm"),
            inheritable: set("CapInh"),
            ambient: set("CapAmb"),
            bounding: set("CapBnd"),
            no_new_privs: field("NoNewPrivs") == "1",
        })
    };
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().filter_map(of_one).collect()
}

/// Starts the daemon as a user other than root with these capabilities, as `AmbientCapabilities` of a service
/// manager does.
pub(crate) fn start_as_user(set: CapabilitySet, options: &[&str]) -> (TestDaemon, tempfile::TempDir) {
    const NOBODY: u32 = 65_534;
    // A folder in which that user can run it.
    let dir = tempfile::tempdir().unwrap();
    chown(dir.path(), Some(NOBODY), None).unwrap();
    let program = dir.path().join("selfconn");
    fs::copy(selfconn(), &program).unwrap();
    let daemon = TestDaemon::start_with(&HookVariant(vec![]), options, |command| {
        let mut as_nobody = Command::new(&program);
        as_nobody.args(command.get_args()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: only system calls, and none of them allocates.
        unsafe { as_nobody.pre_exec(move || become_user(NOBODY, set)) };
        as_nobody.spawn().unwrap()
    });
    (daemon, dir)
}

/// Becomes a user with these capabilities, as `AmbientCapabilities` of a service manager does.
fn become_user(uid: u32, set: CapabilitySet) -> io::Result<()> {
    use rustix::process::{Resource, Rlimit, setrlimit};
    // Before v5.11 maps count against this limit. On later kernels the limit does not matter, nor does a
    // failure to raise it.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    set_keep_capabilities(true)?;
    // SAFETY: no memory is involved. glibc would set it for all threads, and the new process has only one.
    if unsafe { libc::setuid(uid) } != 0 {
        return Err(io::Error::last_os_error());
    }
    set_capabilities(None, CapabilitySets { effective: set, permitted: set, inheritable: set })?;
    for number in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << number);
        if set.contains(one) {
            configure_capability_in_ambient_set(one, true)?;
        }
    }
    Ok(())
}
