//! The descriptors of one process after another, for a host on which a pass over all descriptors takes too long: a user
//! has millions of them, or processes that share them. The processes come in an order in which no owner waits for more
//! of another than it has itself.

use std::{
    collections::HashMap,
    fs, io,
    time::{Duration, Instant},
};

use selfconn_ebpf::{Owner, SocketDescriptor};

use crate::{bpf::descriptors::DescriptorIter, budget::cheapest_owners_first};

/// What a process costs beside its descriptors, in descriptors.
const PROCESS_COST: u64 = 100;

/// Calls `each` for every record of the processes, in their order, until `is_done`, or until this much time has passed.
///
/// # Errors
/// If the kernel can't make a pass over one process, as before Linux 6.1.
pub(super) fn pass(
    iter: &DescriptorIter,
    limit: Duration,
    is_done: impl Fn() -> bool,
    mut each: impl FnMut(&SocketDescriptor),
) -> io::Result<()> {
    let begin = Instant::now();
    let until = begin + limit;
    let processes = cheapest_owners_first(list());
    let (count, listed_after, mut visited) = (processes.len(), begin.elapsed(), 0);
    for pid in processes {
        if is_done() || Instant::now() >= until {
            break;
        }
        visited += 1;
        match iter.pass_of_process(pid, until, &mut each) {
            // Not all of this process.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => break,
            other => other?,
        }
    }
    let elapsed = begin.elapsed();
    log::debug!(
        "the descriptors of {visited} of {count} processes in {elapsed:?}, their list in {listed_after:?}"
    );
    Ok(())
}

/// The processes that `/proc` shows, with their owners and costs.
fn list() -> Vec<(Owner, u64, u32)> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut cgroups = HashMap::new();
    // A process that ends meanwhile has nothing.
    pids.filter_map(|pid: u32| {
        let uid = real_uid(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?)?;
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        // Any number but 0, which is an unknown one.
        let next = cgroups.len() as u64 + 1;
        let cgroup = *cgroups.entry(cgroup).or_insert(next);
        // From Linux 6.2 on this is the number of descriptors (`proc_fd_getattr`, fs/proc/fd.c at v6.2); before, it is 0.
        let descriptors = fs::metadata(format!("/proc/{pid}/fd")).map_or(0, |folder| folder.len());
        Some((Owner::new(uid, cgroup), PROCESS_COST + descriptors, pid))
    })
    .collect()
}

/// Who started the process, also if it can't be traced: then the files below `/proc/PID` are root's.
fn real_uid(status: &str) -> Option<u32> {
    status.lines().find_map(|line| line.strip_prefix("Uid:"))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_real_user_is_read() {
        let status = "Name:\tsshd\nUmask:\t0022\nUid:\t1000\t0\t0\t0\nGid:\t5\t5\t5\t5\n";
        assert_eq!(real_uid(status), Some(1_000));
        assert_eq!(real_uid("Name:\tUid: 3\n"), None);
    }

    #[test]
    fn this_process_is_listed_with_its_user_and_cost() {
        let uid = rustix::process::getuid().as_raw();
        let (owner, cost, _) = list().into_iter().find(|(.., pid)| *pid == std::process::id()).unwrap();
        assert_eq!(owner.uid, uid);
        assert!(cost >= PROCESS_COST && owner.cgroup != 0);
    }
}
