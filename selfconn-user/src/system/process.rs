//! Process attribution: information about a process from `/proc`. It is used only if the pid still belongs to
//! the process that the kernel observed. `crate::lookup` decides which thread reads it.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    rc::Rc,
    sync::Arc,
};

use selfconn_ebpf::{Opener, Task};
use serde::Serialize;

use super::{
    cgroup::{self, CgroupInfo},
    command_line::CommandLine,
};

/// Length of a clock tick in `/proc`: 1 / `USER_HZ`, a constant of the ABI on all of aya's architectures.
const TICK_NS: u64 = 1_000_000_000 / 100;

/// Maximum number of bytes of a command line that are read.
const CMDLINE_LIMIT: usize = 4_096;

/// Information about a process from `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Name of the process.
    pub comm: Option<String>,
    /// Path of its executable.
    pub exe: Option<Arc<str>>,
    /// Its arguments, read from at most 4,096 bytes.
    pub cmdline: Option<Arc<CommandLine>>,
    /// Path of its control group.
    pub cgroup: Option<Arc<str>>,
    /// The systemd unit in the path of the control group.
    pub unit: Option<Arc<str>>,
    /// The container id in the path of the control group.
    pub container: Option<Arc<str>>,
    /// The uid of the Kubernetes pod in the path of the control group.
    pub pod: Option<Arc<str>>,
    /// The control group that pays for the process.
    pub owner_cgroup: Option<Arc<str>>,
}

impl ProcessInfo {
    /// Bytes of memory, all texts included.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        // Of a text: the reference counts, and what the allocator adds.
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |text| text.len() + 32);
        let Self { comm, exe, cmdline, cgroup, unit, container, pod, owner_cgroup } = self;
        size_of::<Self>()
            + comm.as_ref().map_or(0, |comm| comm.capacity() + 16)
            + cmdline.as_ref().map_or(0, |cmdline| cmdline.kept_bytes() + 64)
            + [exe, cgroup, unit, container, pod, owner_cgroup].into_iter().map(text).sum::<usize>()
    }

    /// The same with these arguments.
    #[must_use]
    pub fn with_cmdline(mut self, cmdline: Option<CommandLine>) -> Self {
        self.cmdline = cmdline.map(Arc::new);
        self
    }
}

/// The process behind a connection, in addition to what the kernel recorded about its opener.
#[derive(Clone, Debug, Default)]
pub struct Attribution {
    /// The opener's process. If the opener is unknown, the first holder's.
    pub process: Rc<ProcessInfo>,
    /// The processes that have the socket open. `None`: not looked up.
    pub holders: Option<Vec<Holder>>,
}

/// A process that has a socket open, or that closed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Pid in the initial pid namespace.
    pub pid: u32,
    /// Name of the process.
    pub comm: Option<String>,
}

/// A task that the kernel observed in an action, such as connect(). Times are of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug)]
pub struct ObservedTask {
    pub task: Task,
    /// When its process started, in nanoseconds. 0: the kernel does not provide it.
    pub start_ns: u64,
    /// When it was observed, in nanoseconds.
    pub at_ns: u64,
}

impl ObservedTask {
    /// The task that opened a connection.
    #[must_use]
    pub const fn from_opener(opener: &Opener) -> Self {
        Self { task: opener.task, start_ns: opener.start_ns, at_ns: opener.at_ns }
    }

    /// True if the process with this pid started before the observation, so the pid cannot have been reused
    /// since: of two processes that have the same pid one after the other, the later one starts after the
    /// earlier one was observed.
    const fn existed_when_observed(&self, start_ticks: u64) -> bool {
        start_ticks.saturating_add(1).saturating_mul(TICK_NS) <= self.at_ns
    }

    /// True if the thread still exists and still has the same name. After an execve() only the main thread is
    /// left, and it has the name of the new program.
    fn has_same_thread(&self) -> bool {
        let Task { pid, tid, ref comm, .. } = self.task;
        let len = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
        let name = fs::read(format!("/proc/{pid}/task/{tid}/comm"));
        name.is_ok_and(|name| name.strip_suffix(b"\n") == Some(&comm[..len]))
    }
}

