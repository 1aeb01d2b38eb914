//! The processes in `/proc`, with their owners and the sizes of their descriptor tables: which of them may be visited,
//! and whether a pass over all may be made. Owners take turns in making the list, by the time that their processes
//! take.

use std::{
    collections::HashMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    io,
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use selfconn_ebpf::{Owner, owner::OWNER_CGROUP_LEVEL};

use super::{
    netns_owner::{OutermostUserns, outermost_userns_at},
    walk_cost::{self, WalkCost},
};
use crate::{
    bpf::descriptors::DescriptorIter,
    budget::{LeastSpent, owner_of_user},
    system::process,
};

/// How long listing the processes may take. A list of 2,000 takes some 100 ms on 6.18.
const MAX_LIST: Duration = Duration::from_secs(1);

/// How long looking at the threads of one process may take. A process makes its files slow by many groups.
const MAX_SAMPLING: Duration = Duration::from_millis(100);

/// How long what is known of a process is used by [`last_list`], and by a list that has no time to read it again.
const LIST_AGE: Duration = Duration::from_mins(3);

/// A process as it was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    pub(super) owner: Owner,
    pub(super) cost: WalkCost,
    listed_at: Instant,
}

/// The processes in `/proc`.
#[derive(Clone, Debug)]
pub(super) struct ProcessList {
    pub(super) processes: Arc<[Process]>,
    /// True if all were listed just now.
    pub(super) is_whole: bool,
    /// True if there was no time for some, and an earlier list does not have them either.
    is_cut: bool,
}

impl ProcessList {
    /// False if a pass over all descriptors may stay in the kernel for long. Processes that `/proc` does not show are
    /// not known.
    pub(super) fn permits_pass(&self) -> bool {
        !self.is_cut && walk_cost::permits_pass(self.processes.iter().map(|process| process.cost))
    }
}

/// What is known from the lists that were made so far, for threads that make none.
struct Known {
    /// The last list, and when it was begun.
    last: Option<(Instant, ProcessList)>,
    /// True once it has shown that processes can't be visited one by one here, so that there will be no list.
    has_none: bool,
    /// True once a list was made, or could not be made.
    was_tried: bool,
}

static KNOWN: Mutex<Known> = Mutex::new(Known { last: None, has_none: false, was_tried: false });

/// Wakes those who wait for the first list.
static FIRST_TRY: Condvar = Condvar::new();

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lists the processes.
///
/// # Errors
/// If the kernel can't make a pass over one process, as before Linux 6.1, or if `/proc` is of another pid namespace
/// than this process.
pub(super) fn list(iter: &DescriptorIter) -> io::Result<ProcessList> {
    let list = try_list(iter);
    known().was_tried = true;
    FIRST_TRY.notify_all();
    list
}

fn try_list(iter: &DescriptorIter) -> io::Result<ProcessList> {
    let own = std::process::id();
    if fs::read_link("/proc/self")? != Path::new(&own.to_string()) {
        known().has_none = true;
        return Err(io::Error::other("/proc is of another pid namespace"));
    }
    // Before anything that takes long, because the kernel may not support it.
    let probe = iter.pass_of_process(own, Instant::now() + MAX_LIST, |_| {});
    if probe.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::E2BIG)) {
        known().has_none = true;
    }
    probe.map(|()| read_list())
}

/// Waits until another thread has made the first list, or has failed to, but not longer than `limit`. Without a list
/// nothing can be looked at, neither in a pass nor one by one.
pub(super) fn wait_for_first(limit: Duration) {
    let is_untried = |known: &mut Known| !known.was_tried;
    drop(FIRST_TRY.wait_timeout_while(known(), limit, is_untried));
}

