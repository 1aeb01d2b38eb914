//! The `process_*` metrics of this process, with the names of Prometheus's client libraries.

use std::fs;

use prometheus::proto::MetricFamily;
use rustix::{
    process::{Resource, getrlimit},
    time::{ClockId, clock_gettime},
};

use super::Family;
use crate::system::{clock::Offset, process};

/// The families whose values are known. Values come from `/proc` and system calls.
pub(super) fn families() -> Vec<MetricFamily> {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let started = process::start_time_ns(std::process::id()).map(|at_ns| Offset::now().wall(at_ns));
    [
        Family::counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.")
            .value_f64(Some(seconds(i128::from(cpu.tv_sec) * NS_PER_SECOND + i128::from(cpu.tv_nsec)))),
        Family::gauge("process_open_fds", "Number of open file descriptors.")
            // The descriptor of the directory itself is not counted.
            .value(fs::read_dir("/proc/self/fd").ok().map(|fds| (fds.count() as u64).saturating_sub(1))),
        Family::gauge("process_max_fds", "Maximum number of open file descriptors.")
            .value(getrlimit(Resource::Nofile).current),
        Family::gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.")
            .value(field(&status, "VmSize").map(|kibibytes| kibibytes << 10)),
        Family::gauge("process_resident_memory_bytes", "Resident memory size in bytes.")
            .value(field(&status, "VmRSS").map(|kibibytes| kibibytes << 10)),
        Family::gauge("process_threads", "Number of OS threads in the process.")
            .value(field(&status, "Threads")),
        Family::gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.")
            .value_f64(started.map(|at| seconds(at.as_nanosecond()))),
    ]
    .into_iter()
    .filter_map(Family::finish)
    .collect()
}

const NS_PER_SECOND: i128 = 1_000_000_000;

#[expect(clippy::cast_precision_loss, reason = "Prometheus has floating-point numbers only")]
fn seconds(nanoseconds: i128) -> f64 {
    nanoseconds as f64 / NS_PER_SECOND as f64
}

/// The number in a line such as `VmRSS:  1234 kB`.
fn field(status: &str, name: &str) -> Option<u64> {
    let rest = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_matches_only_its_whole_name() {
        let status = "VmSize:\t   12 kB\nVmRSS:\t 3456 kB\nRssAnon:\t 1 kB\nThreads:\t2\nVmLck:\t- kB\n";
        for (name, value) in
            [("VmRSS", Some(3456)), ("Threads", Some(2)), ("Vm", None), ("VmLck", None), ("VmSwap", None)]
        {
            assert_eq!(field(status, name), value, "{name}");
        }
    }

    #[test]
    fn every_process_metric_has_a_positive_value() {
        let families = families();
        assert_eq!(families.len(), 7);
        for family in families {
            let metric = &family.get_metric()[0];
            let value = metric.get_counter().get_value().max(metric.get_gauge().get_value());
            assert!(value > 0.0, "{}", family.name());
        }
    }
}
