//! Our programs in the kernel: loads and attaches them, and turns the bytes of the ring buffer into transitions.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd},
};

use anyhow::{Context as _, Result, anyhow};
use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{MapData, MapError, PerCpuArray, RingBuf},
};
use aya_log::EbpfLogger;
use selfconn_ebpf::{Dial, Record, WAYS, counter, names, reported};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    attach::{Choice, Method, Refusal, Wanted, choose},
    host::Host,
    tracefs,
};

pub mod binds;
mod dials;
mod methods;
mod refusals;

use dials::Dials;
use methods::{KernelBtf, Link, attach};
pub use refusals::Refusals;

/// The object that `cargo xtask build-ebpf` makes.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/selfconn-hooks"));

/// How to trace.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Which hooks and methods.
    pub wanted: Wanted,
    /// How failed binds are to be seen.
    pub binds: binds::WantedBinds,
    /// Size of the ring buffer in bytes: a power of two, and at least a page.
    pub ring_bytes: u32,
    /// How many dials in flight and self-connections are remembered.
    pub dials: u32,
    /// Of how many ports refused dials are counted apart.
    pub refusals: u32,
    /// Whether every state is wanted, and not only what tells lifetimes.
    pub states: bool,
    /// Whether the programs' own log is wanted.
    pub log: bool,
}

/// What the programs counted since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Records that were to go through the ring buffer: each is delivered, or counted below.
    pub matched: u64,
    /// Records that it had no room for.
    pub ring_full: u64,
    /// Openers that the table had no room for.
    pub not_remembered: u64,
    /// Refused dials of an address to itself.
    pub refused: u64,
    /// Those of them that the table by port had no room for.
    pub not_tallied: u64,
    /// Transitions that each program saw, reported or not, in the order of [`Method::ALL`].
    pub seen: [u64; Method::ALL.len()],
}

/// The live programs and what they write to. Dropping it detaches everything.
pub struct Tracer {
    ring: AsyncFd<RingBuf<MapData>>,
    counters: PerCpuArray<MapData, u64>,
    dials: Dials,
    refusals: Refusals,
    log: Option<AsyncFd<EbpfLogger<&'static dyn log::Log>>>,
    delivered: u64,
    methods: Choice<()>,
    binds: binds::Binds,
    bind_links: Option<binds::Links>,
    links: Vec<Link>,
    programs: Ebpf,
    has_usual_layout: bool,
}

impl Tracer {
    /// Loads and attaches. Must run inside a tokio runtime with I/O.
    ///
    /// # Errors
    /// When nothing of what was asked for can be attached, or the maps can't be made.
    pub fn start(host: &Host, options: Options) -> Result<Self> {
        host.permits().map_err(|why| anyhow!("{why}"))?;
        raise_memlock();
        let mut ebpf = load(host, options)?;
        let (choice, (binds, bind_links)) = tracefs::with(|| {
            let kernel_btf = KernelBtf::of(host);
            let choice = choose(options.wanted, |method| attach(&mut ebpf, method, host, &kernel_btf));
            (choice, binds::choose(&mut ebpf, options.binds, host, &kernel_btf))
        });
        for (method, why) in &choice.refused {
            if let Refusal::Broken(why) = why {
                log::warn!("{method} should work on this kernel and doesn't; please report it: {why}");
            }
        }
        choice.satisfies(options.wanted).map_err(|why| anyhow!(why))?;
        let ring = RingBuf::try_from(take(&mut ebpf, names::TRANSITIONS)?)?;
        let counters = PerCpuArray::try_from(take(&mut ebpf, names::COUNTERS)?)?;
        let log = if options.log {
            let logger = EbpfLogger::init(&mut ebpf).context("the programs' log")?;
            Some(watch(logger)?)
        } else {
            None
        };
        let (live, links) = choice.live.into_iter().map(|(method, link)| ((method, ()), link)).unzip();
        Ok(Self {
            ring: watch(ring)?,
            counters,
            dials: Dials::of(take(&mut ebpf, names::DIALS)?)?,
            refusals: Refusals::of(take(&mut ebpf, names::REFUSALS)?)?,
            log,
            delivered: 0,
            methods: Choice { live, refused: choice.refused },
            binds,
            bind_links,
            links,
            programs: ebpf,
            has_usual_layout: host.has_usual_layout,
        })
    }