/// The last list, unless it is old: for a thread that has no time to list the processes, or no capability, so that
/// with `hidepid` `/proc` shows it no other user's processes. Processes may be missing in it.
pub(super) fn last_list() -> Option<ProcessList> {
    let last = known().last.clone();
    let (_, list) = last.filter(|(at, _)| at.elapsed() < LIST_AGE)?;
    Some(ProcessList { is_whole: false, ..list })
}

/// False if the last list, however old, does not permit a pass over all descriptors, or if there was none yet.
pub(super) fn last_list_permits_pass() -> bool {
    let known = known();
    known.last.as_ref().map_or(known.has_none, |(_, list)| list.permits_pass())
}

pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The processes that `/proc` shows.
fn read_list() -> ProcessList {
    let begin = Instant::now();
    let earlier = known().last.clone();
    let earlier = earlier.map(|(_, list)| list.processes).unwrap_or_default();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let found_until = begin + MAX_LIST;
    let mut user_namespaces = UserNamespaces::new();
    let found = pids.map(|pid| match Instant::now() < found_until {
        true => FoundProcess::new(pid, &mut user_namespaces),
        // The kernel makes some of these files slow, too, where others change control groups.
        false => FoundProcess { pid, uid: None, group: None, userns: None },
    });
    let found = found.collect();
    let mut list = list_in_turns(found, &earlier, Instant::now() + MAX_LIST, read_process);
    // With `hidepid` only those are shown that this process may trace. The first process is always there.
    list.is_whole &= list.processes.iter().any(|process| process.pid == 1);
    known().last = Some((begin, list.clone()));
    list
}

/// A process before it is listed, by what no process makes slow by itself.
#[derive(Clone, Copy, Debug)]
struct FoundProcess {
    pid: u32,
    /// The effective user, also of a process that can't be traced (`task_dump_owner`, fs/proc/base.c at v6.12).
    uid: Option<u32>,
    /// The number of its control group in [`Owner`].
    group: Option<u64>,
    /// `None`: it is in our user namespace, or this is unknown.
    userns: Option<OutermostUserns>,
}

impl FoundProcess {
    fn new(pid: u32, user_namespaces: &mut UserNamespaces) -> Self {
        let uid = fs::metadata(format!("/proc/{pid}")).ok().map(|folder| folder.uid());
        let group = fs::read(format!("/proc/{pid}/cgroup")).ok().and_then(|text| owner_group(&text));
        Self { pid, uid, group: group.map(|group| group_id(&group)), userns: user_namespaces.outermost(pid) }
    }

    /// Who is charged for it if this is its user.
    fn owner(&self, uid: Option<u32>) -> Owner {
        if let Some(container) = self.userns.and_then(OutermostUserns::container) {
            return container;
        }
        // A uid there is one of many that the maker of the user namespace has.
        let uid = self.userns.map(|userns| userns.owner).or(uid);
        match self.group {
            None => owner_of_user(uid),
            Some(group) => Owner::new(uid.unwrap_or(u32::MAX), group),
        }
    }
}

/// Which user namespaces processes are in.
struct UserNamespaces {
    /// The inode of our user namespace. `None`: unknown.
    own: Option<u64>,
    /// The outermost ones of other ones, by inode.
    outermost: HashMap<u64, Option<OutermostUserns>>,
}

impl UserNamespaces {
    fn new() -> Self {
        let own = fs::metadata("/proc/self/ns/user").ok().map(|userns| userns.ino());
        Self { own, outermost: HashMap::new() }
    }

    /// The outermost user namespace of a process. `None`: it is in ours, or this is unknown.
    fn outermost(&mut self, pid: u32) -> Option<OutermostUserns> {
        let path = format!("/proc/{pid}/ns/user");
        let inode = fs::metadata(&path).ok()?.ino();
        if self.own.is_none_or(|own| own == inode) {
            return None;
        }
        if let Some(known) = self.outermost.get(&inode) {
            return *known;
        }
        let (opened, outermost) = outermost_userns_at(Path::new(&path)).ok()?;
        self.outermost.insert(opened, outermost);
        outermost
    }
}

