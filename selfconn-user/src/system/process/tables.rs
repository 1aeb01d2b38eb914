//! Descriptor tables of tasks.

use std::{
    io,
    sync::{
        Mutex, PoisonError,
        mpsc::{self, Receiver, Sender},
    },
    time::Duration,
};

use crate::system::capabilities;

/// How long a comparison may take.
const MAX_WAIT: Duration = Duration::from_millis(100);

static COMPARER: Mutex<Option<Comparer>> = Mutex::new(None);

/// True if two tasks share one table. False also if the kernel does not say, without `CONFIG_KCMP`, or if this
/// process may not trace both. `None`: it does not answer.
pub(crate) fn have_same_descriptors(one: u32, other: u32) -> Option<bool> {
    let mut comparer = COMPARER.lock().unwrap_or_else(PoisonError::into_inner);
    if comparer.is_none() {
        *comparer = Comparer::start(compare, MAX_WAIT).ok();
    }
    comparer.as_mut()?.compare(one, other)
}

/// kcmp(2). It waits for an execve() of the process that is in progress, and the process can make that last for ever,
/// with a file that is slow to close (`kcmp_lock`, kernel/kcmp.c, and `begin_new_exec`, fs/exec.c, at v6.12).
fn compare(one: u32, other: u32) -> bool {
    /// `enum kcmp_type`, include/uapi/linux/kcmp.h at v5.10.
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: the call takes numbers only.
    unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) == 0 }
}

/// A thread that compares. If it hangs, nothing is compared until it goes on: the sizes of all tables are unknown then,
/// and [`crate::sockets`] counts each thread as a large one.
struct Comparer {
    requests: Sender<(u32, u32)>,
    responses: Receiver<bool>,
    max_wait: Duration,
    hangs: bool,
}

impl Comparer {
    fn start(compare: impl Fn(u32, u32) -> bool + Send + 'static, max_wait: Duration) -> io::Result<Self> {
        let (requests, request_receiver) = mpsc::channel::<(u32, u32)>();
        let (response_sender, responses) = mpsc::channel();
        capabilities::spawn_restricted("tables", capabilities::LOOKUP_WORKER, move || {
            while let Ok((one, other)) = request_receiver.recv()
                && response_sender.send(compare(one, other)).is_ok()
            {}
        })?;
        Ok(Self { requests, responses, max_wait, hangs: false })
    }

    fn compare(&mut self, one: u32, other: u32) -> Option<bool> {
        if self.hangs && self.responses.try_recv().is_err() {
            return None;
        }
        self.requests.send((one, other)).ok()?;
        let response = self.responses.recv_timeout(self.max_wait).ok();
        self.hangs = response.is_none();
        response
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_task_shares_the_table_of_its_process_and_not_that_of_another() {
        let own = std::process::id();
        let tid = u32::try_from(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
        assert_eq!(have_same_descriptors(own, tid), Some(true));
        assert_eq!(have_same_descriptors(own, u32::MAX), Some(false), "there is none");
    }

    #[test]
    fn a_comparison_that_hangs_delays_one_caller_and_no_later_one() {
        let (end, ended) = mpsc::channel::<()>();
        let compare = move |one, other| one == other || ended.recv().is_ok();
        let mut comparer = Comparer::start(compare, Duration::from_millis(50)).unwrap();
        assert_eq!(comparer.compare(1, 1), Some(true));
        let began = Instant::now();
        assert_eq!([comparer.compare(1, 2), comparer.compare(1, 1), comparer.compare(1, 1)], [None; 3]);
        assert!(began.elapsed() < 2 * Duration::from_millis(50), "{:?}", began.elapsed());
        end.send(()).unwrap();
        let until = Instant::now() + Duration::from_secs(10);
        while comparer.compare(2, 2).is_none() {
            assert!(Instant::now() < until);
            std::thread::yield_now();
        }
        // The late response was not taken for a later one.
        drop(end);
        assert_eq!((comparer.compare(1, 2), comparer.compare(1, 1)), (Some(false), Some(true)));
    }
}
