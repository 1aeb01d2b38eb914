//! Passes of the iterator over descriptors, for a snapshot and for an event that waits for the holders of a port. How
//! long they may take is bounded; beyond that the processes are visited one by one.

use std::{
    cell::RefCell,
    collections::HashSet,
    io,
    time::{Duration, Instant},
};

use selfconn_ebpf::SocketDescriptor;

use super::{
    by_process,
    by_socket::{BySocket, SocketRef},
    held::{Collector, HeldSockets},
    limit::SnapshotLimit,
    process_list::{self, ProcessList},
};
use crate::{bpf::descriptors::DescriptorIter, budget::memory::PROCESS_LIST_BYTES, system::process};

/// How long a pass may take: 100,000 descriptors take 32 ms on 6.18. A user can have more than he could open: of
/// processes that share one table of descriptors the kernel visits each (`task_seq_get_next`, kernel/bpf/task_iter.c
/// at v6.12, leaves out only the threads of one process).
const MAX_PASS: Duration = Duration::from_secs(5);

/// A pass that takes this much longer than it may was long in one read(2), which returns after a million descriptors,
/// some 0.3 s, unless there are tables with millions of slots without one.
const MAX_OVERRUN: Duration = Duration::from_secs(1);

/// How long the processes are visited one by one instead.
const MAX_VISITS: Duration = Duration::from_secs(2);

/// The same for the processes that hold certain sockets, for which an event waits.
const MAX_PASS_FOR_EVENT: Duration = Duration::from_millis(300);
const MAX_VISITS_FOR_EVENT: Duration = Duration::from_millis(500);

/// How long the first list of processes is waited for where an event waits.
const MAX_WAIT_FOR_LIST: Duration = Duration::from_millis(500);

/// Makes a pass. If it takes too long, what it had found by then is kept, and the processes are visited one by one,
/// also while passes are paused, and whenever the kernel might not come back from a pass for long.
pub(super) fn read(iter: &DescriptorIter, limit: &mut SnapshotLimit) -> io::Result<HeldSockets> {
    let max_list_bytes = if limit.is_of_command() { process_list::UNLIMITED } else { PROCESS_LIST_BYTES };
    let collector = RefCell::new(Collector::new(limit));
    let mut each = |record: &SocketDescriptor| collector.borrow_mut().add_any(record, |_| true);
    // An error: the processes can't be visited one by one.
    let list = process_list::list(iter, max_list_bytes);
    let permits_pass =
        list.as_ref().map_or_else(|_| process_list::last_list_permits_pass(), ProcessList::permits_pass);
    if !permits_pass {
        log::debug!("no pass over the descriptors of all processes: their tables may have too many slots");
    }
    let mut is_whole = false;
    if permits_pass && !iter.is_paused() {
        let pass = pass(iter, MAX_PASS, &mut each)?;
        is_whole = pass.is_whole;
        // Where nothing else finds what the pass has not, the next snapshot tries one again, unless this one hung.
        let longest = if list.is_ok() { MAX_PASS } else { MAX_PASS + MAX_OVERRUN };
        if pass.took >= longest {
            iter.begin_pause();
        }
    }
    let mut refusal = None;
    let left_out = list.as_ref().ok().and_then(ProcessList::left_out_text);
    if !is_whole {
        match list.and_then(|list| by_process::pass(iter, &list, MAX_VISITS, || false, each)) {
            Ok(all) => is_whole = all,
            Err(error) => refusal = Some(error),
        }
    }
    let mut held = collector.into_inner().finish();
    held.holders.complete = is_whole;
    held.holders.unseen = (!is_whole).then(|| {
        let one_by_one = refusal.map(|error| format!("; one by one: {error}")).unwrap_or_default();
        let left_out = left_out.map(|left_out| format!("; not looked at: {left_out}")).unwrap_or_default();
        format!("descriptors of some processes: a pass over all takes too long, or may{one_by_one}{left_out}")
    });
    held.namespaces = held.namespaces.filter(|_| is_whole && process::is_in_initial_pid_ns());
    Ok(held)
}

