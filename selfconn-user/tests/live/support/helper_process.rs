//! Helper processes: the test binary itself, started again with a task. A helper process shares the network
//! namespace of the thread that starts it.

use std::{
    io::{BufRead as _, BufReader},
    os::{
        fd::{AsFd, AsRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use socket2::Socket;

mod tasks;

const TASK_ENV: &str = "SELFCONN_TEST_HELPER_TASK";

/// The descriptor number that a passed socket gets in the helper process. It is far above the numbers that a
/// process opens by itself, because dup2 onto the same number would leave close-on-exec set.
const PASSED_FD: libc::c_int = 100;

/// The user and group id of an unprivileged helper process: nobody's.
pub(crate) const UNPRIVILEGED: u32 = 65_534;

/// A process that runs a task. It prints a line when its task is done, and ends when its stdin is closed.
pub(crate) struct HelperProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl HelperProcess {
    /// Starts this binary with a task.
    pub(crate) fn start(task: &str) -> Self {
        Self::spawn(&mut command(task))
    }

    /// Starts this binary with a task, and passes it a socket as descriptor [`PASSED_FD`].
    pub(crate) fn start_with_fd(task: &str, descriptor: &Socket) -> Self {
        Self::spawn(pass_fd(&mut command(task), descriptor))
    }

    /// As [`Self::start_with_fd`], as an unprivileged user.
    pub(crate) fn start_unprivileged_with_fd(task: &str, descriptor: &Socket) -> Self {
        let mut command = command(task);
        command.current_dir("/");
        become_unprivileged(pass_fd(&mut command, descriptor), None);
        Self::spawn(&mut command)
    }

    /// Starts this binary with a task as an unprivileged user, in the control group of this `cgroup.procs`.
    pub(crate) fn start_unprivileged(task: &str, cgroup_procs: Option<&std::fs::File>) -> Self {
        Self::start_unprivileged_with(task, cgroup_procs, &[])
    }

    /// Starts this program, which is a copy or a link of this binary.
    pub(crate) fn start_program(program: &std::path::Path, task: &str) -> Self {
        Self::spawn(&mut with_task(Command::new(program), task))
    }

    /// As [`Self::start_unprivileged`]; the process has these arguments besides its own.
    pub(crate) fn start_unprivileged_with(
        task: &str,
        cgroup_procs: Option<&std::fs::File>,
        arguments: &[&str],
    ) -> Self {
        let mut command = command(task);
        command.args(arguments).current_dir("/");
        become_unprivileged(&mut command, cgroup_procs);
        Self::spawn(&mut command)
    }

    /// Starts a program whose last arguments are a command, with this binary as that command.
    pub(crate) fn start_below(runner: Command, task: &str) -> Self {
        Self::spawn(&mut command_below(runner, task))
    }

    fn spawn(command: &mut Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line that the process prints. The lines of libtest itself are skipped.
    pub(crate) fn read_output(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the helper process printed nothing");
            if let Some((_, output)) = line.split_once("helper: ") {
                return output.trim_end().to_owned();
            }
        }
    }

    /// Closes its stdin and waits until it ends.
    pub(crate) fn finish(mut self) {
        self.stdin.take();
        let _ = self.child.wait().unwrap();
    }

    /// Sends SIGKILL and waits until it ends.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Lets the process have this socket as descriptor [`PASSED_FD`]. The socket must outlive the start.
fn pass_fd<'a>(command: &'a mut Command, descriptor: &Socket) -> &'a mut Command {
    let fd = descriptor.as_raw_fd();
    let pass = move || {
        // SAFETY: the call takes numbers only.
        let passed = unsafe { libc::dup2(fd, PASSED_FD) };
        if passed == PASSED_FD { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: dup2 is safe to call between fork and exec.
    unsafe { command.pre_exec(pass) }
}

/// Lets the process be of an unprivileged user, in the control group of this `cgroup.procs`, which must outlive the
/// start.
fn become_unprivileged(command: &mut Command, cgroup_procs: Option<&std::fs::File>) {
    let procs = cgroup_procs.map(std::os::fd::AsRawFd::as_raw_fd);
    // SAFETY: write, setgroups, setgid and setuid are safe to call between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let is_done = procs.is_none_or(|fd| libc::write(fd, c"0".as_ptr().cast(), 1) == 1)
                && libc::setgroups(0, std::ptr::null()) == 0
                && libc::setgid(UNPRIVILEGED) == 0
                && libc::setuid(UNPRIVILEGED) == 0;
            if is_done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
}

/// The path of a function in this module, as libtest names it: without the crate.
fn test_path(function: &str) -> String {
    let (_, module) = module_path!().split_once("::").unwrap();
    format!("{module}::{function}")
}

fn command(task: &str) -> Command {
    with_task(Command::new("/proc/self/exe"), task)
}

/// A program whose last arguments are a command, with this binary as that command.
pub(crate) fn command_below(mut runner: Command, task: &str) -> Command {
    runner.arg(std::env::current_exe().unwrap());
    with_task(runner, task)
}

/// The command of a program that is this binary.
fn with_task(mut command: Command, task: &str) -> Command {
    command
        .args(["--exact", &test_path("run_helper_process"), "--ignored", "--nocapture"])
        .env(TASK_ENV, task);
    command
}

/// Sends a socket to the process at the other end of a Unix socket.
pub(crate) fn send_fd(socket: &Socket, through: &Socket) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)));
    // A descriptor cannot be sent without at least one byte of data.
    sendmsg(through, &[std::io::IoSlice::new(b"s")], &mut rights, SendFlags::empty()).unwrap();
}

pub(crate) fn receive_fd(from: impl AsFd) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [std::io::IoSliceMut::new(&mut [0])], &mut rights, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut received = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.next().expect("the message has a descriptor")
}

/// Not a test: runs the task of a helper process.
#[test]
#[ignore = "runs in processes that other tests start"]
fn run_helper_process() {
    let Ok(task) = std::env::var(TASK_ENV) else { return };
    tasks::run_task(&task);
    // libtest would print its result to a pipe that nobody reads any more, and then an error into the output
    // of the tests.
    std::process::exit(0);
}
