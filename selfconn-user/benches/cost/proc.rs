//! Memory, CPU time and wake-ups of a process.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};

/// Resident bytes: all, and without BPF maps, because the ring buffer maps its pages twice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResidentMemory {
    pub(crate) all: u64,
    pub(crate) own: u64,
}

/// Reads `/proc/PID/smaps`.
pub(crate) fn memory(pid: u32) -> Result<ResidentMemory> {
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
    Ok(ResidentMemory { all, own })
}

/// CPU time of all threads, also of those that have ended (`clock_getcpuclockid(3)`): the daemon starts
/// short-lived threads to read network namespaces.
pub(crate) fn on_cpu(pid: u32) -> Result<Duration> {
    let mut clock = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both calls write only to the variables that they are given.
    let failed = unsafe {
        libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) != 0
            || libc::clock_gettime(clock, &raw mut time) != 0
    };
    ensure!(!failed, "process {pid} has no clock: {}", std::io::Error::last_os_error());
    Ok(Duration::new(time.tv_sec.try_into()?, time.tv_nsec.try_into()?))
}

/// How often its threads went to sleep, which is how often they woke.
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
