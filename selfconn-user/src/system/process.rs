//! Process attribution: information about a process from `/proc`. It is used only if the pid still belongs to
//! the process that the kernel observed.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    rc::Rc,
    sync::Arc,
};

use selfconn_ebpf::{Opener, Task};
use serde::Serialize;

use super::cgroup::{self, CgroupInfo};

/// Length of a clock tick in `/proc`: 1 / `USER_HZ`, a constant of the ABI on all of aya's architectures.
const TICK_NS: u64 = 1_000_000_000 / 100;

/// Maximum number of bytes of a command line that are read.
const CMDLINE_LIMIT: usize = 4_096;

/// How long information about a process is used without reading `/proc` again. A process that opens thousands
/// of self-connections a second is read only a few times.
const CACHE_TTL_NS: u64 = 100_000_000;

/// Information about a process from `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Name of the process.
    pub comm: Option<String>,
    /// Path of its executable.
    pub exe: Option<String>,
    /// Its arguments, at most 4,096 bytes in total.
    pub cmdline: Option<Vec<String>>,
    /// Path of its control group.
    pub cgroup: Option<String>,
    /// The systemd unit in the path of the control group.
    pub unit: Option<String>,
    /// The container id in the path of the control group.
    pub container: Option<String>,
    /// The uid of the Kubernetes pod in the path of the control group.
    pub pod: Option<String>,
    /// The control group that pays for the process.
    pub owner_cgroup: Option<Arc<str>>,
    /// True if `cmdline` has only a part of the arguments.
    pub is_cmdline_cut: bool,
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

impl Attribution {
    /// For a connection whose opener is known.
    #[must_use]
    pub fn from_opener(process: Rc<ProcessInfo>) -> Self {
        Self { process, holders: None }
    }

