//! Information about a process from `/proc`. It is used only if the pid still belongs to the process that the kernel
//! observed. `crate::lookup` decides which thread reads it.

use std::{
    fs,
    io::{self, Read as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    },
    path::Path,
    sync::Arc,
};

use selfconn_ebpf::{Opener, Task, bind_failure::BindFailure};

use super::{
    cgroup::{self, CgroupInfo},
    command_line::CommandLine,
    interrupt,
};
use stat::{Stat, memory_folder, read_stat};

mod attribution;
mod stat;
mod status;
mod tables;

pub use attribution::{Attribution, ClosedAttribution, Holder, Subject};
pub use stat::start_ticks_in_stat;
pub(crate) use status::{status_field, uids_in_status};
pub(crate) use tables::have_same_descriptors;

/// Length of a clock tick in `/proc`: 1 / `USER_HZ`, a constant of the ABI on all of aya's architectures.
const TICK_NS: u64 = 1_000_000_000 / 100;

/// Maximum number of bytes of a command line that are read.
pub(crate) const CMDLINE_LIMIT: usize = 4_096;

/// How often a path is looked up in the directory cache.
const CACHED_ATTEMPTS: usize = 3;

/// Information about a process from `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessInfo {
    /// Name of the process.
    pub comm: Option<String>,
    /// Path of its executable.
    pub exe: Option<Arc<str>>,
    /// True if the host has the same file at this path. A process in a mount namespace of its own can run any file at
    /// any path.
    pub is_exe_ours: bool,
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
    /// The user of the process, or a number that no user has if it is several (real, effective, saved and file system
    /// uid). `None`: it is not known, or the process was not looked up as a holder.
    pub uid: Option<u32>,
}