/// What became of a pass.
struct Pass {
    /// False if it took too long. Its last read may be long, too.
    is_whole: bool,
    took: Duration,
}

/// Makes a pass.
fn pass(iter: &DescriptorIter, limit: Duration, each: impl FnMut(&SocketDescriptor)) -> io::Result<Pass> {
    let begin = Instant::now();
    let is_whole = match iter.pass(limit, each) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => false,
        Err(error) => return Err(error),
    };
    let took = begin.elapsed();
    log::debug!("a pass over the descriptors of all processes: {took:?}, to its end: {is_whole}");
    Ok(Pass { is_whole, took })
}

/// As [`read`], but keeps only these sockets, takes less time, and visits the processes of the last list. If the time
/// is over first, only some of a socket's holders may be found.
pub(super) fn read_holders(iter: &DescriptorIter, sockets: &HashSet<SocketRef>) -> io::Result<HeldSockets> {
    let limit = &mut SnapshotLimit::new(None);
    let collector = RefCell::new(Collector::new(limit));
    let wanted = RefCell::new(WantedSockets::new(sockets));
    let mut each = |record: &SocketDescriptor| {
        collector.borrow_mut().add_any(record, |socket| wanted.borrow_mut().take(socket));
    };
    // At the start of the daemon.
    process_list::wait_for_first(MAX_WAIT_FOR_LIST);
    let mut is_whole = false;
    if process_list::last_list_permits_pass() && !iter.is_paused() {
        let pass = pass(iter, MAX_PASS_FOR_EVENT, &mut each)?;
        is_whole = pass.is_whole;
        if pass.took >= MAX_PASS_FOR_EVENT + MAX_OVERRUN {
            iter.begin_pause();
        }
    }
    // Without a list nothing is visited: whoever is missing in it would seem to hold nothing.
    if !is_whole && let Some(list) = process_list::last_list() {
        let is_done = || wanted.borrow().are_found();
        is_whole =
            by_process::pass(iter, &list, MAX_VISITS_FOR_EVENT, is_done, each).unwrap_or_else(|error| {
                log::debug!("the processes can't be visited one by one: {error}");
                false
            });
    }
    let mut held = collector.into_inner().finish();
    held.holders.complete = is_whole;
    Ok(held)
}

/// The sockets that a pass looks for, and those of them that it has found.
struct WantedSockets {
    wanted: BySocket<()>,
    count: usize,
    found: HashSet<SocketRef>,
}

impl WantedSockets {
    fn new(sockets: &HashSet<SocketRef>) -> Self {
        let wanted = sockets.iter().map(|socket| (*socket, ())).collect();
        Self { wanted, count: sockets.len(), found: HashSet::new() }
    }

    /// True if this socket may be one of them. Then that is found.
    fn take(&mut self, socket: &SocketRef) -> bool {
        let mut is_wanted = false;
        for (wanted, ()) in self.wanted.candidates(socket) {
            is_wanted = true;
            self.found.insert(*wanted);
        }
        is_wanted
    }

    fn are_found(&self) -> bool {
        self.found.len() >= self.count
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::Endpoint;

    use super::*;

    #[test]
    fn a_search_does_not_end_with_another_socket_of_the_same_inode() {
        for cookies in [[Some(4), Some(31)], [None, None], [Some(4), None]] {
            let [other, wanted] = [(cookies[0], 4), (cookies[1], 40_000)].map(|(cookie, port)| SocketRef {
                cookie,
                inode: 5,
                endpoint: Some(Endpoint::new(5, [127, 0, 0, 1].into(), port, false)),
            });
            let mut search = WantedSockets::new(&[wanted].into());
            assert!(!search.take(&other) && !search.are_found(), "{cookies:?}");
            assert!(search.take(&wanted) && search.are_found(), "{cookies:?}");
        }
    }
}
