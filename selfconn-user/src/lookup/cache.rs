//! The programs that were looked up a moment ago. A process that opens thousands of self-connections a second
//! is read only a few times.

use std::{collections::HashMap, rc::Rc};

use crate::system::process::{ProcessInfo, ProcessKey};

/// How long information about a process is used without reading `/proc` again.
const CACHE_TTL_NS: u64 = 100_000_000;

/// Maximum number of processes.
const MAX_PROCESSES: usize = 64;

#[derive(Debug)]
struct CachedProcess {
    at_ns: u64,
    process: Rc<ProcessInfo>,
}

#[derive(Debug, Default)]
pub(super) struct ProcessCache(HashMap<ProcessKey, CachedProcess>);

impl ProcessCache {
    /// The process, if it was looked up less than [`CACHE_TTL_NS`] before `now_ns`.
    pub(super) fn fresh(&self, key: ProcessKey, now_ns: u64) -> Option<Rc<ProcessInfo>> {
        let cached = self.0.get(&key)?;
        (now_ns.saturating_sub(cached.at_ns) < CACHE_TTL_NS).then(|| Rc::clone(&cached.process))
    }

    /// The process, however long ago it was looked up. From now on it is fresh.
    pub(super) fn known(&mut self, key: ProcessKey, now_ns: u64) -> Option<Rc<ProcessInfo>> {
        let cached = self.0.get_mut(&key)?;
        cached.at_ns = cached.at_ns.max(now_ns);
        Some(Rc::clone(&cached.process))
    }

    pub(super) fn insert(&mut self, key: ProcessKey, process: Rc<ProcessInfo>, at_ns: u64) {
        if self.0.len() >= MAX_PROCESSES && !self.0.contains_key(&key) {
            let oldest = self.0.iter().min_by_key(|(_, cached)| cached.at_ns).map(|(key, _)| *key);
            oldest.and_then(|oldest| self.0.remove(&oldest));
        }
        self.0.insert(key, CachedProcess { at_ns, process });
    }

    /// The process if its arguments are unknown, and when it was looked up.
    pub(super) fn without_cmdline(&self, key: ProcessKey) -> Option<(u64, Rc<ProcessInfo>)> {
        let cached = self.0.get(&key).filter(|cached| cached.process.cmdline.is_none())?;
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
        assert_eq!(cache.0.len(), MAX_PROCESSES);
        assert!(cache.known(key(1), 0).is_some() && cache.known(key(2), 0).is_none(), "2 was the oldest");
    }
}
