//! Look-ups for commands: the caller waits, but not for a process that does not let its arguments be read.

use std::{
    io,
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread,
    time::Duration,
};

use selfconn_ebpf::Owner;

use super::{DEADLINE, MAX_STUCK};
use crate::{
    budget::{is_share_taken, owner_of_user},
    system::{
        command_line::CommandLine,
        process::{self, ProcessFacts, ProcessInfo, ProcessKey, ProcessProof},
    },
};

/// Reads processes, one at a time. A thread that hangs is left alone; the process ends by exit, which ends the
/// thread as well.
#[derive(Debug, Default)]
pub struct BlockingLookups {
    reader: Option<CmdlineThread>,
    /// The owners of the processes that hung: see [`is_share_taken`].
    stuck: Vec<Owner>,
    /// Number of processes whose arguments were not read because of that.
    given_up: usize,
}

#[derive(Debug)]
struct CmdlineThread {
    requests: Sender<ProcessKey>,
    responses: Receiver<Option<CommandLine>>,
}

impl CmdlineThread {
    fn start() -> io::Result<Self> {
        let (requests, receiver) = mpsc::channel();
        let (sender, responses) = mpsc::channel();
        thread::Builder::new().name("cmdline".to_owned()).spawn(move || {
            for key in receiver {
                if sender.send(process::read_cmdline(key)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { requests, responses })
    }

    /// `Err`: the thread hangs.
    fn read(&self, key: ProcessKey, deadline: Duration) -> Result<Option<CommandLine>, RecvTimeoutError> {
        let _ = self.requests.send(key);
        self.responses.recv_timeout(deadline)
    }
}

impl BlockingLookups {
    /// Information about the process with this pid that started at this time, in clock ticks since boot.
    pub fn read(&mut self, pid: u32, start_ticks: u64) -> Option<ProcessInfo> {
        let proof = ProcessProof::Started(start_ticks);
        let ProcessFacts { info, arg_start, uid, .. } = process::read_facts(pid, &proof, true)?;
        let key = ProcessKey { pid, start_ticks, arg_start };
        Some(info.with_cmdline(self.read_cmdline(key, owner_of_user(Some(uid)))))
    }

    fn read_cmdline(&mut self, key: ProcessKey, owner: Owner) -> Option<CommandLine> {
        let free = MAX_STUCK.saturating_sub(self.stuck.len());
        if free == 0 || is_share_taken(self.stuck.iter(), owner, free) {
            self.given_up += 1;
            return None;
        }
        if self.reader.is_none() {
            self.reader = CmdlineThread::start().ok();
        }
        match self.reader.as_ref()?.read(key, DEADLINE) {
            Ok(cmdline) => cmdline,
            Err(_) => {
                self.reader = None;
                self.stuck.push(owner);
                self.given_up += 1;
                None
            }
        }
    }

    /// What could not be read, as text for people.
    #[must_use]
    pub fn unseen(&self) -> Option<String> {
        let given_up = self.given_up;
        (given_up != 0).then(|| {
            format!(
                "command lines of processes ({given_up}): a process does not let its command line be read"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn this_process() -> (u32, u64) {
        let pid = std::process::id();
        (pid, process::start_ticks_of(process::start_time_ns(pid).unwrap()))
    }

    #[test]
    fn a_process_is_read_with_its_arguments() {
        let mut lookups = BlockingLookups::default();
        let (pid, start_ticks) = this_process();
        let info = lookups.read(pid, start_ticks).unwrap();
        assert!(info.cmdline.unwrap().arguments().eq(std::env::args()));
        assert!(info.exe.is_some());
        assert_eq!(lookups.read(pid, start_ticks + 1), None, "the pid was another process's");
        assert_eq!((lookups.read(u32::MAX, start_ticks), lookups.unseen()), (None, None));
    }

    #[test]
    fn nothing_more_is_read_of_an_owner_whose_process_hung() {
        let mut lookups = BlockingLookups::default();
        let ((pid, start_ticks), uid) = (this_process(), rustix::process::geteuid().as_raw());
        lookups.stuck.push(Owner::new(uid, 0));
        let info = lookups.read(pid, start_ticks).unwrap();
        assert!(info.exe.is_some() && info.cmdline.is_none(), "{info:?}");
        assert!(lookups.unseen().unwrap().contains("(1)"));
        lookups.stuck = (1..=MAX_STUCK as u32).map(|other| Owner::new(uid + other, 0)).collect();
        assert_eq!(lookups.read(pid, start_ticks).unwrap().cmdline, None, "too many hang");
        lookups.stuck.clear();
        assert!(lookups.read(pid, start_ticks).unwrap().cmdline.is_some());
    }
}
