//! The processes in `/proc`, with their owners and the sizes of their descriptor tables: which of them may be visited,
//! and whether a pass over all may be made. Owners take turns in making the list, by the time that their processes
//! take, and share its memory: a process beyond its owner's share is left out, and counted for its user.

use std::{
    fmt::Write as _,
    fs,
    hash::{BuildHasher as _, RandomState},
    io,
    path::Path,
    sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use selfconn_ebpf::Owner;

use super::{
    found_process::{FoundProcess, UserNamespaces},
    limit::LeftOut,
    walk_cost::{self, WalkCost},
};
use crate::{
    bpf::descriptors::DescriptorIter,
    budget::{
        LeastSpent, QUEUED_ITEM_BYTES, QUEUED_OWNER_BYTES, SharedLimit,
        memory::{LISTED_OWNER_BYTES, LISTED_PROCESS_BYTES, PROCESS_LIST_BYTES},
    },
    system::process,
};

/// How long listing the processes may take. A list of 2,000 takes some 100 ms on 6.18.
const MAX_LIST: Duration = Duration::from_secs(1);

/// How long looking at the threads of one process may take. A process makes its files slow by many groups.
const MAX_SAMPLING: Duration = Duration::from_millis(100);

/// How long what is known of a process is used by [`last_list`], and by a list that has no time to read it again.
const LIST_AGE: Duration = Duration::from_mins(3);

/// For how long an earlier list says which process was listed when. Less than the time after which [`ListedAt`] begins
/// again.
const EARLIER_LIST_AGE: Duration = Duration::from_hours(24);

/// Maximum number of users that a text about processes that were left out names.
const MAX_USERS_IN_TEXT: usize = 8;

/// A process as it was listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) owner: Owner,
    pub(super) cost: WalkCost,
    pub(super) pid: u32,
    listed_at: ListedAt,
}

// While a list is made, there are the list before it and, in a thread that looks for the holders of a port, the one
// before that. Both threads have a queue.
const _: () = {
    let of_other_thread = size_of::<Process>() + QUEUED_ITEM_BYTES;
    let making = size_of::<FoundProcess>() + QUEUED_ITEM_BYTES + size_of::<Process>();
    assert!(size_of::<Process>() + making + of_other_thread <= LISTED_PROCESS_BYTES);
    // A table that grows is there twice, too.
    assert!(2 * QUEUED_OWNER_BYTES + 3 * SharedLimit::OWNER_BYTES <= LISTED_OWNER_BYTES);
};

/// When a process was listed, in milliseconds since the first list was begun. It begins again after 49 days.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct ListedAt(u32);

impl ListedAt {
    fn now() -> Self {
        static FIRST: LazyLock<Instant> = LazyLock::new(Instant::now);
        Self(FIRST.elapsed().as_millis() as u32)
    }

    fn elapsed(self) -> Duration {
        Duration::from_millis(Self::now().0.wrapping_sub(self.0).into())
    }
}

/// What owners have of the memory of a list.
struct ListShares(SharedLimit);

impl ListShares {
    fn new(max_bytes: usize) -> Self {
        Self(SharedLimit::new(max_bytes))
    }

    /// True if there is room for one more process of this owner.
    fn try_take(&mut self, owner: Owner) -> bool {
        let of_owner = if self.0.used_by(owner) == 0 { LISTED_OWNER_BYTES } else { 0 };
        self.0.try_take(owner, LISTED_PROCESS_BYTES + of_owner)
    }

    /// Gives back what one process of this owner took.
    fn give_back(&mut self, owner: Owner) {
        let is_last = self.0.used_by(owner) == LISTED_OWNER_BYTES + LISTED_PROCESS_BYTES;
        self.0.give_back(owner, LISTED_PROCESS_BYTES + if is_last { LISTED_OWNER_BYTES } else { 0 });
    }
}

/// The processes in `/proc`.
#[derive(Clone, Debug, Default)]
pub(super) struct ProcessList {
    /// In the order of their pids.
    pub(super) processes: Arc<Vec<Process>>,
    /// The processes beyond the shares of their owners, by user.
    left_out: Arc<LeftOut>,
    /// True if all were listed just now.
    pub(super) is_whole: bool,
    /// True if there was no time or no room for some, and an earlier list does not have them either.
    is_cut: bool,
}

