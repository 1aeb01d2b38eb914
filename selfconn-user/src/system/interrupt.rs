//! Interrupts this thread in a system call in which the kernel closes a file of another process, because such a close
//! may wait for as long as that process wants.
//!
//! Whoever looks at the descriptors of another process holds each file for a moment: the iterator over descriptors
//! (`task_file_seq_next` and `task_file_seq_stop`, kernel/bpf/task_iter.c), and from v5.11 on a look at a link in
//! `/proc/PID/fd` (`proc_fd_link`, fs/proc/fd.c). Whoever reads `/proc/PID/stat` holds the memory of the process, and
//! with it the files that are mapped there. If the process gives the file up in that moment, ours is the last
//! reference. Then the kernel closes the file in this thread, when the system call returns to user space (`fput`,
//! fs/file_table.c). The close of a TCP socket with `SO_LINGER` waits until the peer has acknowledged all data, or
//! until a time has passed that the user of the socket chooses (`inet_release`, net/ipv4/af_inet.c). Any signal ends
//! that wait (`sk_stream_wait_close`, net/core/stream.c). All at v6.12.
//!
//! The kernel then goes on to send the data, so nobody loses anything by the signal, and the other system calls here
//! do not look at signals, or are started again. What waits without looking at signals is not interrupted.

use std::{
    cell::{Cell, OnceCell},
    io, mem, ptr,
    time::Duration,
};

/// Nothing else in this process uses this signal. Where it has no handler, it is ignored.
const SIGNAL: libc::c_int = libc::SIGURG;

/// How long a call takes before it is interrupted. A read of the iterator returns after a million descriptors, which
/// takes 0.3 s on 6.18. To interrupt one that takes longer does no harm: the kernel does not look at signals there
/// (`bpf_seq_read`, kernel/bpf/bpf_iter.c at v6.12).
const FIRST_AFTER: Duration = Duration::from_millis(500);

/// Then it is interrupted again and again, because one call may close many files. While a signal waits for its handler,
/// no close waits.
const AGAIN_AFTER: Duration = Duration::from_millis(100);

thread_local! {
    static TIMER: ThreadTimer = const { ThreadTimer { timer: OnceCell::new(), has_warned: Cell::new(false) } };
}

/// The timer of a thread.
struct ThreadTimer {
    /// Empty: the kernel has permitted none yet. All processes of a user share a number of them (`RLIMIT_SIGPENDING`).
    timer: OnceCell<Timer>,
    has_warned: Cell<bool>,
}

impl ThreadTimer {
    fn get(&self) -> Option<&Timer> {
        if self.timer.get().is_none() {
            match Timer::new() {
                Ok(timer) => drop(self.timer.set(timer)),
                Err(error) if !self.has_warned.replace(true) => {
                    log::warn!("a socket that lingers for long may stop this thread: no timer: {error}");
                }
                Err(_) => {}
            }
        }
        self.timer.get()
    }
}

/// Makes the timer of this thread now, and not when it is needed, when other processes of this user may have taken all.
pub fn prepare() {
    TIMER.with(|timer| {
        timer.get();
    });
}

/// Runs `call`, which looks at files of another process. While it runs, its system calls are interrupted as described
/// above. A system call that waits for something else, such as poll(2), may fail with `EINTR`.
pub fn bounded<T>(call: impl FnOnce() -> T) -> T {
    TIMER.with(|timer| {
        let _running = timer.get().and_then(Timer::start);
        call()
    })
}

/// A timer that sends the signal to the thread that has created it.
struct Timer {
    id: libc::timer_t,
    is_running: Cell<bool>,
}

/// Stops the timer when it is dropped.
struct Running<'a>(&'a Timer);

