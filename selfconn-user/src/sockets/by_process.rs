//! The descriptors of one process after another, for a host on which a pass over all descriptors takes too long: a user
//! has millions of them, or processes that share them. The next process is one of the owner whose processes have taken
//! the least time so far.

use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use selfconn_ebpf::{Owner, SocketDescriptor, owner::OWNER_CGROUP_LEVEL};

use crate::{
    bpf::descriptors::DescriptorIter,
    budget::{LeastSpent, owner_of_user},
    system::process,
};

/// How long one process may take. The kernel returns after a million descriptors at most, so it may be longer.
const MAX_VISIT: Duration = Duration::from_millis(50);

/// How long listing the processes may take. A list of 2,000 takes some 100 ms on 6.18.
const MAX_LIST: Duration = Duration::from_secs(1);

/// How long a list is used by [`Processes::LastListed`].
const LIST_AGE: Duration = Duration::from_mins(3);

/// An owner, the number of descriptors as far as the kernel says it, and the pid.
type Process = (Owner, u64, u32);

/// Which processes are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Processes {
    /// The processes in `/proc` at this time.
    Now,
    /// Those of the last such list, if there is one: for a thread that has no time to list them, or no capability, so
    /// that with `hidepid` `/proc` shows it no other user's processes.
    LastListed,
}

static LAST_LIST: Mutex<Option<(Instant, Arc<[Process]>)>> = Mutex::new(None);

/// Calls `each` for every record of the processes until `is_done`, or until this much time has passed. Returns true if
/// all processes were visited to their end.
///
/// # Errors
/// If the kernel can't make a pass over one process, as before Linux 6.1, or if `/proc` is of another pid namespace
/// than this process.
pub(super) fn pass(
    iter: &DescriptorIter,
    processes: Processes,
    limit: Duration,
    is_done: impl Fn() -> bool,
    mut each: impl FnMut(&SocketDescriptor),
) -> io::Result<bool> {
    let own = std::process::id();
    if fs::read_link("/proc/self")? != Path::new(&own.to_string()) {
        return Err(io::Error::other("/proc is of another pid namespace"));
    }
    // Before anything that takes long, because the kernel may not support it.
    iter.pass_of_process(own, Instant::now() + limit, &mut each)?;
    let (processes, is_whole) = match processes {
        Processes::Now => list(),
        // Without a list nothing is visited: whoever is missing in it would seem to hold nothing.
        Processes::LastListed => (last_list().unwrap_or_default(), false),
    };
    let visit = |pid, until| iter.pass_of_process(pid, until, &mut each);
    Ok(visit_all(processes.to_vec(), Instant::now() + limit, is_done, visit)? && is_whole)
}

fn visit_all(
    processes: Vec<Process>,
    until: Instant,
    is_done: impl Fn() -> bool,
    mut visit: impl FnMut(u32, Instant) -> io::Result<()>,
) -> io::Result<bool> {
    let (begin, count) = (Instant::now(), processes.len());
    let mut queue = LeastSpent::new(processes);
    let mut visited = 0;
    while !is_done() {
        let visit_begin = Instant::now();
        if visit_begin >= until {
            break;
        }
        let Some((owner, pid)) = queue.pop() else { break };
        match visit(pid, until.min(visit_begin + MAX_VISIT)) {
            Ok(()) => visited += 1,
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(error) => return Err(error),
        }
        queue.charge(owner, u64::try_from(visit_begin.elapsed().as_nanos()).unwrap_or(u64::MAX));
    }
    log::debug!("the descriptors of {visited} of {count} processes in {:?}", begin.elapsed());
    Ok(visited == count)
}

fn last_list() -> Option<Arc<[Process]>> {
    let last = LAST_LIST.lock().unwrap_or_else(PoisonError::into_inner).clone();
    last.filter(|(at, _)| at.elapsed() < LIST_AGE).map(|(_, processes)| processes)
}

/// The processes that `/proc` shows, and whether they are all of them.
fn list() -> (Arc<[Process]>, bool) {
    let begin = Instant::now();
    let mut cgroups = HashMap::new();
    let mut processes = Vec::new();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut is_readable = true;
    let is_whole = loop {
        let Some(pid) = pids.next() else { break true };
        if begin.elapsed() > MAX_LIST {
            break false;
        }
        let status = match fs::read(format!("/proc/{pid}/status")) {
            Ok(status) => status,
            // It has ended meanwhile, and holds nothing.
            Err(error) if process::is_gone(&error) => continue,
            Err(_) => {
                is_readable = false;
                continue;
            }
        };
        let group = fs::read(format!("/proc/{pid}/cgroup")).ok().and_then(|text| owner_group(&text));
        let next = cgroups.len() as u64 + 1;
        let group = group.map_or(0, |group| *cgroups.entry(group).or_insert(next));
        let owner = match (real_uid(&status), group) {
            (uid, 0) => owner_of_user(uid),
            (uid, group) => Owner::new(uid.unwrap_or(u32::MAX), group),
        };
        // From Linux 6.2 on this is the number of descriptors of the first thread (`proc_fd_getattr`, fs/proc/fd.c at
        // v6.2); before, it is 0.
        let descriptors = fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |folder| folder.len());
        processes.push((owner, descriptors, pid));
    };
    // With `hidepid` only those are shown that this process may trace. The first process is always there.
    let is_whole = is_whole && is_readable && processes.iter().any(|(.., pid)| *pid == 1);
    let processes: Arc<[Process]> = processes.into();
    *LAST_LIST.lock().unwrap_or_else(PoisonError::into_inner) = Some((begin, processes.clone()));
    (processes, is_whole)
}

