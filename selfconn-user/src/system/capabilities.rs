//! Drops capabilities after the programs are attached. Attaching needs capabilities that watching does not
//! need. They are dropped as early as possible, permanently and on every thread, regardless of how the
//! process obtained them.
//!
//! Capabilities belong to threads, and a new thread inherits those of its parent thread. Therefore the order
//! is: attach, [`drop_after_attach`], start the other threads, each of which calls [`restrict_to`], and then
//! [`LoopCapabilities::restrict_thread`]. The main loop itself must not keep CAP_SYS_ADMIN, because it
//! includes CAP_BPF and CAP_PERFMON.

use std::{io, path::Path, thread};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{Access, access},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

use super::busy::PanicNote;

/// The capabilities to load and attach the programs: CAP_BPF for the maps and programs, CAP_PERFMON because
/// tracing programs read kernel memory.
pub const ATTACH: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON);

/// The capabilities of the snapshot worker: it enters other network namespaces, which it finds through
/// processes. Without the iterator over descriptors it also lists the open files of other users' processes. A pass
/// of the iterator needs none; kernels before v5.19 require CAP_BPF to begin one where they require it to read maps,
/// and CAP_SYS_ADMIN includes it.
#[must_use]
pub const fn snapshot_worker(has_iterator: bool) -> CapabilitySet {
    let always = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);
    always.union(if has_iterator { CapabilitySet::BPF } else { CapabilitySet::DAC_READ_SEARCH })
}

/// The capabilities of the worker that looks for the holders of one socket: as [`snapshot_worker`], but it enters no
/// namespace.
#[must_use]
pub const fn holder_worker(has_iterator: bool) -> CapabilitySet {
    if has_iterator {
        CapabilitySet::BPF
    } else {
        CapabilitySet::SYS_PTRACE.union(CapabilitySet::DAC_READ_SEARCH)
    }
}

/// The capabilities of the remedy worker: it enters other network namespaces, which it finds through processes. If
/// it `destroys` sockets, it needs CAP_NET_ADMIN. Looking one up needs no privilege.
#[must_use]
pub const fn remedy_worker(destroys: bool) -> CapabilitySet {
    let always = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);
    if destroys { always.union(CapabilitySet::NET_ADMIN) } else { always }
}

/// The capabilities of the guard's thread: it enters other network namespaces, which it finds through processes, and
/// asks what is attached there. Attaching by a link needs none of its own; attaching a filter needs CAP_NET_ADMIN.
pub const GUARD_THREAD: CapabilitySet =
    CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE).union(CapabilitySet::NET_ADMIN);

/// The capabilities of the port range worker: it enters other network namespaces, which it finds through
/// processes.
pub const PORT_RANGE_WORKER: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// The capabilities of the threads that look up processes: they read the executable paths of other users'
/// processes.
pub const LOOKUP_WORKER: CapabilitySet = CapabilitySet::SYS_PTRACE;

/// The names of these capabilities as in manuals, for example `CAP_BPF`, in alphabetical order.
pub fn names(set: CapabilitySet) -> Vec<String> {
    let mut names: Vec<_> = set.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    names.sort();
    names
}

/// The effective capabilities of this thread, with those that CAP_SYS_ADMIN includes.
///
/// # Errors
/// If a seccomp filter forbids it.
pub fn effective() -> io::Result<CapabilitySet> {
    Ok(with_included(capabilities(None)?.effective))
}

/// CAP_SYS_ADMIN includes CAP_BPF and CAP_PERFMON (`bpf_capable` and `perfmon_capable`,
/// `include/linux/capability.h` at v5.10).
fn with_included(set: CapabilitySet) -> CapabilitySet {
    if set.contains(CapabilitySet::SYS_ADMIN) { set | ATTACH } else { set }
}

/// What the process still has to do after the programs are attached, in addition to watching.
#[derive(Clone, Copy, Debug)]
pub struct PrivilegePlan<'a> {
    /// The event log, which is reopened after log rotation.
    pub log: Option<&'a Path>,
    /// True if the process may destroy sockets.
    pub destroys: bool,
    /// True if the iterator over descriptors is attached.
    pub has_iterator: bool,
    /// True if there is a guard, which has a thread that attaches it in other network namespaces.
    pub guards: bool,
}

/// The capabilities that are left for the main loop.
#[must_use = "the calling thread keeps the capabilities of all threads until `restrict_thread` is called"]
#[derive(Debug)]
pub struct LoopCapabilities(CapabilitySet);

