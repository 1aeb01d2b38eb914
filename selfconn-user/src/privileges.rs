//! What the process may do once its hooks are live. Attaching takes privileges that watching doesn't; they are given up
//! as soon as they have served, for good and on every thread, whoever granted them.
//!
//! Capabilities belong to threads, and a new thread gets those of the one that starts it. So the order is: attach,
//! [`drop_after_attach`], start the other threads, each of which [`keep`]s its own, and then [`Kept::narrow`]. The
//! loop itself must not keep CAP_SYS_ADMIN, which stands for CAP_BPF and CAP_PERFMON.

use std::{io, path::Path, thread};

use anyhow::{Context as _, Result};
use rustix::{
    fs::{Access, access},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
        remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
    },
};

/// The reader's thread: enters other network namespaces, sees whose the sockets are, and destroys one where `--remedy`
/// says so.
pub const READER: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_PTRACE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::NET_ADMIN);

/// The thread that reads port ranges: enters other network namespaces, which processes lead to.
pub const RANGES: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_PTRACE);

/// The loop: looks at the programs of other users' processes.
const LOOP: CapabilitySet = CapabilitySet::SYS_PTRACE;

/// What this run will go on to do, beside watching.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// The event log, which is opened again when it was moved away.
    pub log: Option<&'a Path>,
    /// Whether it may destroy sockets.
    pub destroys: bool,
}

/// What is left for the loop.
#[must_use = "the calling thread keeps the capabilities of all threads until it narrows its own"]
#[derive(Debug)]
pub struct Kept(CapabilitySet);

/// Gives up whatever no thread needs once the hooks are live, and every way to get it back. `reads_maps` tries to read
/// the programs' maps: kernels before v5.19 let only CAP_BPF do that while `kernel.unprivileged_bpf_disabled` is set
/// (`__sys_bpf`, kernel/bpf/syscall.c at v5.18 and v5.19).
///
/// # Errors
/// When the kernel doesn't take them, which only a seccomp filter can bring about.
pub fn drop_after_attach(plan: Plan<'_>, reads_maps: impl FnOnce() -> bool) -> Result<Kept> {
    let had = capabilities(None).context("cannot read the capabilities")?.permitted;
    let mut own = had & LOOP;
    if let Some(log) = plan.log
        && had.contains(CapabilitySet::DAC_OVERRIDE)
        && !can_make(log, own)
    {
        log::info!("CAP_DAC_OVERRIDE is kept: without it {} could not be opened again", log.display());
        own |= CapabilitySet::DAC_OVERRIDE;
    }
    let told = "cannot give up capabilities: a seccomp filter must allow prctl and capset";
    seal().context(told)?;
    // First only out of effect, so that CAP_BPF can be had back.
    set(had & own, had).context(told)?;
    if !reads_maps() {
        // Before v5.8 there is no CAP_BPF.
        let (needed, name) = if had.contains(CapabilitySet::BPF) {
            (CapabilitySet::BPF, "CAP_BPF")
        } else {
            (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN")
        };
        log::info!(
            "{name} is kept: this kernel lets nobody else read maps while kernel.unprivileged_bpf_disabled is set"
        );
        own |= had & needed;
    }
    let reader = if plan.destroys { READER } else { READER.difference(CapabilitySet::NET_ADMIN) };
    let kept = had & (own | reader);
    set(kept, kept).context(told)?;
    Ok(Kept(own))
}

impl Kept {
    /// Leaves the calling thread what the loop needs. The other threads must have been started.
    ///
    /// # Errors
    /// As [`keep`].
    pub fn narrow(self) -> io::Result<()> {
        keep(self.0)
    }
}

/// Leaves the calling thread these capabilities, as far as it has them.
///
/// # Errors
/// When a seccomp filter forbids it.
pub fn keep(wanted: CapabilitySet) -> io::Result<()> {
    let kept = capabilities(None)?.permitted & wanted;
    Ok(set(kept, kept)?)
}

fn set(effective: CapabilitySet, permitted: CapabilitySet) -> rustix::io::Result<()> {
    set_capabilities(None, CapabilitySets { effective, permitted, inheritable: CapabilitySet::empty() })
}

/// Nothing that is given up comes back: we start no program, and would one be started, it would get nothing.
fn seal() -> rustix::io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    // Ends with EINVAL at the first that this kernel doesn't know; or at once, without CAP_SETPCAP, which a service
    // manager that has cut the set itself need not give us.
    let mut all = (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number));
    let _ = all.try_for_each(remove_capability_from_bounding_set);
    Ok(())
}

/// Whether a file can be made, and found, where this one is, with these capabilities only. Asked on a thread that is
/// thrown away, for access(2) goes by what root is permitted and not by what is in effect.
fn can_make(file: &Path, with: CapabilitySet) -> bool {
    let dir = match file.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let ask = || {
        keep(with).is_ok()
            && access(dir, Access::WRITE_OK | Access::EXEC_OK).is_ok()
            && access(file, Access::WRITE_OK).is_ok()
    };
    thread::scope(|scope| scope.spawn(ask).join().unwrap_or(false))
}