/// Reads these processes until the time is over, in an order by which a user whose processes take long delays no other
/// user. Of one owner, a process that was never listed comes first, then the one whose last reading is the oldest. For
/// the rest, the earlier list is used again.
fn list_in_turns(
    found: Vec<FoundProcess>,
    earlier: &[Process],
    until: Instant,
    mut read: impl FnMut(&FoundProcess) -> io::Result<Process>,
) -> ProcessList {
    let first = earlier.iter().map(|process| process.listed_at).min();
    let earlier: HashMap<u32, &Process> = earlier.iter().map(|process| (process.pid, process)).collect();
    let listed_since = |pid: u32| match (earlier.get(&pid), first) {
        (Some(process), Some(first)) => 1 + nanoseconds(process.listed_at - first),
        _ => 0,
    };
    let in_queue = |found: FoundProcess| (found.owner(found.uid), listed_since(found.pid), found);
    let mut queue = LeastSpent::new(found.into_iter().map(in_queue).collect());
    let mut processes = Vec::new();
    let (mut is_whole, mut is_cut) = (true, false);
    loop {
        let read_begin = Instant::now();
        let Some((owner, found)) = queue.pop() else { break };
        if read_begin >= until {
            is_whole = false;
            match earlier.get(&found.pid).filter(|process| process.listed_at.elapsed() < LIST_AGE) {
                Some(process) => processes.push(**process),
                None => is_cut = true,
            }
            continue;
        }
        match read(&found) {
            Ok(process) => processes.push(process),
            // It has ended meanwhile, and holds nothing.
            Err(error) if process::is_gone(&error) => {}
            Err(_) => is_whole = false,
        }
        queue.charge(owner, nanoseconds(read_begin.elapsed()));
    }
    ProcessList { processes: processes.into(), is_whole, is_cut }
}

/// Reads what a list has of a process. The real user started it. A process that ends in this moment can make this last
/// for as long as it wants: see [`process::read_facts`].
fn read_process(found: &FoundProcess) -> io::Result<Process> {
    let pid = found.pid;
    let status = process::read_file(&format!("/proc/{pid}/status"))?;
    let owner = found.owner(process::uids_in_status(&status).map(|[real, ..]| real));
    let cost = WalkCost::new(&status, |count| table_sizes(pid, count));
    Ok(Process { pid, owner, cost, listed_at: Instant::now() })
}

/// The sizes in slots of the descriptor tables of this number of threads, chosen at random, without the first thread.
/// A table that is the first thread's has size 0. `None`: they can't be read, or not in time.
fn table_sizes(pid: u32, count: usize) -> Option<Vec<u64>> {
    let until = Instant::now() + MAX_SAMPLING;
    let threads = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let threads = threads.filter_map(|thread| thread.file_name().to_str()?.parse::<u32>().ok());
    let threads: Vec<_> = threads.filter(|tid| *tid != pid).collect();
    if threads.is_empty() {
        return Some(Vec::new());
    }
    let random = RandomState::new();
    let choose = |number| threads[(random.hash_one(number) % threads.len() as u64) as usize];
    let size = |tid| match process::read_file(&format!("/proc/{pid}/task/{tid}/status")) {
        Ok(status) => {
            let size = || process::status_field(&status, "FDSize").and_then(|size| size.parse().ok());
            // The kernel passes over a thread that shares the first one's table.
            let is_shared = process::have_same_descriptors(pid, tid)?;
            Some(if is_shared { 0 } else { size().unwrap_or(0) })
        }
        Err(error) if process::is_gone(&error) => Some(0),
        Err(_) => None,
    };
    (0..count).map(|number| (Instant::now() < until).then(|| size(choose(number)))?).collect()
}

/// The number of a control group in [`Owner`]. Two groups have the same number only by chance.
fn group_id(group: &[u8]) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    // 0 is no group, and the highest bit is a block of users.
    KEY.hash_one(group) >> 1 | 1
}

