//! The order in which the daemon visits network namespaces, for a time that may not suffice for all. Any user can make
//! thousands, and the kernel goes through the sockets of all namespaces for each. So the next one is of the owner whose
//! namespaces have taken the least time, and of an owner the one whose last visit is the longest ago.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use selfconn_ebpf::Owner;

use super::{netns::NamespaceSource, process_list::nanoseconds};
use crate::budget::LeastSpent;

/// What the earlier snapshots of a daemon say about network namespaces, by inode. If an inode is that of another
/// namespace meanwhile, only its place in the order is wrong.
#[derive(Debug, Default)]
pub struct VisitHistory {
    /// The number of snapshots.
    snapshots: u64,
    /// The number of the last snapshot that visited the namespace, from 1 on.
    visited_in: HashMap<u32, u64>,
    /// The namespaces that the last snapshot found no way to.
    unfound: HashSet<u32>,
}

impl VisitHistory {
    /// Adds a snapshot: the namespaces that it visited, had no time for, and found no way to. All others are forgotten.
    pub fn add(
        &mut self,
        visited: impl Iterator<Item = u32>,
        unvisited: &BTreeSet<u32>,
        unfound: &HashSet<u32>,
    ) {
        self.snapshots += 1;
        self.visited_in.retain(|inode, _| unvisited.contains(inode));
        self.visited_in.extend(visited.map(|inode| (inode, self.snapshots)));
        self.unfound.clone_from(unfound);
    }

    pub(super) fn unfound(&self) -> &HashSet<u32> {
        &self.unfound
    }

    /// The number of the last snapshot that visited it. 0: none is known.
    fn visited_in(&self, inode: u64) -> u64 {
        u32::try_from(inode).ok().and_then(|inode| self.visited_in.get(&inode)).copied().unwrap_or(0)
    }
}

/// What a snapshot of the daemon goes by.
#[derive(Clone, Copy, Debug)]
pub struct VisitTurns<'a> {
    pub history: &'a VisitHistory,
    /// When this time is over, no further visit is begun. The first namespaces do not count.
    pub limit: Duration,
}

/// A network namespace that waits for its turn.
#[derive(Debug)]
pub(super) struct QueuedNamespace {
    pub(super) inode: u64,
    pub(super) owner: Owner,
    pub(super) path: PathBuf,
    pub(super) source: NamespaceSource,
}

impl VisitTurns<'_> {
    /// Calls `visit` for these namespaces in turns until the time is over. Returns the inodes of the rest.
    pub(super) fn visit(
        self,
        queued: &[QueuedNamespace],
        mut visit: impl FnMut(&QueuedNamespace),
    ) -> BTreeSet<u32> {
        let turn_of =
            |namespace: &QueuedNamespace| (namespace.owner, self.history.visited_in(namespace.inode));
        let mut queue = LeastSpent::new(queued, turn_of);
        let mut unvisited = BTreeSet::new();
        let begin = Instant::now();
        loop {
            let visit_begin = Instant::now();
            let Some((owner, namespace)) = queue.pop() else { return unvisited };
            if visit_begin - begin >= self.limit {
                unvisited.extend(u32::try_from(namespace.inode));
                continue;
            }
            visit(namespace);
            queue.charge(owner, nanoseconds(visit_begin.elapsed()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread::sleep;

    use super::*;

    const HOSTILE: Owner = Owner::new(1_000, 0);
    const OTHER: Owner = Owner::new(1_001, 0);
    const LIMIT: Duration = Duration::from_millis(200);

    /// Visits these namespaces, of which each of `HOSTILE` takes this long. Returns the order of the visits.
    fn visited(
        history: &mut VisitHistory,
        namespaces: impl Iterator<Item = (Owner, u32)>,
        takes: Duration,
    ) -> (Vec<u32>, BTreeSet<u32>) {
        let queued = namespaces.map(|(owner, inode)| QueuedNamespace {
            inode: inode.into(),
            owner,
            path: PathBuf::new(),
            source: NamespaceSource::Process,
        });
        let mut order = Vec::new();
        let queued: Vec<_> = queued.collect();
        let unvisited = VisitTurns { history, limit: LIMIT }.visit(&queued, |namespace| {
            order.push(u32::try_from(namespace.inode).unwrap());
            if namespace.owner == HOSTILE {
                sleep(takes);
            }
        });
        history.add(order.iter().copied(), &unvisited, &HashSet::new());
        (order, unvisited)
    }

    #[test]
    fn an_owner_with_many_slow_namespaces_takes_no_visit_from_another() {
        let namespaces = (1..=2_000).map(|inode| (HOSTILE, inode)).chain((3_001..=3_050).map(|n| (OTHER, n)));
        let (order, unvisited) = visited(&mut VisitHistory::default(), namespaces, Duration::from_millis(50));
        assert_eq!(order.iter().filter(|inode| **inode > 3_000).count(), 50, "{order:?}");
        assert!(order[..52].iter().filter(|inode| **inode > 3_000).count() >= 50, "{order:?}");
        assert!(unvisited.iter().all(|inode| *inode <= 2_000) && unvisited.len() > 1_900);
        assert_eq!(order.len() + unvisited.len(), 2_050, "each is in one of both");
    }

    #[test]
    fn a_snapshot_goes_on_where_the_last_one_ended_until_all_are_visited_and_begins_again() {
        let mut history = VisitHistory::default();
        let takes = Duration::from_millis(20);
        let mut ever = BTreeSet::new();
        let mut snapshots = 0;
        while ever.len() < 25 {
            let (order, _) = visited(&mut history, (1..=25).map(|inode| (HOSTILE, inode)), takes);
            let first_again = order.iter().position(|inode| ever.contains(inode));
            assert!(
                first_again.is_none_or(|at| ever.len() + at == 25),
                "one was visited again before another was visited: {order:?} {ever:?}"
            );
            ever.extend(order);
            snapshots += 1;
        }
        assert!(snapshots > 1);
        let longest_ago = *history.visited_in.iter().min_by_key(|(_, snapshot)| **snapshot).unwrap().1;
        let (order, _) = visited(&mut history, (1..=25).map(|inode| (HOSTILE, inode)), 2 * LIMIT);
        assert_eq!(order.len(), 1);
        assert!(longest_ago < history.snapshots && !history.visited_in.values().any(|at| *at < longest_ago));
        // A new namespace comes first.
        let (order, _) = visited(&mut history, (1..=26).map(|inode| (HOSTILE, inode)), 2 * LIMIT);
        assert_eq!(order, [26]);
    }

    #[test]
    fn nothing_is_kept_of_namespaces_that_are_gone() {
        let mut history = VisitHistory::default();
        history.add([1, 2, 3].into_iter(), &BTreeSet::new(), &[9].into());
        assert_eq!(history.unfound(), &HashSet::from([9]));
        history.add([1].into_iter(), &[2].into(), &HashSet::new());
        assert_eq!(history.visited_in, HashMap::from([(1, 2), (2, 1)]));
        assert_eq!([1, 2, 3].map(|inode| history.visited_in(inode)), [2, 1, 0]);
        assert!(history.unfound().is_empty());
    }
}