/// Drops all capabilities that no thread needs after the programs are attached, and every way to regain them.
/// `can_read_maps` tries to read the programs' maps: kernels before v5.19 require CAP_BPF for this while
/// `kernel.unprivileged_bpf_disabled` is set (`__sys_bpf`, kernel/bpf/syscall.c at v5.18 and v5.19).
///
/// # Errors
/// If the kernel refuses to drop capabilities. Only a seccomp filter can cause this.
pub fn drop_after_attach(
    plan: PrivilegePlan<'_>,
    can_read_maps: impl FnOnce() -> bool,
) -> Result<LoopCapabilities> {
    let had = capabilities(None).context("cannot read the capabilities")?.permitted;
    let mut needed_by_loop = CapabilitySet::empty();
    if let Some(log) = plan.log
        && had.contains(CapabilitySet::DAC_OVERRIDE)
        && !can_create(log, needed_by_loop)
    {
        log::info!("CAP_DAC_OVERRIDE is kept: without it {} could not be reopened", log.display());
        needed_by_loop |= CapabilitySet::DAC_OVERRIDE;
    }
    let context = "cannot drop capabilities: a seccomp filter must allow prctl and capset";
    prevent_regaining().context(context)?;
    // For now they are removed only from the effective set, so that CAP_BPF can still be kept if it is
    // needed.
    set_thread_capabilities(had & needed_by_loop, had).context(context)?;
    if !can_read_maps() {
        // Kernels before v5.8 do not have CAP_BPF.
        let has_bpf = had.contains(CapabilitySet::BPF);
        let needed = if has_bpf { CapabilitySet::BPF } else { CapabilitySet::SYS_ADMIN };
        log::info!(
            "{} is kept: this kernel requires it to read maps while kernel.unprivileged_bpf_disabled is set",
            names(needed).join(", ")
        );
        needed_by_loop |= had & needed;
    }
    // These include what every other worker needs.
    let mut needed_by_workers = snapshot_worker(plan.has_iterator) | PORT_RANGE_WORKER;
    // The snapshot worker has it only if the loop needs it, too.
    needed_by_workers.remove(CapabilitySet::BPF);
    if plan.destroys {
        needed_by_workers |= remedy_worker(true);
    }
    if plan.guards {
        needed_by_workers |= GUARD_THREAD;
    }
    let kept = had & (needed_by_loop | needed_by_workers);
    set_thread_capabilities(kept, kept).context(context)?;
    Ok(LoopCapabilities(needed_by_loop))
}

impl LoopCapabilities {
    /// Restricts the calling thread to the capabilities of the main loop. All other threads must have been
    /// started.
    ///
    /// # Errors
    /// As [`restrict_to`].
    pub fn restrict_thread(self) -> io::Result<()> {
        restrict_to(self.0)
    }
}

/// Restricts the calling thread to these capabilities, as far as it has them.
///
/// # Errors
/// If a seccomp filter forbids it.
pub fn restrict_to(capability_set: CapabilitySet) -> io::Result<()> {
    let kept = capabilities(None)?.permitted & capability_set;
    Ok(set_thread_capabilities(kept, kept)?)
}

/// Starts a thread with this name and only these capabilities, as far as this thread has them. If they cannot
/// be dropped, the thread runs nevertheless. A panic that ends it is in [`busy::panicked_threads`].
///
/// # Errors
/// If the thread cannot be started.
pub fn spawn_restricted(
    name: &'static str,
    capability_set: CapabilitySet,
    run: impl FnOnce() + Send + 'static,
) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        let _note = PanicNote(name);
        if let Err(error) = restrict_to(capability_set) {
            log::error!("the thread {name} keeps too many privileges: {error}");
        }
        run();
    })?;
    Ok(())
}

fn set_thread_capabilities(effective: CapabilitySet, permitted: CapabilitySet) -> rustix::io::Result<()> {
    set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })
}

/// Makes sure that dropped capabilities cannot be regained through execve(2). The daemon starts no program,
/// but a started program would get no capabilities either.
fn prevent_regaining() -> rustix::io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    // This ends with EINVAL at the first capability that this kernel does not know. Without CAP_SETPCAP it
    // ends at once; a service manager that has already reduced the bounding set need not grant it.
    let mut all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    let _ = all.try_for_each(remove_capability_from_bounding_set);
    Ok(())
}

/// True if this file can be opened, and a new one created in its directory, with only these capabilities. The
/// check runs on a temporary thread, because for root access(2) uses the permitted set and not the effective
/// set.
fn can_create(file: &Path, capabilities: CapabilitySet) -> bool {
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let check = || {
        restrict_to(capabilities).is_ok()
            && access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok()
            && access(file, Access::WRITE_OK).is_ok()
    };
    thread::scope(|scope| scope.spawn(check).join().unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sys_admin_includes_what_attaching_needs() {
        const NONE: CapabilitySet = CapabilitySet::empty();
        for (set, missing) in [
            (CapabilitySet::SYS_ADMIN, NONE),
            (ATTACH, NONE),
            (CapabilitySet::BPF, CapabilitySet::PERFMON),
            (CapabilitySet::PERFMON, CapabilitySet::BPF),
            (CapabilitySet::NET_ADMIN, ATTACH),
        ] {
            assert_eq!(ATTACH.difference(with_included(set)), missing, "{set:?}");
        }
        assert_eq!(names(ATTACH), ["CAP_BPF", "CAP_PERFMON"]);
    }

    #[test]
    fn only_a_remedy_that_destroys_has_net_admin() {
        for destroys in [true, false] {
            let set = remedy_worker(destroys);
            assert_eq!(set.contains(CapabilitySet::NET_ADMIN), destroys);
            assert_eq!(set.difference(CapabilitySet::NET_ADMIN), PORT_RANGE_WORKER);
        }
    }
}
