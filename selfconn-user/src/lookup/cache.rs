//! The programs that were looked up a moment ago. A process that opens thousands of self-connections a second
//! is read only a few times.

use std::{collections::HashMap, rc::Rc};

use selfconn_ebpf::{COMM_LEN, Task};

use crate::system::process::{ObservedTask, ProcessInfo, ProcessKey};

/// How long information about a process is used without reading `/proc` again.
const CACHE_TTL_NS: u64 = 100_000_000;

/// Maximum number of processes.
const MAX_PROCESSES: usize = 64;

#[derive(Debug)]
struct CachedProcess {
    at_ns: u64,
    process: Rc<ProcessInfo>,
}

/// A task that was observed by a kernel that does not provide start times.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TaskKey {
    pid: u32,
    tid: u32,
    comm: [u8; COMM_LEN],
    arg_start: u64,
}

impl From<&ObservedTask> for TaskKey {
    fn from(observed: &ObservedTask) -> Self {
        let Task { pid, tid, comm, .. } = observed.task;
        Self { pid, tid, comm, arg_start: observed.arg_start }
    }
}

/// The process of a task, if it was observed in this time: the process with its pid existed at the begin, and at the
/// end it still had a thread with this id and name.
#[derive(Debug)]
struct ProvenTask {
    from_ns: u64,
    until_ns: u64,
    process: Rc<ProcessInfo>,
}

#[derive(Debug, Default)]
pub(super) struct ProcessCache {
    programs: HashMap<ProcessKey, CachedProcess>,
    tasks: HashMap<TaskKey, ProvenTask>,
}

impl ProcessCache {
    /// The process, if it was looked up less than [`CACHE_TTL_NS`] before `now_ns`.
    pub(super) fn fresh(&self, key: ProcessKey, now_ns: u64) -> Option<Rc<ProcessInfo>> {
        let cached = self.programs.get(&key)?;
        (now_ns.saturating_sub(cached.at_ns) < CACHE_TTL_NS).then(|| Rc::clone(&cached.process))
    }

    /// The process, however long ago it was looked up. From now on it is fresh.
    pub(super) fn known(&mut self, key: ProcessKey, now_ns: u64) -> Option<Rc<ProcessInfo>> {
        let cached = self.programs.get_mut(&key)?;
        cached.at_ns = cached.at_ns.max(now_ns);
        Some(Rc::clone(&cached.process))
    }

    pub(super) fn insert(&mut self, key: ProcessKey, process: Rc<ProcessInfo>, at_ns: u64) {
        if self.programs.len() >= MAX_PROCESSES && !self.programs.contains_key(&key) {
            let oldest = self.programs.iter().min_by_key(|(_, cached)| cached.at_ns).map(|(key, _)| *key);
            oldest.and_then(|oldest| self.programs.remove(&oldest));
        }
        self.programs.insert(key, CachedProcess { at_ns, process });
    }

    /// The process of a task that was observed then.
    pub(super) fn of_task(&self, observed: &ObservedTask) -> Option<Rc<ProcessInfo>> {
        let proven = self.tasks.get(&observed.into())?;
        (proven.from_ns..=proven.until_ns).contains(&observed.at_ns).then(|| Rc::clone(&proven.process))
    }

    /// Keeps what was read of a task's process at `until_ns` or later.
    pub(super) fn insert_task(&mut self, observed: &ObservedTask, until_ns: u64, process: Rc<ProcessInfo>) {
        let key = TaskKey::from(observed);
        if self.tasks.len() >= MAX_PROCESSES && !self.tasks.contains_key(&key) {
            let oldest = self.tasks.iter().min_by_key(|(_, proven)| proven.until_ns).map(|(key, _)| *key);
            oldest.and_then(|oldest| self.tasks.remove(&oldest));
        }
        self.tasks.insert(key, ProvenTask { from_ns: observed.at_ns, until_ns, process });
    }

    /// The process if its arguments are unknown, and when it was looked up.
    pub(super) fn without_cmdline(&self, key: ProcessKey) -> Option<(u64, Rc<ProcessInfo>)> {
        let cached = self.programs.get(&key).filter(|cached| cached.process.cmdline.is_none())?;
        Some((cached.at_ns, Rc::clone(&cached.process)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> Rc<ProcessInfo> {
        Rc::new(ProcessInfo { comm: Some(name.to_owned()), ..ProcessInfo::default() })
    }

    #[test]
    fn a_process_is_fresh_for_a_while_and_the_oldest_one_makes_room() {
        let key = |pid| ProcessKey { pid, start_ticks: 1, arg_start: 3 };
        let mut cache = ProcessCache::default();
        cache.insert(key(1), named("a"), 5);
        assert_eq!(cache.fresh(key(1), 4 + CACHE_TTL_NS), Some(named("a")));
        assert_eq!(cache.fresh(key(1), 5 + CACHE_TTL_NS), None);
        assert_eq!(cache.fresh(ProcessKey { start_ticks: 2, ..key(1) }, 5), None, "a reused pid");
        assert_eq!(cache.fresh(ProcessKey { arg_start: 4, ..key(1) }, 5), None, "another program");
        assert_eq!(cache.known(key(1), 5 + CACHE_TTL_NS), Some(named("a")));
        assert_eq!(cache.fresh(key(1), 5 + CACHE_TTL_NS), Some(named("a")));
        let (at_ns, process) = cache.without_cmdline(key(1)).unwrap();
        let late = Some(["late"].into_iter().collect());
        cache.insert(key(1), Rc::new((*process).clone().with_cmdline(late)), at_ns);
        assert!(cache.fresh(key(1), 5 + CACHE_TTL_NS).is_some_and(|late| late.cmdline.is_some()));
        assert_eq!(cache.without_cmdline(key(1)), None);
        for pid in 2..=MAX_PROCESSES as u32 + 1 {
            cache.insert(key(pid), named("b"), u64::from(pid));
        }
        assert_eq!(cache.programs.len(), MAX_PROCESSES);
        assert!(cache.known(key(1), 0).is_some() && cache.known(key(2), 0).is_none(), "2 was the oldest");
    }

    #[test]
    fn a_task_is_known_in_the_time_for_which_it_was_proven() {
        let observed = |tid, at_ns| {
            let task = Task { pid: 7, tid, ..Task::UNKNOWN };
            ObservedTask { task, start_ns: 0, arg_start: 0, at_ns }
        };
        let mut cache = ProcessCache::default();
        cache.insert_task(&observed(7, 100), 200, named("a"));
        for (tid, at_ns, is_known) in
            [(7, 99, false), (7, 100, true), (7, 200, true), (7, 201, false), (8, 150, false)]
        {
            assert_eq!(cache.of_task(&observed(tid, at_ns)).is_some(), is_known, "{tid} {at_ns}");
        }
        for tid in 10..10 + MAX_PROCESSES as u32 {
            cache.insert_task(&observed(tid, 100), 201, named("b"));
        }
        assert_eq!((cache.tasks.len(), cache.of_task(&observed(7, 150))), (MAX_PROCESSES, None));
    }
}
