//! What the kernel tells of a process: its memory, its time, and how often it woke.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};

/// Resident bytes: all, and without the mappings of BPF maps, whose pages the ring buffer has twice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory {
    pub(crate) all: u64,
    pub(crate) own: u64,
}

/// Reads `/proc/PID/smaps`.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (mut all, mut own, mut is_map) = (0, 0, false);
    for line in text.lines() {
        if let Some(rss) = line.strip_prefix("Rss:") {
            let bytes = 1024 * rss.trim().trim_end_matches(" kB").parse::<u64>()?;
            all += bytes;
            own += if is_map { 0 } else { bytes };
        } else if line.split_ascii_whitespace().next().is_some_and(|first| first.contains('-')) {
            is_map = line.contains("bpf-map");
        }
    }
    Ok(Memory { all, own })
}

/// Time on a CPU, of all threads that are there or have ended: its CPU-time clock (`clock_getcpuclockid(3)`). One of those
/// that look into network namespaces lives no longer than that.
pub(crate) fn on_cpu(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both write no more than what they are given.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    ensure!(!failed, "process {pid} has no clock: {}", std::io::Error::last_os_error());
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

/// How often its threads went to sleep, and so woke.
pub(crate) fn sleeps(pid: u32) -> Result<u64> {
    of_threads(pid, "status", |text| {
        let line = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        line.trim().parse().ok()
    })
}

fn of_threads(pid: u32, file: &str, number: impl Fn(&str) -> Option<u64>) -> Result<u64> {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task?.path().join(file)) else { continue };
        sum += number(&text).with_context(|| format!("{file} of process {pid} has another form"))?;
    }
    Ok(sum)
}