impl ProcessInfo {
    /// Bytes of memory, all texts included.
    #[must_use]
    pub fn kept_bytes(&self) -> usize {
        // Of a text: the reference counts, and what the allocator adds.
        let text = |text: &Option<Arc<str>>| text.as_ref().map_or(0, |text| text.len() + 32);
        let Self { comm, exe, is_exe_ours: _, cmdline, cgroup, unit, container, pod, owner_cgroup, uid: _ } =
            self;
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

/// A program that a process runs: it is another one after an execve().
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProcessKey {
    pub pid: u32,
    /// When the process started, in clock ticks since boot.
    pub start_ticks: u64,
    /// Where the process has its arguments: [`Opener::arg_start`]. 0: unknown, so it may be any program of the
    /// process.
    pub arg_start: u64,
}

/// A task that the kernel observed in an action, such as connect(). Times are of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug)]
pub struct ObservedTask {
    pub task: Task,
    /// When its process started, in nanoseconds. 0: the kernel does not provide it.
    pub start_ns: u64,
    /// Where its process had its arguments: [`Opener::arg_start`]. 0: the kernel does not provide it.
    pub arg_start: u64,
    /// When it was observed, in nanoseconds.
    pub at_ns: u64,
}

impl ObservedTask {
    /// The task that opened a connection.
    #[must_use]
    pub const fn from_opener(opener: &Opener) -> Self {
        let &Opener { task, start_ns, arg_start, at_ns, .. } = opener;
        Self { task, start_ns, arg_start: of_program(arg_start), at_ns }
    }

    /// The task that failed to bind.
    #[must_use]
    pub const fn from_bind_failure(failure: &BindFailure) -> Self {
        let &BindFailure { task, start_ns, arg_start, at_ns, .. } = failure;
        Self { task, start_ns, arg_start: of_program(arg_start), at_ns }
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

/// What can be read of a process without waiting for a lock of it: `exe`, control group, name and start time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessFacts {
    /// All but `cmdline`.
    pub info: ProcessInfo,
    /// Start time in clock ticks since boot.
    pub start_ticks: u64,
    /// Where the process has its arguments: [`Opener::arg_start`]. 0: not permitted, or it has no memory.
    pub arg_start: u64,
    /// False if the process was observed with another program, or this is not certain. `exe` is unknown then.
    pub is_same_program: bool,
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

    /// True if a process with its arguments at this address still runs the program of the observation.
    fn is_same_program(&self, arg_start: u64) -> bool {
        match self {
            Self::Observed(observed) => runs(arg_start, observed.arg_start),
            Self::Started(_) | Self::None => true,
        }
    }
}

/// Where a program has its arguments, as `/proc` shows it: 0 for a kernel thread.
const fn of_program(arg_start: u64) -> u64 {
    if arg_start == Opener::KERNEL_THREAD { 0 } else { arg_start }
}

/// True if a process with its arguments at this address runs the expected program: each execve() makes a new
/// stack at a random address. 0 as the expected address: it is unknown.
const fn runs(arg_start: u64, expected: u64) -> bool {
    expected == 0 || arg_start == expected
}

/// A start time of the kernel in clock ticks, as `/proc` has it.
#[must_use]
pub const fn start_ticks_of(start_ns: u64) -> u64 {
    start_ns / TICK_NS
}

/// True if a file in `/proc` can't be read because its process has ended.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH)
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

/// Reads all but the arguments. None of these files waits for a lock of the process: `proc_exe_link`,
/// `proc_cgroup_show`, `proc_pid_status` and `do_task_stat` do not take its `mmap_lock` (fs/proc at v6.12). But the
/// last two hold its memory. If the process ends in that moment, its memory is taken down here (`mmput`), and a mapping
/// of a FUSE file can make that last for ever (`fuse_vma_close`, fs/fuse/file.c at v6.12).
#[must_use]
pub fn read_facts(pid: u32, proof: &ProcessProof, is_initial_time_ns: bool) -> Option<ProcessFacts> {
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let folder = memory_folder(pid);
    let exe_path = fs::read_link(format!("{folder}/exe")).ok();
    let is_exe_ours = exe_path.as_deref().is_some_and(|path| is_hosts_file(&folder, path));
    let exe = exe_path.map(|path| lossy(path.as_os_str().as_bytes()).into());
    let cgroup_text = fs::read(file("cgroup")).map(|text| lossy(&text)).unwrap_or_default();
    let cgroup = cgroup::path(&cgroup_text);
    let cgroup_info = cgroup.map_or_else(CgroupInfo::default, |(hierarchy, path)| {
        CgroupInfo::new(&cgroup::components(hierarchy, path))
    });
    let uid = fs::metadata(file("")).map_or(0, |folder| folder.uid());
    let holder_uid = match proof {
        ProcessProof::Started(_) => read_file(&file("status")).ok().and_then(|text| status::only_uid(&text)),
        // The kernel has recorded the user of what it observed.
        ProcessProof::Observed(_) | ProcessProof::None => None,
    };
    // `stat` is read last, because it proves which process and program the other files belonged to: an execve()
    // replaces `exe` and `arg_start` together, with the memory of the process (`exec_mmap`, fs/exec.c at v5.10).
    let Stat { comm, start_ticks, arg_start } = read_stat(pid, &folder)?;
    if !proof.accepts(start_ticks, is_initial_time_ns) {
        return None;
    }
    let is_same_program = proof.is_same_program(arg_start);
    let info = ProcessInfo {
        comm: Some(comm),
        is_exe_ours: is_exe_ours && is_same_program,
        exe: exe.filter(|_| is_same_program),
        cmdline: None,
        unit: cgroup_info.unit.map(Arc::from),
        container: cgroup_info.container.map(Arc::from),
        pod: cgroup_info.pod.map(Arc::from),
        owner_cgroup: cgroup_info.owner.map(Arc::from),
        uid: holder_uid,
        cgroup: cgroup.map(|(_, path)| path.into()),
    };
    Some(ProcessFacts { info, start_ticks, arg_start, is_same_program, uid })
}

/// True if the file at this path of the host is the executable of the process: same device and inode.
///
/// Nothing here waits for a filesystem, which may be served by the process's own user: attributes come from the inode
/// (`AT_STATX_DONT_SYNC`; `fuse_update_get_attr`, fs/fuse/dir.c at v6.12), and the path is only followed through
/// the directory cache (`RESOLVE_CACHED`, from v5.12 on), which has a file that is in use.
/// `folder` is [`memory_folder`] of the process.
fn is_hosts_file(folder: &str, path: &Path) -> bool {
    use rustix::{
        fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat, openat2, statx},
        io::Errno,
    };
    let identity = |directory: BorrowedFd<'_>, path: &Path, flags: AtFlags| {
        let attributes = statx(directory, path, flags | AtFlags::STATX_DONT_SYNC, StatxFlags::INO)?;
        Ok::<_, Errno>((attributes.stx_dev_major, attributes.stx_dev_minor, attributes.stx_ino))
    };
    let link = format!("{folder}/exe");
    let Ok(executable) = identity(CWD, Path::new(&link), AtFlags::empty()) else { return false };
    // The host is what the first process sees. A service manager may hide a part of it from this process.
    let directory = OFlags::PATH | OFlags::CLOEXEC;
    let root =
        ["/proc/1/root", "/"].into_iter().find_map(|root| openat(CWD, root, directory, Mode::empty()).ok());
    let Some(root) = root else { return false };
    let resolve = ResolveFlags::CACHED | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    // A rename elsewhere makes an attempt fail.
    for _ in 0..CACHED_ATTEMPTS {
        match openat2(&root, path, directory, Mode::empty(), resolve) {
            Ok(file) => {
                return identity(file.as_fd(), Path::new(""), AtFlags::EMPTY_PATH) == Ok(executable);
            }
            Err(Errno::AGAIN) => {}
            // Not followed, because this kernel or a filter of system calls does not know it, or because a directory is
            // closed to us: the path is right if the process has the host's mount namespace.
            Err(Errno::INVAL | Errno::NOSYS | Errno::PERM | Errno::ACCESS) => {
                let mounts = |folder: &str| fs::read_link(format!("{folder}/ns/mnt")).ok();
                return mounts(folder).is_some_and(|theirs| mounts("/proc/1") == Some(theirs))
                    && !path.as_os_str().as_bytes().ends_with(b" (deleted)");
            }
            Err(_) => return false,
        }
    }
    false
}

/// Reads the arguments of this program of a process. This waits for the process's `mmap_lock`
/// (`get_mm_cmdline`, fs/proc/base.c at v6.12), which the process can hold forever. Only SIGKILL ends the
/// wait.
#[must_use]
pub fn read_cmdline(key: ProcessKey) -> Option<CommandLine> {
    let ProcessKey { pid, start_ticks, arg_start } = key;
    let mut cmdline = Vec::new();
    let folder = memory_folder(pid);
    let file = fs::File::open(format!("{folder}/cmdline")).ok()?;
    let read = || file.take(CMDLINE_LIMIT as u64 + 1).read_to_end(&mut cmdline);
    interrupt::bounded(read).ok()?;
    let is_cut = cmdline.len() > CMDLINE_LIMIT;
    cmdline.truncate(CMDLINE_LIMIT);
    let now = read_stat(pid, &folder)?;
    let is_same = now.start_ticks == start_ticks && runs(now.arg_start, arg_start);
    is_same.then(|| CommandLine::parse(&cmdline, is_cut)).flatten()
}

/// Reads a file in `/proc` that holds the memory of its process for a moment: `stat` or `status`.
pub(crate) fn read_file(path: &str) -> io::Result<Vec<u8>> {
    interrupt::bounded(|| fs::read(path))
}

/// Runs every parser of this module on arbitrary bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let text = lossy(bytes);
    let _ = (start_ticks_in_stat(bytes), CommandLine::parse(bytes, false));
    cgroup::parse_anything(&text);
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Start time of the process that has this pid now, in clock ticks since boot.
#[must_use]
pub fn start_ticks(pid: u32) -> Option<u64> {
    start_ticks_in_stat(&read_file(&format!("/proc/{pid}/stat")).ok()?)
}

/// The inode of this process's pid namespace.
#[must_use]
pub fn pid_ns_inode() -> Option<u64> {
    fs::metadata("/proc/self/ns/pid").ok().map(|namespace| namespace.ino())
}

/// Start time of the process that has this pid now: nanoseconds of `CLOCK_BOOTTIME`, rounded to the clock
/// tick.
#[must_use]
pub fn start_time_ns(pid: u32) -> Option<u64> {
    read_stat(pid, &format!("/proc/{pid}")).map(|stat| stat.start_ticks.saturating_mul(TICK_NS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_pid_yields_no_process_info() {
        let pid = std::process::id();
        let Stat { comm, start_ticks: start, arg_start } = read_stat(pid, &memory_folder(pid)).unwrap();
        let ticks = ProcessProof::Started(start);
        let facts = read_facts(pid, &ticks, true).unwrap();
        assert_eq!(facts.info.comm, Some(comm));
        let exe = std::env::current_exe().ok().map(|path| path.to_string_lossy().into());
        assert!(facts.info.is_exe_ours, "{facts:?}");
        assert_eq!(facts.info.uid, Some(rustix::process::getuid().as_raw()), "a holder's user");
        assert_eq!((facts.info.exe, facts.start_ticks), (exe, start));
        for (start_ticks, arg_start, is_same) in [
            (start, arg_start, true),
            (start, 0, true),
            (start + 1, arg_start, false),
            (start, arg_start + 1, false),
        ] {
            let cmdline = read_cmdline(ProcessKey { pid, start_ticks, arg_start });
            let expected = is_same.then(|| std::env::args().collect::<Vec<_>>());
            let arguments = cmdline.map(|cmdline| cmdline.arguments().map(str::to_owned).collect::<Vec<_>>());
            assert_eq!(arguments, expected);
        }
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
            let proof = ProcessProof::Observed(ObservedTask { task, start_ns, arg_start: 0, at_ns });
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

    #[test]
    fn another_program_of_the_process_has_no_exe_and_the_rest_is_the_process_s() {
        let pid = std::process::id();
        let Stat { start_ticks, arg_start, .. } = read_stat(pid, &memory_folder(pid)).unwrap();
        assert_ne!(arg_start, 0, "a process may read its own");
        let observed = |arg_start| {
            let (task, start_ns) = (this_task(), start_ticks * TICK_NS);
            let proof = ProcessProof::Observed(ObservedTask { task, start_ns, arg_start, at_ns: start_ns });
            read_facts(pid, &proof, true).unwrap()
        };
        let same = observed(arg_start);
        assert!(same.is_same_program && same.info.exe.is_some(), "{same:?}");
        assert_eq!(observed(0), same, "the kernel does not provide it");
        let other = observed(arg_start + 1);
        assert!(!other.is_same_program, "{other:?}");
        assert_eq!(other.info, ProcessInfo { exe: None, is_exe_ours: false, ..same.info });
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