impl Timer {
    fn new() -> io::Result<Self> {
        handle_signal()?;
        let thread = rustix::thread::gettid().as_raw_nonzero().get();
        let mut id = ptr::null_mut();
        // SAFETY: zeroes are a valid value of `sigevent`, which is integers and pointers. The kernel reads the event
        // and writes the id, both of which live for the call.
        let outcome = unsafe {
            let mut event: libc::sigevent = mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = SIGNAL;
            event.sigev_notify_thread_id = thread;
            libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut id)
        };
        check(outcome)?;
        Ok(Self { id, is_running: Cell::new(false) })
    }

    /// `None`: it runs already, for a call around this one.
    fn start(&self) -> Option<Running<'_>> {
        if self.is_running.replace(true) {
            return None;
        }
        self.set(FIRST_AFTER, AGAIN_AFTER);
        Some(Running(self))
    }

    /// Zero: never.
    fn set(&self, first: Duration, again: Duration) {
        // Both are less than a second.
        let time = |time: Duration| libc::timespec { tv_sec: 0, tv_nsec: time.subsec_nanos().into() };
        let times = libc::itimerspec { it_interval: time(again), it_value: time(first) };
        // SAFETY: the timer exists, and the times live for the call. It fails for no valid timer and times.
        unsafe { libc::timer_settime(self.id, 0, &raw const times, ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer exists, and nothing uses it after this.
        unsafe { libc::timer_delete(self.id) };
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.set(Duration::ZERO, Duration::ZERO);
        self.0.is_running.set(false);
    }
}

/// Has the signal interrupt a wait of this thread, and do nothing else. A system call that can be started again is.
fn handle_signal() -> io::Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: zeroes are a valid value of both types, which are integers. All pointers are valid for the calls. The
    // handler does nothing, so it may interrupt any code.
    unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigemptyset(&raw mut action.sa_mask);
        check(libc::sigaction(SIGNAL, &raw const action, ptr::null_mut()))?;
        // Whoever has started this process may have blocked it.
        let mut signals: libc::sigset_t = mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, SIGNAL);
        match libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const signals, ptr::null_mut()) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write as _,
        net::{TcpListener, TcpStream},
        sync::Mutex,
        thread,
        time::Instant,
    };

    use rustix::{
        event::{PollFd, PollFlags, Timespec, poll},
        io::Errno,
        process::{Resource, Rlimit, getrlimit, setrlimit},
    };
    use socket2::SockRef;

    use super::*;

    /// Waits for a pipe that nobody writes to.
    fn wait_for_pipe(limit: Duration) -> Result<usize, Errno> {
        let (reader, _writer) = io::pipe().unwrap();
        let limit = Timespec::try_from(limit).unwrap();
        poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&limit))
    }

    /// The limit on timers is the process's, so a test that changes it runs alone.
    static ALONE: Mutex<()> = Mutex::new(());

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn a_thread_that_got_no_timer_gets_one_as_soon_as_the_kernel_permits_it() {
        let _alone = ALONE.lock();
        let limit = getrlimit(Resource::Sigpending);
        let test = move || {
            setrlimit(Resource::Sigpending, Rlimit { current: Some(0), ..limit }).unwrap();
            prepare();
            let without = bounded(|| wait_for_pipe(FIRST_AFTER + 2 * AGAIN_AFTER));
            setrlimit(Resource::Sigpending, limit).unwrap();
            (without, bounded(|| wait_for_pipe(LONG)))
        };
        assert_eq!(thread::spawn(test).join().unwrap(), (Ok(0), Err(Errno::INTR)));
    }

    #[test]
    fn a_long_call_is_interrupted_again_and_again_and_one_of_another_thread_is_not() {
        let _alone = ALONE.lock();
        let other = thread::spawn(|| wait_for_pipe(FIRST_AFTER + 4 * AGAIN_AFTER));
        let began = Instant::now();
        bounded(|| {
            assert_eq!(wait_for_pipe(LONG), Err(Errno::INTR));
            assert!(began.elapsed() >= FIRST_AFTER, "{:?}", began.elapsed());
            // A call within another one does not end its time.
            assert_eq!(bounded(|| wait_for_pipe(LONG)), Err(Errno::INTR));
            assert_eq!(wait_for_pipe(LONG), Err(Errno::INTR));
        });
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        assert_eq!(other.join().unwrap(), Ok(0));
        assert_eq!(wait_for_pipe(FIRST_AFTER + 2 * AGAIN_AFTER), Ok(0), "nothing is interrupted after it");
        // The time of each call begins anew.
        bounded(|| assert_eq!(wait_for_pipe(FIRST_AFTER / 4), Ok(0)));
        bounded(|| assert_eq!(wait_for_pipe(FIRST_AFTER / 4), Ok(0)));
    }

    #[test]
    fn a_socket_that_lingers_is_closed_in_a_moment_and_without_an_interruption_when_its_time_is_over() {
        const LINGER: Duration = Duration::from_secs(5);
        let _alone = ALONE.lock();
        /// Closes a socket whose data nobody acknowledges.
        fn close(closes: impl FnOnce(TcpStream)) -> Duration {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let _peer = listener.accept().unwrap();
            client.set_nonblocking(true).unwrap();
            // The peer reads nothing. When its window is full, it takes nothing more.
            while client.write(&[0; 1 << 16]).is_ok() {
                while client.write(&[0; 1 << 16]).is_ok() {}
                thread::sleep(Duration::from_millis(50));
            }
            SockRef::from(&client).set_linger(Some(LINGER)).unwrap();
            let began = Instant::now();
            closes(client);
            began.elapsed()
        }
        let without = thread::spawn(|| close(drop));
        let bounded = close(|client| bounded(|| drop(client)));
        assert!((FIRST_AFTER..LINGER).contains(&bounded), "{bounded:?}");
        let without = without.join().unwrap();
        assert!(without >= LINGER, "{without:?}");
    }
}