    /// For a connection whose opener is unknown: the processes that have it open.
    #[must_use]
    pub fn from_holders(holders: Option<Vec<Holder>>) -> Self {
        let first = holders.as_ref().and_then(|holders| holders.first());
        let process = first.and_then(|holder| read(holder.pid)).unwrap_or_default();
        Self { process: Rc::new(process), holders }
    }
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

/// Looks up processes in `/proc`, with a cache of one entry.
#[derive(Debug)]
pub struct Processes {
    /// True if the pids in `/proc` are those that the probes report.
    is_initial_pid_ns: bool,
    /// True if the start times in `/proc` are comparable with the probes' times: `/proc` shows them in the
    /// reader's time namespace (`do_task_stat`, fs/proc/array.c at v5.10).
    is_initial_time_ns: bool,
    cached: Option<CachedProcess>,
}

#[derive(Debug)]
struct CachedProcess {
    pid: u32,
    start_ns: u64,
    at_ns: u64,
    process: Rc<ProcessInfo>,
}

impl Processes {
    /// Outside the initial pid namespace nothing is looked up, because the same pid is another process there.
    #[must_use]
    pub fn new(is_initial_pid_ns: bool) -> Self {
        let is_initial_time_ns = match fs::read_link("/proc/self/ns/time") {
            // The kernel's inode number of the initial namespace: include/linux/proc_ns.h at v5.10.
            Ok(ns) => ns.as_os_str() == "time:[4026531834]",
            // A kernel without time namespaces.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        Self { is_initial_pid_ns, is_initial_time_ns, cached: None }
    }

    /// True if the pids in `/proc` are those in events.
    #[must_use]
    pub fn can_look_up(&self) -> bool {
        self.is_initial_pid_ns
    }

    /// Information about the process of an observed task, if its pid still belongs to it. `now_ns` is of
    /// `CLOCK_BOOTTIME`. The result is empty for a process that has exited.
    pub fn look_up(&mut self, observed: &ObservedTask, now_ns: u64) -> Rc<ProcessInfo> {
        match (self.is_initial_pid_ns, observed.start_ns) {
            (false, _) => Rc::default(),
            (true, 0) => self.look_up_by_thread(observed),
            (true, start_ns) => self.look_up_by_start_time(observed.task.pid, start_ns, now_ns),
        }
    }

    fn look_up_by_start_time(&mut self, pid: u32, start_ns: u64, now_ns: u64) -> Rc<ProcessInfo> {
        if let Some(cached) = &self.cached
            && (cached.pid, cached.start_ns) == (pid, start_ns)
            && now_ns.saturating_sub(cached.at_ns) < CACHE_TTL_NS
        {
            return Rc::clone(&cached.process);
        }
        let is_same_process = |start_ticks| start_ticks == start_ns / TICK_NS;
        let process = match (read_if(pid, is_same_process), self.cached.take()) {
            (Some(process), _) => Rc::new(process),
            // The process has exited, and the cached information is still true.
            (None, Some(cached)) if (cached.pid, cached.start_ns) == (pid, start_ns) => cached.process,
            (None, _) => Rc::default(),
        };
        self.cached = Some(CachedProcess { pid, start_ns, at_ns: now_ns, process: Rc::clone(&process) });
        process
    }

    /// For a kernel that does not provide the start time. The result is not cached, because the proof of
    /// identity must be checked every time.
    fn look_up_by_thread(&self, observed: &ObservedTask) -> Rc<ProcessInfo> {
        let existed_when_observed =
            |start_ticks| self.is_initial_time_ns && observed.existed_when_observed(start_ticks);
        let process =
            read_if(observed.task.pid, existed_when_observed).filter(|_| observed.has_same_thread());
        process.map(Rc::new).unwrap_or_default()
    }
}

/// True if this process is in the initial pid namespace: the pids in `/proc` are those that the probes
/// report.
#[must_use]
pub fn is_in_initial_pid_ns() -> bool {
    // The kernel's inode number of the initial namespace: include/linux/proc_ns.h at v5.10.
    fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == "pid:[4026531836]")
}

/// Information about the process that has this pid now.
#[must_use]
pub fn read(pid: u32) -> Option<ProcessInfo> {
    read_if(pid, |_| true)
}

/// Information about the process that has this pid now, if `start_matches` accepts its start time in clock
/// ticks.
fn read_if(pid: u32, start_matches: impl Fn(u64) -> bool) -> Option<ProcessInfo> {
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let exe = fs::read_link(file("exe")).ok().map(|path| lossy(path.as_os_str().as_bytes()));
    let mut cmdline = Vec::new();
    let _ = fs::File::open(file("cmdline"))
        .and_then(|file| file.take(CMDLINE_LIMIT as u64 + 1).read_to_end(&mut cmdline));
    let is_cmdline_cut = cmdline.len() > CMDLINE_LIMIT;
    cmdline.truncate(CMDLINE_LIMIT);
    let cgroup_text = fs::read(file("cgroup")).map(|text| lossy(&text)).unwrap_or_default();
    let cgroup = cgroup::path(&cgroup_text);
    let cgroup_info = cgroup.map_or_else(CgroupInfo::default, |(hierarchy, path)| {
        CgroupInfo::new(&cgroup::components(hierarchy, path))
    });
    // The start time is read last, because it proves which process the other files belonged to.
    let stat = lossy(&fs::read(file("stat")).ok()?);
    let (comm, start_ticks) = parse_stat(&stat)?;
    if !start_matches(start_ticks) {
        return None;
    }
    Some(ProcessInfo {
        comm: Some(comm.to_owned()),
        exe,
        cmdline: arguments(&cmdline),
        unit: cgroup_info.unit,
        container: cgroup_info.container,
        pod: cgroup_info.pod,
        owner_cgroup: cgroup_info.owner.map(Arc::from),
        is_cmdline_cut,
        cgroup: cgroup.map(|(_, path)| path.to_owned()),
    })
}

/// Runs every parser of this module on arbitrary bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let text = lossy(bytes);
    let _ = (parse_stat(&text), arguments(bytes));
    cgroup::parse_anything(&text);
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Start time of the process that has this pid now: nanoseconds of `CLOCK_BOOTTIME`, rounded to the clock
/// tick.
#[must_use]
pub fn start_time_ns(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&String::from_utf8_lossy(&stat)).map(|(_, start_ticks)| start_ticks.saturating_mul(TICK_NS))
}

