//! A thread that is preempted within calls of `bpf()` about a map. Until such a call ends, the kernel runs no program of
//! a perf event, kprobe or, before Linux 7.2, system call on that CPU (`bpf_disable_instrumentation`, include/linux/bpf.h
//! at v6.12; `trace_call_bpf`, kernel/trace/bpf_trace.c).

use std::{
    io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
};

use rustix::{
    process::{Resource, Rlimit, setrlimit},
    thread::{CpuSet, sched_getaffinity, sched_setaffinity},
};

/// Bytes of the value of the map. The kernel copies it within the call while it runs no other program.
const VALUE_BYTES: u32 = 1 << 20;

/// A map of one value.
struct LargeMap(OwnedFd);

impl LargeMap {
    fn new() -> io::Result<Self> {
        const BPF_MAP_CREATE: libc::c_int = 0;
        const BPF_MAP_TYPE_ARRAY: u32 = 2;
        // Before Linux 5.11 a map counts as locked memory. Where the limit can't be raised, it doesn't matter, or the map
        // can't be made.
        let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
        // Type, bytes of a key and of a value, and number of entries.
        let mut attributes = [BPF_MAP_TYPE_ARRAY, 4, VALUE_BYTES, 1];
        // SAFETY: the kernel reads this many bytes of `attributes`.
        let created = unsafe {
            libc::syscall(libc::SYS_bpf, BPF_MAP_CREATE, attributes.as_mut_ptr(), size_of_val(&attributes))
        };
        match libc::c_int::try_from(created) {
            // SAFETY: the kernel has just returned this descriptor, so nothing else owns it.
            Ok(created) if created >= 0 => Ok(Self(unsafe { OwnedFd::from_raw_fd(created) })),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads the value, again and again.
    fn read_until(&self, is_over: &AtomicBool) {
        const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
        let key = 0_u32;
        let mut value = vec![0_u8; VALUE_BYTES as usize];
        // The map, and the addresses of the key and of the value.
        let mut attributes = [
            u64::from(self.0.as_raw_fd().cast_unsigned()),
            (&raw const key).expose_provenance() as u64,
            value.as_mut_ptr().expose_provenance() as u64,
        ];
        while !is_over.load(Relaxed) {
            // SAFETY: the kernel reads `attributes` and the key, and writes a value of the map, which is as long as
            // `value`.
            let outcome = unsafe {
                libc::syscall(
                    libc::SYS_bpf,
                    BPF_MAP_LOOKUP_ELEM,
                    attributes.as_mut_ptr(),
                    size_of_val(&attributes),
                )
            };
            assert_eq!(outcome, 0, "{}", io::Error::last_os_error());
        }
    }
}

/// The calling thread runs on the first CPU only.
fn stay_on_first_cpu() {
    let allowed = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap();
    let mut only = CpuSet::new();
    only.set(first);
    sched_setaffinity(None, &only).unwrap();
}

/// The calling thread preempts every thread without a real-time priority. False: the host does not allow it.
fn take_real_time_priority() -> bool {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads `parameters`.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) == 0 }
}

/// Runs this in a thread that preempts another one, which calls `bpf()` all the time on the same CPU. False beside its
/// result: the host allows no real-time priority, so the thread preempts the other one only now and then.
pub(crate) fn preempting_calls_of_bpf<T: Send>(run: impl FnOnce() -> T + Send) -> (T, bool) {
    let map = LargeMap::new().unwrap();
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            stay_on_first_cpu();
            map.read_until(&is_over);
        });
        let preempting = scope.spawn(|| {
            stay_on_first_cpu();
            let is_real_time_thread = take_real_time_priority();
            (run(), is_real_time_thread)
        });
        let outcome = preempting.join();
        is_over.store(true, Relaxed);
        outcome.unwrap()
    })
}