/// What a look-up has to prove about the process that has a pid now.
#[derive(Clone, Copy, Debug)]
pub enum ProcessProof {
    /// It is the process of this task.
    Observed(ObservedTask),
    /// It started at this time, in clock ticks since boot.
    Started(u64),
    /// Nothing: the process that has the pid now is wanted.
    None,
}

/// What can be read of a process without waiting for it: `exe`, control group, name and start time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    /// All but `cmdline`.
    pub info: ProcessInfo,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
    /// Effective user id, or 0 if the process does not show its memory.
    pub uid: u32,
}

impl ProcessProof {
    /// `is_initial_time_ns`: the start times in `/proc` are comparable with the probes' times.
    fn accepts(&self, start_ticks: u64, is_initial_time_ns: bool) -> bool {
        match self {
            Self::None => true,
            Self::Started(expected_ticks) => start_ticks == *expected_ticks,
            Self::Observed(observed) if observed.start_ns == 0 => {
                is_initial_time_ns
                    && observed.existed_when_observed(start_ticks)
                    && observed.has_same_thread()
            }
            Self::Observed(observed) => start_ticks == start_ticks_of(observed.start_ns),
        }
    }
}

/// A start time of the kernel in clock ticks, as `/proc` has it.
#[must_use]
pub const fn start_ticks_of(start_ns: u64) -> u64 {
    start_ns / TICK_NS
}