/// Who started the process, also if it can't be traced: then the files below `/proc/PID` are root's. A process gives
/// itself any name, so the text may not be UTF-8.
fn real_uid(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Uid:"))?;
    str::from_utf8(line).ok()?.split_ascii_whitespace().next()?.parse().ok()
}

/// The control group of an owner, as in [`Owner`]: below its level users make groups as they like. `None`: the process
/// is in the root group, or the host does not have the unified hierarchy.
fn owner_group(text: &[u8]) -> Option<Vec<u8>> {
    let path = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
    let names = path.split(|byte| *byte == b'/').take(OWNER_CGROUP_LEVEL as usize);
    Some(names.collect::<Vec<_>>().join(&b'/')).filter(|group| !group.is_empty())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn the_real_user_is_read_whatever_the_name_is() {
        let status = b"Name:\t\xff\xfe\nUmask:\t0022\nUid:\t1000\t0\t0\t0\nGid:\t5\t5\t5\t5\n";
        assert_eq!(real_uid(status), Some(1_000));
        assert_eq!(real_uid(b"Name:\tUid: 3\n"), None);
    }

    #[test]
    fn a_group_that_a_user_can_make_is_none_of_its_own() {
        let group = |text: &str| owner_group(text.as_bytes()).map(|group| String::from_utf8(group).unwrap());
        for (text, expected) in [
            (
                "0::/user.slice/user-1000.slice/user@1000.service/a/b\n",
                Some("user.slice/user-1000.slice/user@1000.service"),
            ),
            ("1:name=systemd:/x\n0::/system.slice/ssh.service\n", Some("system.slice/ssh.service")),
            ("0::/\n", None),
            ("4:cpu:/a\n", None),
        ] {
            assert_eq!(group(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn this_process_is_listed_with_its_user_and_then_in_the_last_list() {
        let uid = rustix::process::getuid().as_raw();
        let is_own = |process: &&Process| process.2 == std::process::id();
        let (now, is_whole) = list();
        assert!(is_whole);
        assert_eq!(now.iter().find(is_own).unwrap().0.uid, uid);
        assert!(last_list().unwrap().iter().any(|process| is_own(&process)));
    }

    /// Visits these processes, each of which takes this long. Returns which were visited, in order, and whether all.
    fn visited(
        processes: Vec<Process>,
        limit: Duration,
        takes: impl Fn(u32) -> Duration,
    ) -> (Vec<u32>, bool) {
        let order = RefCell::new(Vec::new());
        let visit = |pid, until: Instant| {
            order.borrow_mut().push(pid);
            let left = until.saturating_duration_since(Instant::now());
            std::thread::sleep(takes(pid).min(left));
            if takes(pid) > left { Err(io::ErrorKind::TimedOut.into()) } else { Ok(()) }
        };
        let all = visit_all(processes, Instant::now() + limit, || false, visit).unwrap();
        (order.into_inner(), all)
    }

    #[test]
    fn processes_that_take_long_and_seem_to_have_nothing_hide_no_other_users() {
        let (hostile, victim) = (Owner::new(1_000, 0), Owner::new(0, 0));
        let processes = (1..=100).map(|pid| (hostile, 0, pid)).chain((101..=120).map(|pid| (victim, 9, pid)));
        let takes = |pid| if pid <= 100 { Duration::from_secs(1) } else { Duration::from_micros(100) };
        let (order, all) = visited(processes.collect(), Duration::from_millis(300), takes);
        assert_eq!((101..=120).filter(|pid| order.contains(pid)).count(), 20, "{order:?}");
        assert!(!all);
    }

    #[test]
    fn all_are_visited_if_there_is_time() {
        let processes = (1..=20).map(|pid| (Owner::new(pid, 0), 0, pid)).collect();
        let (order, all) = visited(processes, Duration::from_secs(60), |_| Duration::ZERO);
        assert_eq!((order.len(), all), (20, true));
    }
}