    /// Takes the programs off their hooks; what they have reported can still be read.
    pub fn detach(&mut self) {
        self.links.clear();
        self.bind_links = None;
    }

    /// How failed binds are seen.
    #[must_use]
    pub fn binds(&self) -> &binds::Binds {
        &self.binds
    }

    /// Whether any program is on its hook.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        !self.links.is_empty()
    }

    /// How often a live program was not run, because it was running on that CPU already, or another with the same
    /// guard. `None`: the kernel doesn't count it (before v5.12). A lower bound: for `perf` and `kprobe` it counts only
    /// since v6.7 (`trace_call_bpf`, kernel/trace/bpf_trace.c).
    #[must_use]
    pub fn not_examined(&self) -> Option<u64> {
        let of = |(method, ()): &(Method, ())| {
            let fd =
                self.programs.program(method.program(self.has_usual_layout))?.fd().ok()?.as_fd().as_raw_fd();
            recursion_misses(&fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).ok()?)
        };
        self.methods.live.iter().map(of).sum()
    }

    /// Which methods are live, and why the others aren't.
    #[must_use]
    pub fn methods(&self) -> &Choice<()> {
        &self.methods
    }

    /// Waits until the ring buffer or the programs' log has something.
    ///
    /// # Errors
    /// When the runtime can't wait.
    pub async fn readable(&mut self) -> io::Result<()> {
        let Self { ring, log, .. } = self;
        match log {
            None => ring.readable_mut().await?.clear_ready(),
            Some(log) => tokio::select! {
                guard = ring.readable_mut() => guard?.clear_ready(),
                guard = log.readable_mut() => {
                    let mut guard = guard?;
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
            },
        }
        Ok(())
    }

    /// Takes at most `limit` records out of the ring buffer; says how many there were.
    pub fn drain(&mut self, limit: usize, mut each: impl FnMut(&Record)) -> usize {
        let ring = self.ring.get_mut();
        for taken in 0..limit {
            let Some(item) = ring.next() else { return taken };
            self.delivered += 1;
            match Record::from_bytes(&item) {
                Some(record) => each(&record),
                None => log::error!("a record of {} bytes in the ring buffer", item.len()),
            }
        }
        limit
    }

    /// The table of refused dials.
    pub fn refusals(&mut self) -> &mut Refusals {
        &mut self.refusals
    }

    /// How many records came out of the ring buffer.
    #[must_use]
    pub fn delivered(&self) -> u64 {
        self.delivered
    }

    /// What the programs counted.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn counters(&self) -> Result<Counters> {
        let sum = |slot| -> Result<u64> { Ok(self.counters.get(&slot, 0)?.iter().sum()) };
        let mut seen = [0; Method::ALL.len()];
        for (slot, seen) in (counter::SEEN..).zip(&mut seen) {
            *seen = sum(slot)?;
        }
        Ok(Counters {
            seen,
            matched: sum(counter::MATCHED)?,
            ring_full: sum(counter::RING_FULL)?,
            not_remembered: sum(counter::NOT_REMEMBERED)?,
            refused: sum(counter::REFUSED)?,
            not_tallied: sum(counter::NOT_TALLIED)?,
        })
    }

    /// The dials in flight and self-connections that are remembered now, by their socket. Walks the table.
    ///
    /// # Errors
    /// When the map can't be read.
    pub fn remembered(&self) -> Result<Vec<(u64, Dial)>> {
        self.dials.all()
    }

    /// Forgets a dial whose socket is gone.
    pub fn forget(&mut self, sock: u64) {
        if let Err(error) = self.dials.forget(sock) {
            log::debug!("a stale dial could not be forgotten: {error}");
        }
    }
}