/// The control group of an owner, as in [`Owner`]: below its level users make groups as they like. `None`: the process
/// is in the root group, or the host does not have the unified hierarchy.
fn owner_group(text: &[u8]) -> Option<Vec<u8>> {
    let path = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
    let names = path.split(|byte| *byte == b'/').take(OWNER_CGROUP_LEVEL as usize);
    Some(names.collect::<Vec<_>>().join(&b'/')).filter(|group| !group.is_empty())
}

#[cfg(test)]
pub(super) mod samples {
    use super::*;

    pub(in crate::sockets) const HOSTILE: Owner = Owner::new(1_000, 0);
    pub(in crate::sockets) const OTHER: Owner = Owner::new(0, 0);

    /// A process with a small table.
    pub(in crate::sockets) fn process(owner: Owner, pid: u32) -> Process {
        let cost = WalkCost::new(b"FDSize:\t64\nThreads:\t1\n", |_| None);
        Process { pid, owner, cost, listed_at: Instant::now() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::{samples::*, *};

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
    fn this_process_is_listed_with_its_user_and_its_table_and_then_in_the_last_list() {
        let uid = rustix::process::getuid().as_raw();
        let is_own = |process: &&Process| process.pid == std::process::id();
        let now = read_list();
        assert!(now.is_whole && !now.is_cut, "{now:?}");
        let own = now.processes.iter().find(is_own).unwrap();
        assert_eq!((own.owner.uid, own.cost.visit()), (uid, walk_cost::Visit::AllThreads));
        assert!(own.cost.slots() >= 64, "{own:?}");
        let last = last_list().unwrap();
        assert!(last.processes.iter().any(|process| is_own(&process)) && !last.is_whole);
    }

    #[test]
    fn the_tables_of_other_threads_are_read() {
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (begin, began) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            // SAFETY: the thread uses no descriptor of its own.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }.unwrap();
            begin.send(()).unwrap();
            ended.recv()
        });
        began.recv().unwrap();
        // This thread, and perhaps others, share the first thread's table.
        let sizes = table_sizes(std::process::id(), 300).unwrap();
        drop(end);
        assert!(thread.join().unwrap().is_err());
        assert_eq!(sizes.len(), 300);
        assert!(sizes.iter().any(|size| *size >= 64) && sizes.contains(&0), "{sizes:?}");
        assert_eq!(table_sizes(u32::MAX, 1), None);
    }

