//! The eBPF object that is part of this binary: its options, the globals that they become, and its maps.

use std::{
    io,
    ops::{Deref, DerefMut},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{Ebpf, EbpfError, EbpfLoader, maps::MapError};
use rustix::{
    param::page_size,
    thread::{MembarrierCommand, membarrier},
};
use selfconn_ebpf::{WAYS, guard::mode, names, reported};

use super::{features::KernelFeatures, guard::GuardOptions, refusal::Refusal};

/// The eBPF object that `cargo xtask build-ebpf` builds.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-hooks"));

/// Size of the guard's ring buffer: about 3,000 records.
const GUARD_RING_BYTES: u32 = 1 << 19;

/// The sizes of the maps, and what the programs report.
#[derive(Clone, Copy, Debug)]
pub struct ObjectOptions {
    /// The size of the ring buffer in bytes: a power of two and at least one page.
    pub ring_bytes: u32,
    /// The maximum number of entries in the connect table: connection attempts in progress and
    /// self-connections.
    pub connect_table_size: u32,
    /// The maximum number of destinations for which refused connects are counted.
    pub refused_table_size: u32,
    /// True to report every state transition, and not only the beginning and the end of a connection.
    pub states: bool,
    /// True to read the log of the eBPF programs.
    pub log: bool,
    pub guard: GuardOptions,
    /// The id of the control group whose processes are one owner's. 0: there is none.
    pub watched_cgroup: u64,
}

impl ObjectOptions {
    /// The options of an object that is loaded for a moment only.
    pub const MINIMAL: Self = Self {
        ring_bytes: 1 << 16,
        connect_table_size: 64,
        refused_table_size: 64,
        states: false,
        log: false,
        guard: GuardOptions::OFF,
        watched_cgroup: 0,
    };
}

/// The maps and programs of the object. Links must be dropped before it.
///
/// It waits for the programs that run before it releases them. A program without a reference is removed from the
/// kernel's lists at once and freed later; if it still runs on another CPU by then and takes a page fault, the handler
/// no longer finds its exception table, and the kernel crashes (`__bpf_prog_put_noref`, kernel/bpf/syscall.c, and
/// `search_bpf_extables`, kernel/bpf/core.c, at v6.1).
pub(super) struct LoadedObject(Ebpf);

impl Deref for LoadedObject {
    type Target = Ebpf;

    fn deref(&self) -> &Ebpf {
        &self.0
    }
}

impl DerefMut for LoadedObject {
    fn deref_mut(&mut self) -> &mut Ebpf {
        &mut self.0
    }
}

impl Drop for LoadedObject {
    fn drop(&mut self) {
        // The kernel waits for a grace period of RCU, if it has several CPUs (`MEMBARRIER_CMD_GLOBAL`,
        // kernel/sched/membarrier.c at v5.10). That does not cover a program that sleeps in the handler of page faults:
        // none of ours takes one (`KernelRead::NULL_FAULTS`).
        if let Err(error) = membarrier(MembarrierCommand::Global) {
            log::debug!("membarrier: {error}; waiting {WITHOUT_BARRIER:?} for running programs instead");
            thread::sleep(WITHOUT_BARRIER);
        }
    }
}

/// Where the kernel has no global barrier (`nohz_full`), programs that run have this time to end.
const WITHOUT_BARRIER: Duration = Duration::from_millis(50);

/// Loads the object: creates its maps and sets its globals. No program is loaded yet.
pub(super) fn load(features: &KernelFeatures, options: ObjectOptions) -> Result<LoadedObject> {
    load_maps(features, options).map(LoadedObject)
}

/// Loads the object for an iterator, which runs only while it is read.
pub(super) fn load_for_iterator(features: &KernelFeatures) -> Result<Ebpf, Refusal> {
    load_maps(features, ObjectOptions::MINIMAL).map_err(|error| Refusal::Refused(format!("{error:#}")))
}

fn load_maps(features: &KernelFeatures, options: ObjectOptions) -> Result<Ebpf> {
    raise_memlock();
    // 0 is below every level of aya-log, and the verifier removes the unreachable code.
    let log_level = if options.log { aya_log::Level::Debug as u8 } else { 0 };
    let sets = options.connect_table_size.div_ceil(WAYS as u32).max(1);
    let reported = if options.states { reported::STATES } else { reported::LIFETIMES };
    let socket_cookie = u32::from(features.socket_cookie);
    let guard = options.guard;
    let by_cgroup = u32::from(guard.by_cgroup);
    // A guard that is off has the smallest ring buffer and maps.
    let guard_bytes = if guard.mode == mode::OFF { page_size() as u32 } else { GUARD_RING_BYTES };
    let mut loader = EbpfLoader::new();
    if guard.mode == mode::OFF {
        for map in [names::GUARD_PORTS, names::GUARD_UIDS, names::GUARD_CGROUPS, names::GUARD_NAMESPACES] {
            loader.map_max_entries(map, 1);
        }
    }
    loader
        .btf(None)
        .override_global(names::GUARD_MODE, &guard.mode, true)
        .override_global(names::GUARD_ONLY, &guard.only, true)
        .override_global(names::GUARD_BY_CGROUP, &by_cgroup, true)
        .override_global(names::GUARD_SELF_TEST, &guard.self_test, true)
        .map_max_entries(names::GUARD_RECORDS, guard_bytes)
        .override_global(names::OFFSETS, &features.offsets[..], true)
        .override_global(names::TASK_ACCESS, &features.task_access, true)
        .override_global(names::CGROUP_ACCESS, &features.cgroup_access, true)
        .override_global(names::WATCHED_CGROUP, &options.watched_cgroup, true)
        .override_global(names::SOCKET_COOKIE, &socket_cookie, true)
        .override_global(names::REPORTED, &reported, true)
        .override_global(aya_log::LEVEL, &log_level, true)
        .map_max_entries(names::RECORDS, options.ring_bytes)
        .override_global(names::CONNECT_SETS, &sets, true)
        .map_max_entries(names::CONNECT_TABLE, sets)
        .override_global(names::REFUSED_SIZE, &options.refused_table_size, true)
        .map_max_entries(names::REFUSED_CONNECTS, options.refused_table_size)
        .map_max_entries(names::REFUSED_SHARES, 3 * options.refused_table_size + 1)
        .load(OBJECT)
        .map_err(|error| ring_memory_error(&error, options.ring_bytes).unwrap_or_else(|| error.into()))
        .context("cannot load the maps")
}

/// A message with a hint, if the kernel had no memory for the ring buffer.
fn ring_memory_error(error: &EbpfError, ring_bytes: u32) -> Option<anyhow::Error> {
    let EbpfError::MapError(MapError::CreateError { name, io_error, .. }) = error else { return None };
    let is_ring = *name == names::RECORDS && io_error.kind() == io::ErrorKind::OutOfMemory;
    let size = if ring_bytes >= 1 << 30 {
        format!("{} GiB", ring_bytes >> 30)
    } else {
        format!("{} KiB", ring_bytes >> 10)
    };
    is_ring.then(|| anyhow!("no memory for a ring buffer of {size}: ask for a smaller one with --ring-size"))
}

/// Raises RLIMIT_MEMLOCK, because before v5.11 maps count against it. Later kernels ignore it for maps.
fn raise_memlock() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        log::debug!("cannot raise RLIMIT_MEMLOCK: {error}");
    }
}
