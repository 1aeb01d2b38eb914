//! The descriptors of one process after another, for a host on which a pass over all descriptors takes too long: a user
//! has millions of them, or processes that share them, or threads with large tables. The next process is one of the
//! owner whose processes have taken the least time so far.

use std::{
    io,
    time::{Duration, Instant},
};

use selfconn_ebpf::SocketDescriptor;

use super::{
    process_list::{Process, ProcessList, nanoseconds},
    walk_cost::Visit,
};
use crate::{bpf::descriptors::DescriptorIter, budget::LeastSpent};

/// How long one process may take. The kernel returns after a million descriptors at most, and looks at the slots that
/// `WalkCost::visit` permits before that, so it may be longer.
const MAX_VISIT: Duration = Duration::from_millis(50);

/// Calls `each` for every record of these processes until `is_done`, or until this much time has passed. Returns true
/// if the list is whole, and all were visited to their end.
///
/// # Errors
/// If the kernel refuses.
pub(super) fn pass(
    iter: &DescriptorIter,
    list: &ProcessList,
    limit: Duration,
    is_done: impl Fn() -> bool,
    mut each: impl FnMut(&SocketDescriptor),
) -> io::Result<bool> {
    let visit = |&Process { pid, cost, .. }: &Process, until| match cost.visit() {
        Visit::AllThreads => iter.pass_of_process(pid, until, &mut each).map(|()| true),
        Visit::FirstThread => iter.pass_of_first_thread(pid, until, &mut each).map(|()| false),
        Visit::Nothing => Ok(false),
    };
    Ok(visit_all(&list.processes, Instant::now() + limit, is_done, visit)? && list.is_whole)
}

/// Calls `visit` for one process after another. It returns true if all of the process was visited.
fn visit_all(
    processes: &[Process],
    until: Instant,
    is_done: impl Fn() -> bool,
    mut visit: impl FnMut(&Process, Instant) -> io::Result<bool>,
) -> io::Result<bool> {
    let begin = Instant::now();
    let mut queue = LeastSpent::new(processes, |process| (process.owner, process.cost.slots()));
    let mut visited = 0;
    while !is_done() {
        let visit_begin = Instant::now();
        if visit_begin >= until {
            break;
        }
        let Some((owner, process)) = queue.pop() else { break };
        match visit(process, until.min(visit_begin + MAX_VISIT)) {
            Ok(all) => visited += usize::from(all),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(error) => return Err(error),
        }
        queue.charge(owner, nanoseconds(visit_begin.elapsed()));
    }
    log::debug!("the descriptors of {visited} of {} processes in {:?}", processes.len(), begin.elapsed());
    Ok(visited == processes.len())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use selfconn_ebpf::Owner;

    use super::{super::process_list::samples::*, *};

    /// Visits these processes, each of which takes this long. Returns which were visited, in order, and whether all.
    fn visited(processes: &[Process], limit: Duration, takes: impl Fn(u32) -> Duration) -> (Vec<u32>, bool) {
        let order = RefCell::new(Vec::new());
        let visit = |process: &Process, until: Instant| {
            order.borrow_mut().push(process.pid);
            let left = until.saturating_duration_since(Instant::now());
            std::thread::sleep(takes(process.pid).min(left));
            if takes(process.pid) > left { Err(io::ErrorKind::TimedOut.into()) } else { Ok(true) }
        };
        let all = visit_all(processes, Instant::now() + limit, || false, visit).unwrap();
        (order.into_inner(), all)
    }

    #[test]
    fn processes_that_take_long_and_seem_to_have_nothing_hide_no_other_users() {
        let hostile = (1..=100).map(|pid| process(HOSTILE, pid));
        let processes: Vec<_> = hostile.chain((101..=120).map(|pid| process(OTHER, pid))).collect();
        let takes = |pid| if pid <= 100 { Duration::from_secs(1) } else { Duration::from_micros(100) };
        let (order, all) = visited(&processes, Duration::from_millis(300), takes);
        assert_eq!((101..=120).filter(|pid| order.contains(pid)).count(), 20, "{order:?}");
        assert!(!all);
    }

    #[test]
    fn all_are_visited_if_there_is_time() {
        let processes: Vec<_> = (1..=20).map(|pid| process(Owner::new(pid, 0), pid)).collect();
        let (order, all) = visited(&processes, Duration::from_secs(60), |_| Duration::ZERO);
        assert_eq!((order.len(), all), (20, true));
    }

    #[test]
    fn a_process_that_is_visited_in_part_or_not_is_missing() {
        let processes = [process(OTHER, 1), process(OTHER, 2)];
        let visit = |process: &Process, _| Ok(process.pid == 1);
        let until = Instant::now() + Duration::from_secs(60);
        assert!(!visit_all(&processes, until, || false, visit).unwrap());
    }
}
