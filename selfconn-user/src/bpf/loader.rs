//! The attached programs: starts and detaches them, drains their ring buffer into records, and reads their
//! other maps.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd},
    sync::Arc,
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf,
    maps::{MapData, PerCpuArray, RingBuf},
};
use aya_log::EbpfLogger;
use selfconn_ebpf::{
    ConnectEntry, Endpoint, Owner, Record,
    bind_failure::BindFailure,
    counter,
    guard::{GuardRecord, mode},
    names,
    owner::OwnerState,
};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    attach::{Choice, Method, RequestedHooks, choose},
    bind_method::{BindChoice, RequestedBindMethod},
    bind_programs::{self, BindLinks},
    connect_table::ConnectTable,
    descriptors::{self, DescriptorIter},
    features::KernelFeatures,
    guard::GuardProgram,
    held_ports::HeldPorts,
    namespaces::{self, NamespaceIter},
    object::{self, LoadedObject, ObjectOptions},
    owners::Owners,
    programs::{KernelBtf, Link, attach},
    refusal::Refusal,
    tracefs,
    watched_ports::WatchedPorts,
};

pub use super::refused_connects::RefusedCounts;

/// What to attach, and the options of the object.
#[derive(Clone, Copy, Debug)]
pub struct TracerOptions {
    /// The hooks and methods to attach.
    pub hooks: RequestedHooks,
    /// The method that detects failed binds.
    pub bind_method: RequestedBindMethod,
    pub object: ObjectOptions,
}

/// The counters of the eBPF programs since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records that the programs produced: each is delivered through the ring buffer or counted in
    /// `ring_full`.
    pub matched: u64,
    /// Records that are lost because the ring buffer was full.
    pub ring_full: u64,
    /// Connecting tasks that are not recorded because the connect table was full.
    pub connect_table_full: u64,
    /// Refused connects of an address to itself.
    pub refused_connects: u64,
    /// Refused connects that are not counted by destination because the refused-connect table was full.
    pub refused_table_full: u64,
    /// Failed binds that are not reported because their owner had too many.
    pub bind_failures_over_rate: u64,
    /// Connects to itself that the guard refused, or would have.
    pub prevented: u64,
    /// Those of `prevented` whose record is lost because the guard's ring buffer was full.
    pub guard_ring_full: u64,
    /// Connects to itself that the guard let pass because of a rule or a signature.
    pub guard_passed: u64,
    /// Packets that the guard could not read or rewrite.
    pub guard_failed: u64,
    /// Transitions that each program processed, reported or not, in the order of [`Method::ALL`].
    pub seen: [u64; Method::ALL.len()],
}

/// The attached programs and their maps. Dropping it detaches all programs.
pub struct Tracer {
    ring: AsyncFd<RingBuf<MapData>>,
    /// Failed binds only.
    bind_ring: AsyncFd<RingBuf<MapData>>,
    /// Records of the guard only.
    guard_ring: AsyncFd<RingBuf<MapData>>,
    guard: Option<GuardProgram>,
    counters: PerCpuArray<MapData, u64>,
    connect_table: ConnectTable,
    refused_counts: RefusedCounts,
    held_ports: HeldPorts,
    watched_ports: WatchedPorts,
    owners: Owners,
    log: Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>>,
    delivered: u64,
    methods: Choice<()>,
    binds: BindChoice,
    bind_links: Option<BindLinks>,
    iterators: Option<Iterators>,
    descriptors_refusal: Option<Refusal>,
    namespaces_refusal: Option<Refusal>,
    links: Vec<Link>,
    programs: LoadedObject,
    uses_static_offsets: bool,
}

/// The iterators that are attached.
#[derive(Debug, Default)]
pub struct Iterators {
    /// Over the descriptors of all processes.
    pub descriptors: Option<Arc<DescriptorIter>>,
    /// Over the network namespaces.
    pub namespaces: Option<NamespaceIter>,
}

/// The iterator, or the reason why it is not attached.
fn split<T>(over: &str, outcome: Result<T, Refusal>) -> (Option<T>, Option<Refusal>) {
    if let Err(Refusal::Broken(why)) = &outcome {
        log::warn!(
            "the iterator over {over} should work on this kernel but does not; please report it: {why}"
        );
    }
    match outcome {
        Ok(iter) => (Some(iter), None),
        Err(why) => (None, Some(why)),
    }
}