/// True if this process is in the initial time namespace: `/proc` shows start times in the reader's time
/// namespace (`do_task_stat`, fs/proc/array.c at v5.10).
#[must_use]
pub fn is_in_initial_time_ns() -> bool {
    match fs::read_link("/proc/self/ns/time") {
        // The kernel's inode number of the initial namespace: include/linux/proc_ns.h at v5.10.
        Ok(ns) => ns.as_os_str() == "time:[4026531834]",
        // A kernel without time namespaces.
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// True if this process is in the initial pid namespace: the pids in `/proc` are those that the probes
/// report.
#[must_use]
pub fn is_in_initial_pid_ns() -> bool {
    // The kernel's inode number of the initial namespace: include/linux/proc_ns.h at v5.10.
    fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == "pid:[4026531836]")
}

/// Reads what does not depend on the process's memory. None of these files waits for the process:
/// `proc_exe_link`, `proc_cgroup_show` and `do_task_stat` do not take its `mmap_lock` (fs/proc at v6.12).
#[must_use]
pub fn read_facts(pid: u32, proof: &ProcessProof, is_initial_time_ns: bool) -> Option<ProcessFacts> {
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let exe = fs::read_link(file("exe")).ok().map(|path| lossy(path.as_os_str().as_bytes()).into());
    let cgroup_text = fs::read(file("cgroup")).map(|text| lossy(&text)).unwrap_or_default();
    let cgroup = cgroup::path(&cgroup_text);
    let cgroup_info = cgroup.map_or_else(CgroupInfo::default, |(hierarchy, path)| {
        CgroupInfo::new(&cgroup::components(hierarchy, path))
    });
    let uid = fs::metadata(file("")).map_or(0, |folder| folder.uid());
    // The start time is read last, because it proves which process the other files belonged to.
    let (comm, start_ticks) = read_stat(pid)?;
    if !proof.accepts(start_ticks, is_initial_time_ns) {
        return None;
    }
    let info = ProcessInfo {
        comm: Some(comm),
        exe,
        cmdline: None,
        unit: cgroup_info.unit.map(Arc::from),
        container: cgroup_info.container.map(Arc::from),
        pod: cgroup_info.pod.map(Arc::from),
        owner_cgroup: cgroup_info.owner.map(Arc::from),
        cgroup: cgroup.map(|(_, path)| path.into()),
    };
    Some(ProcessFacts { info, start_ticks, uid })
}

/// Reads the arguments of the process that started at this time. This waits for the process's `mmap_lock`
/// (`get_mm_cmdline`, fs/proc/base.c at v6.12), which the process can hold forever. Only SIGKILL ends the
/// wait.
#[must_use]
pub fn read_cmdline(pid: u32, start_ticks: u64) -> Option<CommandLine> {
    let mut cmdline = Vec::new();
    let file = fs::File::open(format!("/proc/{pid}/cmdline")).ok()?;
    file.take(CMDLINE_LIMIT as u64 + 1).read_to_end(&mut cmdline).ok()?;
    let is_cut = cmdline.len() > CMDLINE_LIMIT;
    cmdline.truncate(CMDLINE_LIMIT);
    let (_, start_ticks_now) = read_stat(pid)?;
    (start_ticks_now == start_ticks).then(|| CommandLine::parse(&cmdline, is_cut)).flatten()
}

/// Name, and start time in clock ticks since boot.
fn read_stat(pid: u32) -> Option<(String, u64)> {
    let stat = lossy(&fs::read(format!("/proc/{pid}/stat")).ok()?);
    parse_stat(&stat).map(|(comm, start_ticks)| (comm.to_owned(), start_ticks))
}

/// Runs every parser of this module on arbitrary bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let text = lossy(bytes);
    let _ = (parse_stat(&text), CommandLine::parse(bytes, false));
    cgroup::parse_anything(&text);
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Start time of the process that has this pid now: nanoseconds of `CLOCK_BOOTTIME`, rounded to the clock
/// tick.
#[must_use]
pub fn start_time_ns(pid: u32) -> Option<u64> {
    read_stat(pid).map(|(_, start_ticks)| start_ticks.saturating_mul(TICK_NS))
}

/// Name, and start time in clock ticks since boot, from the text of `/proc/PID/stat`. The name may contain
/// any character, including blanks and parentheses. It therefore ends at the last closing parenthesis.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    let start = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().nth(19)?;
    Some((name, start.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_may_contain_any_character() {
        let rest = "S 1 2 2 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0";
        for name in ["sh", "a b", "(sd-pam)", ") 1 2 (", "", "a) S 1", "\n{\"event\":\"fake\"}"] {
            assert_eq!(parse_stat(&format!("42 ({name}) {rest}")), Some((name, 4711)), "{name:?}");
        }
        for broken in ["", "42", "42 (", "42 )(", "42 (sh) S 1"] {
            assert_eq!(parse_stat(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_reused_pid_yields_no_process_info() {
        let pid = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (comm, start) = parse_stat(&stat).unwrap();
        let ticks = ProcessProof::Started(start);
        let facts = read_facts(pid, &ticks, true).unwrap();
        assert_eq!(facts.info.comm.as_deref(), Some(comm));
        let exe = std::env::current_exe().ok().map(|path| path.to_string_lossy().into());
        assert_eq!((facts.info.exe, facts.start_ticks), (exe, start));
        assert_eq!(
            read_cmdline(pid, start).unwrap().arguments().collect::<Vec<_>>(),
            std::env::args().collect::<Vec<_>>()
        );
        assert_eq!(read_cmdline(pid, start + 1), None, "another process");
        assert_eq!(read_facts(u32::MAX, &ProcessProof::None, true), None);

        let start_ns = start * TICK_NS;
        let (task, mut renamed) = (this_task(), this_task());
        renamed.comm[0] ^= 1;
        let elsewhere = Task { tid: 1, ..task };
        for (what, task, start_ns, at_ns, is_same_process) in [
            ("same start time", task, start_ns, 0, true),
            ("another process with another start time", task, start_ns + TICK_NS, 0, false),
            ("started before the observation", task, 0, start_ns + TICK_NS, true),
            ("may have started after it, in the same tick", task, 0, start_ns + TICK_NS - 1, false),
            ("started after the observation", task, 0, start_ns, false),
            ("the thread has another name now", renamed, 0, start_ns + TICK_NS, false),
            ("the thread has exited", elsewhere, 0, start_ns + TICK_NS, false),
            ("neither time is known", task, 0, 0, false),
        ] {
            let proof = ProcessProof::Observed(ObservedTask { task, start_ns, at_ns });
            assert_eq!(read_facts(pid, &proof, true).is_some(), is_same_process, "{what}");
            let is_shifted = start_ns == 0;
            let expected = is_same_process && !is_shifted;
            assert_eq!(
                read_facts(pid, &proof, false).is_some(),
                expected,
                "{what}, in another time namespace"
            );
        }
    }

    /// This thread as the kernel records it.
    fn this_task() -> Task {
        let mut comm = [0; 16];
        let name = fs::read("/proc/thread-self/comm").unwrap();
        comm[..name.len() - 1].copy_from_slice(&name[..name.len() - 1]);
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        Task { pid: std::process::id(), tid, comm, leader: [0; 16] }
    }
}