impl ProcessList {
    /// False if a pass over all descriptors may stay in the kernel for long. Processes that `/proc` does not show are
    /// not known.
    pub(super) fn permits_pass(&self) -> bool {
        !self.is_cut && walk_cost::permits_pass(self.processes.iter().map(|process| process.cost))
    }

    /// Which users have more processes than their share of the list: text for people. `None`: no user has.
    pub(super) fn left_out_text(&self) -> Option<String> {
        let mut users: Vec<_> = self.left_out.users().collect();
        // The users that are counted together come last.
        users.sort_unstable_by_key(|(uid, count)| (uid.is_none(), u64::MAX - count));
        let of_others = users.iter().skip(MAX_USERS_IN_TEXT).map(|(_, count)| count).sum::<u64>();
        let mut text = String::new();
        for (uid, count) in users.iter().take(MAX_USERS_IN_TEXT) {
            let user = match uid {
                None => "other users".to_owned(),
                Some(u32::MAX) => "unknown users".to_owned(),
                Some(uid) => format!("user {uid}"),
            };
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = write!(text, "{separator}{count} of {user}");
        }
        if of_others > 0 {
            let _ = write!(text, ", {of_others} of other users");
        }
        (!text.is_empty()).then_some(text)
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

/// The memory of a list that a command makes: a share is a multiple of what is free.
pub(super) const UNLIMITED: usize = usize::MAX >> 4;

/// Lists the processes. All of them together take at most `max_bytes`.
///
/// # Errors
/// If the kernel can't make a pass over one process, as before Linux 6.1, or if `/proc` is of another pid namespace
/// than this process.
pub(super) fn list(iter: &DescriptorIter, max_bytes: usize) -> io::Result<ProcessList> {
    let list = try_list(iter, max_bytes);
    known().was_tried = true;
    FIRST_TRY.notify_all();
    list
}

fn try_list(iter: &DescriptorIter, max_bytes: usize) -> io::Result<ProcessList> {
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
    probe.map(|()| read_list(max_bytes))
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
fn read_list(max_bytes: usize) -> ProcessList {
    let begin = Instant::now();
    let earlier = known().last.clone().filter(|(at, _)| at.elapsed() < EARLIER_LIST_AGE);
    let earlier = earlier.map(|(_, list)| list.processes).unwrap_or_default();
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let found_until = begin + MAX_LIST;
    let mut user_namespaces = UserNamespaces::new();
    let found = pids.map(|pid| match (Instant::now() < found_until, listed(&earlier, pid)) {
        (true, _) => FoundProcess::new(pid, &mut user_namespaces),
        // The kernel makes some of these files slow, too, where others change control groups.
        (false, Some(process)) => FoundProcess::charged_to(pid, process.owner),
        (false, None) => FoundProcess::of(pid, None, None, None),
    });
    let found = FoundProcesses::new(found, max_bytes);
    drop(user_namespaces);
    let mut list = list_in_turns(found, &earlier, Instant::now() + MAX_LIST, read_process);
    // With `hidepid` only those are shown that this process may trace. The first process is always there.
    list.is_whole &= list.processes.iter().any(|process| process.pid == 1);
    known().last = Some((begin, list.clone()));
    list
}

/// The processes for which their owners have room, the others by user, and the shares.
struct FoundProcesses {
    processes: Vec<FoundProcess>,
    left_out: LeftOut,
    shares: ListShares,
}

impl FoundProcesses {
    fn new(all: impl Iterator<Item = FoundProcess>, max_bytes: usize) -> Self {
        // In the daemon it does not grow: then it would be twice in memory for a moment. What is not used of it takes
        // no memory.
        let mut processes = Vec::with_capacity(max_bytes.min(PROCESS_LIST_BYTES) / LISTED_PROCESS_BYTES);
        let (mut left_out, mut shares) = (LeftOut::default(), ListShares::new(max_bytes));
        for process in all {
            let owner = process.owner();
            match shares.try_take(owner) {
                true => processes.push(process),
                false => left_out.count(Some(owner.uid), false),
            }
        }
        Self { processes, left_out, shares }
    }
}

/// The process with this pid in a list, which is in the order of the pids.
fn listed(list: &[Process], pid: u32) -> Option<&Process> {
    list.binary_search_by_key(&pid, |process| process.pid).ok().and_then(|at| list.get(at))
}

/// Reads these processes until the time is over, in an order by which a user whose processes take long delays no other
/// user. Of one owner, a process that was never listed comes first, then the one whose last reading is the oldest. For
/// the rest, the earlier list is used again.
fn list_in_turns(
    found: FoundProcesses,
    earlier: &[Process],
    until: Instant,
    mut read: impl FnMut(&FoundProcess) -> io::Result<Process>,
) -> ProcessList {
    let FoundProcesses { processes: found, mut left_out, mut shares } = found;
    let now = ListedAt::now();
    let listed_since = |found: &FoundProcess| match listed(earlier, found.pid) {
        Some(process) => u64::from(u32::MAX) + 1 - u64::from(now.0.wrapping_sub(process.listed_at.0)),
        None => 0,
    };
    let mut queue = LeastSpent::new(&found, |found| (found.owner(), listed_since(found)));
    let mut processes = Vec::with_capacity(found.len());
    let (mut is_whole, mut is_cut) = (true, false);
    loop {
        let read_begin = Instant::now();
        let Some((owner, found)) = queue.pop() else { break };
        let process = if read_begin < until {
            let process = read(found);
            queue.charge(owner, nanoseconds(read_begin.elapsed()));
            match process {
                Ok(process) => process,
                // It has ended meanwhile, and holds nothing.
                Err(error) if process::is_gone(&error) => continue,
                Err(_) => {
                    is_whole = false;
                    continue;
                }
            }
        } else {
            is_whole = false;
            match listed(earlier, found.pid).filter(|process| process.listed_at.elapsed() < LIST_AGE) {
                Some(process) => *process,
                None => {
                    is_cut = true;
                    continue;
                }
            }
        };
        // The real user of a process may be another one than its effective user.
        if process.owner != owner {
            shares.give_back(owner);
        }
        if process.owner == owner || shares.try_take(process.owner) {
            processes.push(process);
        } else {
            left_out.count(Some(process.owner.uid), false);
        }
    }
    processes.sort_unstable_by_key(|process| process.pid);
    let (is_whole, is_cut) = (is_whole && left_out.is_empty(), is_cut || !left_out.is_empty());
    ProcessList { processes: Arc::new(processes), left_out: Arc::new(left_out), is_whole, is_cut }
}

/// Reads what a list has of a process. The real user started it. A process that ends in this moment can make this last
/// for as long as it wants: see [`process::read_facts`].
fn read_process(found: &FoundProcess) -> io::Result<Process> {
    let pid = found.pid;
    let status = process::read_file(&format!("/proc/{pid}/status"))?;
    let owner = found.owner_if_started_by(process::uids_in_status(&status).map(|[real, ..]| real));
    let cost = WalkCost::new(&status, |count| table_sizes(pid, count));
    Ok(Process { owner, cost, pid, listed_at: ListedAt::now() })
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

#[cfg(test)]
pub(super) mod samples {
    use super::*;

    pub(in crate::sockets) const HOSTILE: Owner = Owner::new(1_000, 0);
    pub(in crate::sockets) const OTHER: Owner = Owner::new(0, 0);

    /// A process with a small table.
    pub(in crate::sockets) fn process(owner: Owner, pid: u32) -> Process {
        let cost = WalkCost::new(b"FDSize:\t64\nThreads:\t1\n", |_| None);
        Process { owner, cost, pid, listed_at: ListedAt::now() }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::{samples::*, *};

    #[test]
    fn this_process_is_listed_with_its_user_and_its_table_and_then_in_the_last_list() {
        let uid = rustix::process::getuid().as_raw();
        let is_own = |process: &&Process| process.pid == std::process::id();
        let now = read_list(PROCESS_LIST_BYTES);
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

    /// Lists these processes, each of which takes this long, after an earlier list.
    fn listed(
        pids: impl Iterator<Item = u32>,
        earlier: &[Process],
        limit: Duration,
        takes: impl Fn(u32) -> Duration,
    ) -> (Vec<u32>, ProcessList) {
        let found = |pid| FoundProcess::of(pid, Some(if pid <= 100 { 1_000 } else { 0 }), None, None);
        let order = RefCell::new(Vec::new());
        let read = |found: &FoundProcess| {
            order.borrow_mut().push(found.pid);
            std::thread::sleep(takes(found.pid));
            Ok(process(found.owner(), found.pid))
        };
        let found = FoundProcesses::new(pids.map(found), PROCESS_LIST_BYTES);
        let list = list_in_turns(found, earlier, Instant::now() + limit, read);
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
        let mut list = ProcessList { is_cut: true, ..ProcessList::default() };
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
        let first = list.processes.iter().min_by_key(|process| process.listed_at.0).unwrap().pid;
        let (order, list) =
            listed(1..=50, &list.processes, Duration::from_millis(300), |_| Duration::from_millis(301));
        assert_eq!((order, list.processes.len()), (vec![first], 50));
        // One that has ended is in no later list.
        let (_, list) = listed(1..=10, &list.processes, Duration::ZERO, |_| Duration::ZERO);
        assert_eq!((list.processes.len(), list.is_whole, list.is_cut), (10, false, false));
    }

    #[test]
    fn processes_beyond_the_share_of_their_owner_are_left_out_and_no_other_owners() {
        let of = |owner, pid| FoundProcess::charged_to(pid, owner);
        let flood = (10..60_000).map(|pid| of(Owner::new(1_000, 7), pid));
        let others = (0..500).map(|number| of(Owner::new(0, 100 + number), 70_000 + number as u32));
        let of_command = FoundProcesses::new(flood.clone().chain(others.clone()), UNLIMITED);
        assert_eq!((of_command.processes.len(), of_command.left_out.is_empty()), (59_990 + 500, true));
        let found = FoundProcesses::new(flood.chain(others), PROCESS_LIST_BYTES);
        let of_flood = found.processes.iter().filter(|process| process.owner().uid == 1_000).count();
        assert_eq!(found.processes.len() - of_flood, 500);
        let share = (PROCESS_LIST_BYTES * 3 / 4 - LISTED_OWNER_BYTES) / LISTED_PROCESS_BYTES;
        assert!((share - 3..=share).contains(&of_flood), "{of_flood} of {share}");
        assert_eq!(found.left_out.users().collect::<Vec<_>>(), [(Some(1_000), (59_990 - of_flood) as u64)]);
        let read = |found: &FoundProcess| Ok(process(found.owner(), found.pid));
        let until = Instant::now() + Duration::from_secs(600);
        let list = list_in_turns(found, &[], until, read);
        assert_eq!(list.processes.len(), of_flood + 500);
        assert!(list.processes.is_sorted_by_key(|process| process.pid));
        assert!(!list.is_whole && !list.permits_pass(), "what is left out may have large tables");
        let text = list.left_out_text().unwrap();
        assert_eq!(text, format!("{} of user 1000", 59_990 - of_flood));
        assert_eq!(ProcessList::default().left_out_text(), None);
        let unknown = (1..60_000).map(|pid| FoundProcess::of(pid, None, None, None));
        let left_out = FoundProcesses::new(unknown, PROCESS_LIST_BYTES).left_out;
        let list = ProcessList { left_out: Arc::new(left_out), ..ProcessList::default() };
        assert!(list.left_out_text().unwrap().ends_with(" of unknown users"), "{list:?}");
    }

    #[test]
    fn the_list_stays_within_its_bytes_whoever_has_the_processes() {
        let bytes =
            |owners: usize, processes: usize| owners * LISTED_OWNER_BYTES + processes * LISTED_PROCESS_BYTES;
        // A container's root is any user; and a process has another real user than its effective one.
        let of = |pid| FoundProcess::of(pid, Some(0), Some(7), None);
        let by_effective = FoundProcesses::new((1..60_000).map(of), PROCESS_LIST_BYTES);
        assert!(bytes(1, by_effective.processes.len()) <= PROCESS_LIST_BYTES * 3 / 4);
        let read = |found: &FoundProcess| Ok(process(found.owner_if_started_by(Some(found.pid)), found.pid));
        let until = Instant::now() + Duration::from_secs(600);
        let list = list_in_turns(by_effective, &[], until, read);
        let kept = list.processes.len();
        assert!(bytes(kept, kept) <= PROCESS_LIST_BYTES * 7 / 8 && kept > 1_000, "{kept}");
        let left_out: u64 = list.left_out.users().map(|(_, count)| count).sum();
        assert_eq!(kept as u64 + left_out, 59_999);
        let text = list.left_out_text().unwrap();
        assert!(text.len() < 300 && text.ends_with(" of other users"), "{text}");
    }
}