impl Tracer {
    /// Loads and attaches the programs. Must run inside a tokio runtime with I/O.
    ///
    /// # Errors
    /// If the requested hooks cannot be attached or the maps cannot be created.
    pub fn start(features: &KernelFeatures, options: TracerOptions) -> Result<Self> {
        features.check_capabilities().map_err(|why| anyhow!("{why}"))?;
        let mut ebpf = object::load(features, options.object)?;
        let (choice, (binds, bind_links), descriptors, namespaces) = tracefs::with(|| {
            let kernel_btf = KernelBtf::new(features);
            let choice = choose(options.hooks, |method| attach(&mut ebpf, method, features, &kernel_btf));
            let binds = bind_programs::choose(&mut ebpf, options.bind_method, features, &kernel_btf);
            let descriptors = descriptors::attach(&mut ebpf, features, &kernel_btf);
            (choice, binds, descriptors, namespaces::attach(&mut ebpf, features, &kernel_btf))
        });
        let (descriptors, descriptors_refusal) = split("descriptors", descriptors);
        let (namespaces, namespaces_refusal) = split("network namespaces", namespaces);
        for (method, why) in &choice.refused {
            if let Refusal::Broken(why) = why {
                log::warn!("{method} should work on this kernel but does not; please report it: {why}");
            }
        }
        choice.satisfies(options.hooks).map_err(|why| anyhow!(why))?;
        binds.satisfies(options.bind_method).map_err(|why| anyhow!(why))?;
        let ring = RingBuf::try_from(take_map(&mut ebpf, names::RECORDS)?)?;
        let bind_ring = RingBuf::try_from(take_map(&mut ebpf, names::BIND_RECORDS)?)?;
        let guard_ring = RingBuf::try_from(take_map(&mut ebpf, names::GUARD_RECORDS)?)?;
        let guard = match options.object.guard.mode {
            mode::OFF => None,
            mode => {
                let guard = GuardProgram::load(&mut ebpf, features, mode == mode::REFUSE);
                Some(guard.map_err(|why| anyhow!("--guard: {why}"))?)
            }
        };
        let counters = PerCpuArray::try_from(take_map(&mut ebpf, names::COUNTERS)?)?;
        let log = if options.object.log {
            let logger = EbpfLogger::init(&mut ebpf).context("the programs' log")?;
            Some(async_fd(logger)?)
        } else {
            None
        };
        let (live, links) = choice.live.into_iter().map(|(method, link)| ((method, ()), link)).unzip();
        Ok(Self {
            ring: async_fd(ring)?,
            bind_ring: async_fd(bind_ring)?,
            guard_ring: async_fd(guard_ring)?,
            guard,
            counters,
            connect_table: ConnectTable::new(take_map(&mut ebpf, names::CONNECT_TABLE)?)?,
            refused_counts: RefusedCounts::new(
                take_map(&mut ebpf, names::REFUSED_CONNECTS)?,
                take_map(&mut ebpf, names::REFUSED_SHARES)?,
                take_map(&mut ebpf, names::REFUSED_AT)?,
            )?,
            held_ports: HeldPorts::new(take_map(&mut ebpf, names::HELD_PORTS)?)?,
            watched_ports: WatchedPorts::new(take_map(&mut ebpf, names::WATCHED_PORTS)?)?,
            owners: Owners::new(take_map(&mut ebpf, names::OWNERS)?)?,
            log,
            delivered: 0,
            methods: Choice { live, refused: choice.refused },
            binds,
            bind_links,
            iterators: Some(Iterators { descriptors: descriptors.map(Arc::new), namespaces }),
            descriptors_refusal,
            namespaces_refusal,
            links,
            programs: ebpf,
            uses_static_offsets: features.uses_static_offsets,
        })
    }

    /// Detaches the programs. Records that are already in the ring buffer can still be read.
    pub fn detach(&mut self) {
        self.links.clear();
        self.bind_links = None;
    }

    /// The method that detects failed binds, and the reasons why other methods are not attached.
    #[must_use]
    pub fn bind_choice(&self) -> &BindChoice {
        &self.binds
    }

    /// The reason why the iterator over descriptors is not attached. `None`: it is.
    pub fn descriptors_refusal(&self) -> Option<&Refusal> {
        self.descriptors_refusal.as_ref()
    }

    /// The same for the iterator over network namespaces.
    pub fn namespaces_refusal(&self) -> Option<&Refusal> {
        self.namespaces_refusal.as_ref()
    }

    /// Takes the iterators out. They are independent of the rest. There is none if they were taken before.
    pub fn take_iterators(&mut self) -> Iterators {
        self.iterators.take().unwrap_or_default()
    }