/// Name, and start time in clock ticks since boot, from the text of `/proc/PID/stat`. The name may contain
/// any character, including blanks and parentheses. It therefore ends at the last closing parenthesis.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    let start = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().nth(19)?;
    Some((name, start.parse().ok()?))
}

/// The arguments in `/proc/PID/cmdline`. `None`: a kernel thread, or an exiting process.
fn arguments(cmdline: &[u8]) -> Option<Vec<String>> {
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    (!cmdline.is_empty()).then(|| cmdline.split(|byte| *byte == 0).map(lossy).collect())
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
        let process = read(pid).unwrap();
        assert_eq!(process.comm.as_deref(), Some(comm));
        assert_eq!(process.exe, std::env::current_exe().ok().map(|path| path.to_string_lossy().into_owned()));
        assert_eq!(process.cmdline.as_deref().unwrap(), std::env::args().collect::<Vec<_>>());
        assert_eq!(read(u32::MAX), None);

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
            let observed = ObservedTask { task, start_ns, at_ns };
            let mut processes = Processes::new(true);
            for time in ["first", "again"] {
                let expected = if is_same_process { process.clone() } else { ProcessInfo::default() };
                assert_eq!(*processes.look_up(&observed, 1), expected, "{what}, {time}");
            }
            assert_eq!(
                *Processes::new(false).look_up(&observed, 1),
                ProcessInfo::default(),
                "{what}, in another pid namespace"
            );
            let mut shifted = Processes { is_initial_time_ns: false, ..Processes::new(true) };
            let expected = if start_ns == start * TICK_NS { process.clone() } else { ProcessInfo::default() };
            assert_eq!(*shifted.look_up(&observed, 1), expected, "{what}, in another time namespace");
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

    #[test]
    fn cached_info_outlives_the_process_if_its_start_time_is_known() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let mut comm = [0; 16];
        comm[..5].copy_from_slice(b"sleep");
        let task = Task { pid, tid: pid, comm, leader: comm };
        let start_ns = start_time_ns(pid).unwrap();
        let known = ObservedTask { task, start_ns, at_ns: start_ns };
        let unknown = ObservedTask { task, start_ns: 0, at_ns: start_ns + TICK_NS };
        let mut processes = Processes::new(true);
        // `spawn` returns after the execve().
        for observed in [&known, &unknown] {
            assert_eq!(processes.look_up(observed, 1).comm.as_deref(), Some("sleep"), "{observed:?}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for now_ns in [2, 2 * CACHE_TTL_NS, 4 * CACHE_TTL_NS] {
            assert_eq!(processes.look_up(&known, now_ns).comm.as_deref(), Some("sleep"), "at {now_ns}");
            assert_eq!(*processes.look_up(&unknown, now_ns), ProcessInfo::default(), "at {now_ns}");
        }
        let later = ObservedTask { start_ns: start_ns + TICK_NS, ..known };
        assert_eq!(*processes.look_up(&later, 5 * CACHE_TTL_NS), ProcessInfo::default());
    }

    #[test]
    fn arguments_are_separated_by_nuls() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"\0", None),
            (b"sh\0-c\0a b\0", Some(vec!["sh", "-c", "a b"])),
            (b"sh\0\0x\0", Some(vec!["sh", "", "x"])),
            (b"renamed by itself", Some(vec!["renamed by itself"])),
            (b"\xff\n\0", Some(vec!["\u{fffd}\n"])),
        ] {
            let expected: Option<Vec<String>> =
                expected.map(|args| args.into_iter().map(str::to_owned).collect());
            assert_eq!(arguments(bytes), expected);
        }
    }
}