/// Attaches each method for a moment, to learn whether it can be.
///
/// # Errors
/// When the maps can't be made.
pub fn rehearse(host: &Host) -> Result<Vec<(Method, Result<(), Refusal>)>> {
    raise_memlock();
    let options = Options {
        wanted: Wanted::default(),
        binds: binds::WantedBinds::Off,
        ring_bytes: 1 << 16,
        dials: 8,
        refusals: 8,
        states: false,
        log: false,
    };
    let mut ebpf = load(host, options)?;
    Ok(tracefs::with(|| {
        let kernel_btf = KernelBtf::of(host);
        let outcome = |method| (method, attach(&mut ebpf, method, host, &kernel_btf).map(drop));
        Method::ALL.into_iter().map(outcome).collect()
    }))
}

fn load(host: &Host, options: Options) -> Result<Ebpf> {
    // 0 is below every level of aya-log, and the verifier drops what can't run.
    let log_level = if options.log { aya_log::Level::Debug as u8 } else { 0 };
    let sets = options.dials.div_ceil(WAYS as u32).max(1);
    let reported = if options.states { reported::STATES } else { reported::LIFETIMES };
    EbpfLoader::new()
        .btf(None)
        .override_global(names::OFFSETS, &host.offsets[..], true)
        .override_global(names::TASK_ACCESS, &host.task_access, true)
        .override_global(names::REPORTED, &reported, true)
        .override_global(aya_log::LEVEL, &log_level, true)
        .map_max_entries(names::TRANSITIONS, options.ring_bytes)
        .override_global(names::DIAL_SETS, &sets, true)
        .map_max_entries(names::DIALS, sets)
        .map_max_entries(names::REFUSALS, options.refusals)
        .load(OBJECT)
        .map_err(|error| no_room(&error, options.ring_bytes).unwrap_or_else(|| error.into()))
        .context("cannot load the maps")
}

/// What is wrong and how it is mended, where the kernel had no memory for the ring buffer.
fn no_room(error: &EbpfError, ring_bytes: u32) -> Option<anyhow::Error> {
    let EbpfError::MapError(MapError::CreateError { name, io_error, .. }) = error else { return None };
    let is_it = *name == names::TRANSITIONS && io_error.kind() == io::ErrorKind::OutOfMemory;
    let size = if ring_bytes >= 1 << 30 {
        format!("{} GiB", ring_bytes >> 30)
    } else {
        format!("{} KiB", ring_bytes >> 10)
    };
    is_it.then(|| anyhow!("no memory for a ring buffer of {size}: ask for a smaller one with --ring-size"))
}

/// Out of a program's `fdinfo` (`bpf_prog_show_fdinfo`, kernel/bpf/syscall.c at v5.12), which unlike
/// BPF_OBJ_GET_INFO_BY_FD takes no `unsafe`.
fn recursion_misses(fdinfo: &str) -> Option<u64> {
    fdinfo.lines().find_map(|line| line.strip_prefix("recursion_misses:")?.trim().parse().ok())
}

fn watch<T: AsRawFd>(readable: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: both that come here own their map's descriptor, answer with that one always, and close it only when
    // they are dropped.
    Ok(unsafe { AsyncFd::register_with_interest(readable, Interest::READABLE) }?)
}

fn take(ebpf: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    ebpf.take_map(name).with_context(|| format!("the eBPF object has no map {name}"))
}

/// Before v5.11 maps count against RLIMIT_MEMLOCK; later kernels don't care.
fn raise_memlock() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None }) {
        log::debug!("RLIMIT_MEMLOCK stays as it is: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misses_are_those_that_the_kernel_tells() {
        let since_5_12 = "pos:\t0\nprog_type:\t26\nrun_cnt:\t0\nrecursion_misses:\t41\nverified_insns:\t7\n";
        assert_eq!(recursion_misses(since_5_12), Some(41));
        assert_eq!(recursion_misses("pos:\t0\nprog_type:\t26\nrun_cnt:\t0\n"), None);
    }
}