    /// True if any program is attached to its hook.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        !self.links.is_empty()
    }

    /// The number of times that the kernel did not run an attached program because of recursion protection:
    /// that program, or another program with the same recursion guard, was already running on the CPU.
    /// `None`: the kernel does not count this (before v5.12). The number is a lower bound, because for `perf`
    /// and `kprobe` the kernel counts only since v6.7 (`trace_call_bpf`, kernel/trace/bpf_trace.c).
    #[must_use]
    pub fn not_examined(&self) -> Option<u64> {
        let programs = self.methods.live.iter().map(|(method, ())| method.program(self.uses_static_offsets));
        self.not_run(programs)
    }

    /// The same for the programs of failed binds, which also see the binds that succeed. `None`: also if none is
    /// attached.
    #[must_use]
    pub fn binds_not_examined(&self) -> Option<u64> {
        self.not_run(self.binds.live?.programs().iter().copied())
    }

    fn not_run<'a>(&self, mut programs: impl Iterator<Item = &'a str>) -> Option<u64> {
        programs.try_fold(0, |sum, name| {
            let fd = self.programs.program(name)?.fd().ok()?.as_fd().as_raw_fd();
            let fdinfo = fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?;
            Some(sum + recursion_misses(&fdinfo)?)
        })
    }

    /// The attached methods, and the reasons why the others are not attached.
    #[must_use]
    pub fn methods(&self) -> &Choice<()> {
        &self.methods
    }

    /// Waits until a ring buffer or the log of the eBPF programs has data, except for that of transitions while its
    /// records gather. Writes out the log.
    ///
    /// # Errors
    /// If the runtime cannot wait on a map's descriptor.
    pub async fn readable(&mut self, gathers: bool) -> io::Result<()> {
        let Self { ring, bind_ring, guard_ring, log, .. } = self;
        let log_readable = async {
            match log {
                Some(log) => log.readable_mut().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            guard = ring.readable_mut(), if !gathers => guard?.clear_ready(),
            guard = bind_ring.readable_mut() => guard?.clear_ready(),
            guard = guard_ring.readable_mut() => guard?.clear_ready(),
            guard = log_readable => {
                let mut guard = guard?;
                guard.get_inner_mut().flush();
                guard.clear_ready();
            }
        }
        Ok(())
    }

    /// Reads at most `limit` failed binds from their ring buffer.
    pub fn drain_bind_failures(&mut self, limit: usize) -> Vec<BindFailure> {
        let ring = self.bind_ring.get_mut();
        let mut failures = Vec::new();
        while failures.len() < limit
            && let Some(item) = ring.next()
        {
            self.delivered += 1;
            match Record::from_bytes(&item) {
                Some(Record::BindFailure(failure)) => failures.push(failure),
                _ => log::error!("invalid record of {} bytes in the ring buffer of failed binds", item.len()),
            }
        }
        failures
    }

    /// Takes the guard's program out. `None`: there is no guard, or it was taken before.
    pub fn take_guard(&mut self) -> Option<GuardProgram> {
        self.guard.take()
    }

    /// Reads at most `limit` records of the guard.
    pub fn drain_guard(&mut self, limit: usize) -> Vec<GuardRecord> {
        let ring = self.guard_ring.get_mut();
        let mut records = Vec::new();
        while records.len() < limit
            && let Some(item) = ring.next()
        {
            match GuardRecord::from_bytes(&item) {
                Some(record) => records.push(record),
                None => log::error!("invalid record of {} bytes in the guard's ring buffer", item.len()),
            }
        }
        records
    }

    /// Updates the programs' table of held ports: sets the `needed` slots and, if these are all, clears the others.
    /// Slots that a program has set since `before_ns` are kept.
    pub fn update_held_ports(&self, needed: impl Iterator<Item = u32>, before_ns: u64, are_all: bool) {
        if let Err(error) = self.held_ports.update(needed, before_ns, are_all) {
            log::error!("the table of held ports can't be mapped: {error}");
        }
    }

    /// Sets the ports whose listeners the programs report when they are closed.
    pub fn update_watched_ports<'a>(&self, watched: impl Iterator<Item = &'a Endpoint>) {
        if let Err(error) = self.watched_ports.update(watched) {
            log::error!("the table of watched ports can't be mapped: {error}");
        }
    }

    /// The owners that have lost anything, by the programs' counts.
    pub fn owners_with_losses(&self) -> impl Iterator<Item = (Owner, OwnerState)> {
        self.owners.with_losses()
    }

    /// Reads at most `limit` records from the ring buffer. Returns how many were read.
    pub fn drain(&mut self, limit: usize, mut each: impl FnMut(&Record, &RefusedCounts)) -> usize {
        self.drain_while(limit, |record, refused| {
            each(record, refused);
            true
        })
    }

    /// Reads records from the ring buffer, at most `limit`, and none after one for which `each` returns false. Returns
    /// how many were read, or `limit` if there may be more.
    pub fn drain_while(
        &mut self,
        limit: usize,
        mut each: impl FnMut(&Record, &RefusedCounts) -> bool,
    ) -> usize {
        let ring = self.ring.get_mut();
        for read in 0..limit {
            let Some(item) = ring.next() else { return read };
            self.delivered += 1;
            let goes_on = match Record::from_bytes(&item) {
                Some(record) => each(&record, &self.refused_counts),
                None => {
                    log::error!("invalid record of {} bytes in the ring buffer", item.len());
                    true
                }
            };
            if !goes_on {
                break;
            }
        }
        limit
    }

    /// The counts of refused connects by destination.
    pub fn refused_counts(&mut self) -> &mut RefusedCounts {
        &mut self.refused_counts
    }

    /// The number of records read from the ring buffer so far.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// The counters of the eBPF programs.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn counters(&self) -> Result<Counters> {
        let sum = |slot| -> Result<u64> { Ok(self.counters.get(&slot, 0)?.iter().sum()) };
        let mut seen = [0; Method::ALL.len()];
        for (slot, seen) in (counter::SEEN_BY_PROBE..).zip(&mut seen) {
            *seen = sum(slot)?;
        }
        Ok(Counters {
            seen,
            matched: sum(counter::MATCHED)?,
            ring_full: sum(counter::RING_FULL)?,
            connect_table_full: sum(counter::CONNECT_TABLE_FULL)?,
            refused_connects: sum(counter::REFUSED)?,
            refused_table_full: sum(counter::REFUSED_TABLE_FULL)?,
            bind_failures_over_rate: sum(counter::BIND_FAILURES_OVER_RATE)?,
            prevented: sum(counter::GUARD_PREVENTED)?,
            guard_ring_full: sum(counter::GUARD_RING_FULL)?,
            guard_passed: sum(counter::GUARD_EXEMPT)? + sum(counter::GUARD_SIGNED)?,
            guard_failed: sum(counter::GUARD_UNREADABLE)? + sum(counter::GUARD_FAILED)?,
        })
    }

    /// Calls `each` for each entry of the connect table, a connection attempt in progress or a self-connection, with
    /// the address of its socket. Walks the whole table.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn for_each_connect(&self, each: impl FnMut(u64, &ConnectEntry)) -> Result<()> {
        self.connect_table.for_each(each)
    }

    /// As [`Self::for_each_connect`], and removes the entries for which `keep` returns false, because their sockets are
    /// gone.
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn retain_connects(&self, keep: impl FnMut(u64, &ConnectEntry) -> bool) -> Result<()> {
        self.connect_table.retain(keep)
    }

    /// A copy of the connect table, for tests: see [`Self::for_each_connect`].
    ///
    /// # Errors
    /// If the map cannot be read.
    pub fn connect_entries(&self) -> Result<Vec<(u64, ConnectEntry)>> {
        let mut entries = Vec::new();
        self.for_each_connect(|sock, entry| entries.push((sock, *entry)))?;
        Ok(entries)
    }
}

/// Parses the counter from a program's `fdinfo` (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c at v5.12).
/// Unlike BPF_OBJ_GET_INFO_BY_FD, reading `fdinfo` needs no `unsafe`.
fn recursion_misses(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse().ok())
}

fn async_fd<T: AsRawFd>(readable: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: both types that are passed in own the descriptor of their map, always return this descriptor,
    // and close it only when they are dropped.
    Ok(unsafe { AsyncFd::register_with_interest(readable, Interest::READABLE) }?)
}

fn take_map(ebpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recursion_misses_are_parsed_from_fdinfo() {
        let since_5_12 = "pos:\t0\nprog_type:\t26\nrun_cnt:\t0\nrecursion_misses:\t41\nverified_insns:\t7\n";
        assert_eq!(recursion_misses(since_5_12), Some(41));
        assert_eq!(recursion_misses("pos:\t0\nprog_type:\t26\nrun_cnt:\t0\n"), None);
    }
}