    #[test]
    fn a_process_in_a_user_namespace_counts_for_the_user_that_owns_it() {
        use std::{os::unix::process::CommandExt as _, process::Command};
        // From another one than the initial one an owner can't be found.
        const INITIAL: Option<u64> = Some(0xefff_fffd);
        let userns = |pid| fs::metadata(format!("/proc/{pid}/ns/user")).ok().map(|userns| userns.ino());
        let own = userns(std::process::id());
        let mut user_namespaces = UserNamespaces::new();
        assert_eq!(user_namespaces.outermost(std::process::id()), None, "it is ours");
        let mut command = Command::new("unshare");
        command.args(["--user", "sleep", "60"]);
        let mut uid = rustix::process::geteuid().as_raw();
        if uid == 0 {
            uid = 65_534;
            command.uid(uid);
        }
        let spawned = command.spawn().inspect_err(|error| println!("FACT unshare={error}"));
        let Ok(mut child) = spawned else { return };
        let until = Instant::now() + Duration::from_secs(10);
        while own == INITIAL
            && userns(child.id()) == own
            && child.try_wait().unwrap().is_none()
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        let is_in_another = userns(child.id()).is_some_and(|userns| Some(userns) != own);
        let outermost = user_namespaces.outermost(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        println!("FACT is_in_another_user_namespace={is_in_another}");
        if own == INITIAL && is_in_another {
            assert_eq!(outermost.map(|userns| userns.owner), Some(uid));
        }
    }

    #[test]
    fn a_process_counts_for_its_user_in_its_control_group() {
        let found = |group| FoundProcess { pid: 1, uid: None, group, userns: None };
        assert_eq!(found(Some(7)).owner(Some(5)), Owner::new(5, 7));
        assert_eq!(found(Some(7)).owner(None), Owner::new(u32::MAX, 7));
        assert_eq!(found(None).owner(Some(5)), owner_of_user(Some(5)));
        let in_userns = |owner, group| {
            let userns = Some(OutermostUserns { inode: 0xf000_0001, owner });
            FoundProcess { userns, ..found(group) }.owner(Some(100_005))
        };
        assert_eq!(in_userns(5, Some(7)), Owner::new(5, 7), "the maker of the user namespace");
        let of_container = Owner::new(0, Owner::of_container(0xf000_0001));
        assert_eq!([in_userns(0, Some(7)), in_userns(0, Some(8))], [of_container; 2]);
        assert_eq!(group_id(b"a"), group_id(b"a"));
        assert_ne!(group_id(b"a"), group_id(b"b"));
    }

    /// Lists these processes, each of which takes this long, after an earlier list.
    fn listed(
        pids: impl Iterator<Item = u32>,
        earlier: &[Process],
        limit: Duration,
        takes: impl Fn(u32) -> Duration,
    ) -> (Vec<u32>, ProcessList) {
        let found = |pid| {
            let uid = Some(if pid <= 100 { 1_000 } else { 0 });
            FoundProcess { pid, uid, group: None, userns: None }
        };
        let order = RefCell::new(Vec::new());
        let read = |found: &FoundProcess| {
            order.borrow_mut().push(found.pid);
            std::thread::sleep(takes(found.pid));
            Ok(process(found.owner(found.uid), found.pid))
        };
        let list = list_in_turns(pids.map(found).collect(), earlier, Instant::now() + limit, read);
        (order.into_inner(), list)
    }

    #[test]
    fn processes_that_are_slow_to_list_keep_no_other_user_out_of_the_list() {
        let takes = |pid| if pid <= 100 { Duration::from_millis(20) } else { Duration::ZERO };
        let (_, list) = listed(1..=120, &[], Duration::from_millis(200), takes);
        let of_victim = list.processes.iter().filter(|process| process.owner == OTHER);
        assert_eq!(of_victim.count(), 20);
        assert!(!list.is_whole && list.is_cut && !list.permits_pass(), "{list:?}");
    }

    #[test]
    fn a_list_goes_on_where_the_last_one_was_cut_until_all_are_listed() {
        let mut list = ProcessList { processes: Arc::default(), is_whole: false, is_cut: true };
        let mut lists = 0;
        while list.is_cut {
            let known: Vec<_> = list.processes.iter().map(|process| process.pid).collect();
            let (order, next) =
                listed(1..=50, &list.processes, Duration::from_millis(100), |_| Duration::from_millis(10));
            assert!(order.iter().all(|pid| !known.contains(pid)) || !next.is_cut, "{order:?}");
            assert!(next.processes.len() > known.len());
            (list, lists) = (next, lists + 1);
        }
        assert!(lists > 1 && list.processes.len() == 50 && !list.is_whole, "{lists} {list:?}");
        // Then the process whose last reading is the oldest is read again.
        let first = list.processes.iter().min_by_key(|process| process.listed_at).unwrap().pid;
        let (order, list) =
            listed(1..=50, &list.processes, Duration::from_millis(300), |_| Duration::from_millis(301));
        assert_eq!((order, list.processes.len()), (vec![first], 50));
        // One that has ended is in no later list.
        let (_, list) = listed(1..=10, &list.processes, Duration::ZERO, |_| Duration::ZERO);
        assert_eq!((list.processes.len(), list.is_whole, list.is_cut), (10, false, false));
    }
}
