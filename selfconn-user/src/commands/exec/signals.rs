//! The signals of `selfconn exec`: they are the command's. Those of a terminal reach the command without our help,
//! because it is in the same process group.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    mem::{MaybeUninit, size_of},
    os::fd::FromRawFd as _,
};

use rustix::process::{Resource, Rlimit, Signal, getpid, kill_process, setrlimit};

/// Signals that are passed on, and SIGCHLD.
const WATCHED: [libc::c_int; 10] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGALRM,
    libc::SIGTSTP,
    libc::SIGCONT,
    libc::SIGCHLD,
];

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalEvent {
    /// A child has ended, stopped or continued.
    Child,
    /// The process with this pid sent this signal. 0: it is in another pid namespace.
    Sent(Signal, u32),
    /// The kernel sent one, as for a terminal, to all of the process group.
    OfKernel,
}

/// Blocked signals, read one by one. Signals that were ignored stay so for the command.
#[derive(Debug)]
pub(super) struct Signals {
    descriptor: File,
    before: SignalMask,
}

/// The signals that are blocked.
#[derive(Clone, Copy)]
pub(super) struct SignalMask(libc::sigset_t);

impl fmt::Debug for SignalMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SignalMask")
    }
}

impl SignalMask {
    /// Blocks these signals in the calling thread, and no others. A child calls it between fork and execve.
    pub(super) fn set(&self) {
        // SAFETY: the pointer is valid, and the system call has no other effect.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

impl Signals {
    /// Blocks the signals in this thread, in those that it starts, and in its children.
    ///
    /// # Errors
    /// If the kernel refuses a descriptor.
    pub(super) fn block() -> io::Result<Self> {
        let (mut set, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        // SAFETY: the pointers are valid, and both sets are initialized before they are used.
        let (descriptor, before) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in WATCHED {
                libc::sigaddset(set.as_mut_ptr(), signal);
            }
            libc::sigemptyset(before.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr());
            (libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC), before.assume_init())
        };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new, and nobody else has it.
        let descriptor = unsafe { File::from_raw_fd(descriptor) };
        Ok(Self { descriptor, before: SignalMask(before) })
    }

    /// The signals that were blocked before.
    pub(super) fn before(&self) -> SignalMask {
        self.before
    }

    /// Waits for the next signal.
    ///
    /// # Errors
    /// If it can't be read.
    pub(super) fn next(&mut self) -> io::Result<SignalEvent> {
        let mut bytes = [0; size_of::<libc::signalfd_siginfo>()];
        self.descriptor.read_exact(&mut bytes)?;
        let number = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        // ssi_signo, ssi_code, ssi_pid: include/uapi/linux/signalfd.h at v5.10.
        let (signal, code, sender) = (number(0) as i32, number(8) as i32, number(12));
        Ok(match Signal::from_named_raw(signal) {
            Some(Signal::CHILD) | None => SignalEvent::Child,
            Some(signal) if code <= 0 => SignalEvent::Sent(signal, sender),
            Some(_) => SignalEvent::OfKernel,
        })
    }
}

/// Stops this process as the command was stopped, until it is continued.
pub(super) fn stop() {
    let _ = kill_process(getpid(), Signal::STOP);
}

/// Ends this process by the signal that ended the command, without a core of our own.
pub(super) fn die_by(signal: i32) -> ! {
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let mut set = MaybeUninit::uninit();
    // SAFETY: the pointers are valid, and sigemptyset initializes the set before it is used.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), std::ptr::null_mut());
        libc::raise(signal);
    }
    // The signal does not end a process, or is delivered to process 1.
    std::process::exit(128 + signal)
}
