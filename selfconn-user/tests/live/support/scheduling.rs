//! On which CPU a thread of a test runs, and before which other threads.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The CPUs on which the calling thread may run.
pub(crate) fn allowed_cpus() -> Vec<usize> {
    let allowed = sched_getaffinity(None).unwrap();
    (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect()
}

/// The calling thread runs on this CPU only.
pub(crate) fn stay_on(cpu: usize) {
    let mut only = CpuSet::new();
    only.set(cpu);
    sched_setaffinity(None, &only).unwrap();
}

/// The calling thread preempts every thread without a real-time priority. False: the host does not allow it.
pub(crate) fn take_real_time_priority() -> bool {
    let parameters = libc::sched_param { sched_priority: 1 };
    // SAFETY: the kernel reads `parameters`.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const parameters) == 0 }
}
