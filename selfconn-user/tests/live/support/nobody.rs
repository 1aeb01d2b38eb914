//! Hostile processes: the test binary, started again as uid 65534 without any privilege in the initial user
//! namespace.

use std::{
    ffi::{CStr, OsStr},
    fs::{self, Permissions},
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr},
    os::unix::{fs::PermissionsExt as _, process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    process::{Resource, getrlimit},
};

use super::client::{connect_to_self, hold_port_at_every_address, socket};
use hung::OnceHung;

mod descriptors;
mod flood;
mod hung;
mod lingering;

/// The user of these processes.
pub(crate) const NOBODY: u32 = 65_534;

/// How many descriptors such a process may have.
const MAX_DESCRIPTORS: u64 = 20_000;

/// How many slots a large table has, unless this machine permits fewer.
const LARGE_TABLE: u64 = 500_000;

const TASK_ENV: &str = "SELFCONN_TEST_NOBODY_TASK";
const FOLDER_ENV: &str = "SELFCONN_TEST_NOBODY_FOLDER";

/// The first thread of a process whose other threads share a large table of descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FirstThread {
    HasEnded,
    /// It has a small table for itself.
    HasAnotherTable,
}

/// Such a process. It ends when this value is dropped.
pub(crate) struct Nobody {
    child: Child,
    stdout: BufReader<ChildStdout>,
    _folder: tempfile::TempDir,
}

impl Nobody {
    /// A process whose `/proc/PID/cmdline` cannot be read: whoever tries waits until the process is killed.
    /// Then it connects a socket to itself, and [`Self::wait`] returns. `None`: this kernel has no FUSE.
    pub(crate) fn hung() -> Option<Self> {
        Self::hung_at("hang")
    }

    /// As [`Self::hung`]. Soon after the output, it closes its socket.
    pub(crate) fn hung_closing() -> Option<Self> {
        Self::hung_at("hang and close")
    }

    /// As [`Self::hung`], but it makes this number of self-connections, and resets each.
    pub(crate) fn hung_making(connections: usize) -> Option<Self> {
        Self::hung_at(&format!("hang and make {connections}"))
    }

    fn hung_at(task: &str) -> Option<Self> {
        let folder = folder();
        let device = folder.path().join("fuse");
        // /dev/fuse is open to everybody, as udev makes it. A container may have none, so the test makes it.
        mknodat(CWD, &device, FileType::CharacterDevice, Mode::from_raw_mode(0o666), makedev(10, 229))
            .unwrap();
        fs::set_permissions(&device, Permissions::from_mode(0o666)).unwrap();
        if let Err(error) = fs::File::options().read(true).write(true).open(&device) {
            println!("FACT no_fuse={error}");
            return None;
        }
        fs::create_dir(folder.path().join("mount")).unwrap();
        fs::set_permissions(folder.path().join("mount"), Permissions::from_mode(0o777)).unwrap();
        Some(Self::start(task, folder, true, MAX_DESCRIPTORS))
    }

    /// A process that makes self-connections as fast as it can, and resets each.
    pub(crate) fn connecting() -> Self {
        Self::start("connect without end", folder(), false, MAX_DESCRIPTORS)
    }

    /// A process that connects to this server some thousand times a second.
    pub(crate) fn flooding(server: SocketAddr) -> Self {
        Self::start(&format!("flood {server}"), folder(), false, MAX_DESCRIPTORS)
    }

    /// A process that fails binds of a port that a self-connection holds, as fast as it can, at ever other addresses.
    pub(crate) fn failing_binds() -> Self {
        Self::start("fail binds", folder(), false, MAX_DESCRIPTORS)
    }

    /// Many processes with one table of many descriptors, each of which a walk over all tasks visits for each process.
    /// They end in order: if process 1 had to wait for each, it would be busy while the next test runs.
    pub(crate) fn sharing_descriptors() -> Self {
        let folder = folder();
        Self::spawn(confined("share descriptors", &folder, false, MAX_DESCRIPTORS), folder, Stdio::piped())
    }

    /// A process that has no descriptor, but many threads with one large table. A walk over all tasks goes through it
    /// for each thread.
    pub(crate) fn sharing_large_table(first_thread: FirstThread) -> Self {
        let task = match first_thread {
            FirstThread::HasEnded => "share a large table without a first thread",
            FirstThread::HasAnotherTable => "share a large table beside the first thread",
        };
        let permitted = getrlimit(Resource::Nofile).maximum.unwrap_or(u64::MAX);
        Self::start(task, folder(), false, LARGE_TABLE.min(permitted))
    }

    /// A process that makes this number of sockets whose close waits for an hour, and closes each. Then [`Self::wait`]
    /// returns.
    pub(crate) fn closing_lingering(count: usize) -> Self {
        Self::start(&format!("close lingering {count}"), folder(), false, MAX_DESCRIPTORS)
    }

    /// A process that holds a self-connection. In its mount namespace, but nowhere else, the file at this path is the
    /// test binary, and that is what it runs.
    pub(crate) fn at_path(path: &Path) -> Self {
        use rustix::mount::{MountPropagationFlags, mount_bind, mount_change};
        let own = std::env::current_exe().unwrap();
        let mounted = path.to_owned();
        let mut command = command_of(path.as_os_str(), "connect");
        // SAFETY: the closure makes system calls only; the paths are short enough to need no allocation.
        unsafe {
            command.pre_exec(move || {
                check(libc::unshare(libc::CLONE_NEWNS))?;
                mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
                mount_bind(&own, &mounted)?;
                become_nobody(false, MAX_DESCRIPTORS)
            });
        }
        Self::spawn(command, folder(), Stdio::null())
    }

    fn start(task: &str, folder: tempfile::TempDir, has_user_namespace: bool, max_descriptors: u64) -> Self {
        let command = confined(task, &folder, has_user_namespace, max_descriptors);
        Self::spawn(command, folder, Stdio::null())
    }

    /// Starts the process. With a pipe as its stdin, it ends when the pipe does.
    fn spawn(mut command: Command, folder: tempfile::TempDir, stdin: Stdio) -> Self {
        command.stdin(stdin).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout, _folder: folder }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the process is what it is made for.
    pub(crate) fn wait(&mut self) {
        let mut line = String::new();
        while !line.contains("nobody: ") {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the process printed nothing");
        }
    }
}

impl Drop for Nobody {
    fn drop(&mut self) {
        if self.child.stdin.is_none() {
            let _ = self.child.kill();
        }
        // Ends the pipe first.
        let _ = self.child.wait();
    }
}

/// A folder that everybody may enter.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
}

/// The command of a process without any privilege, which may use this folder.
fn confined(
    task: &str,
    folder: &tempfile::TempDir,
    has_user_namespace: bool,
    max_descriptors: u64,
) -> Command {
    let mut command = command(task);
    command.env(FOLDER_ENV, folder.path());
    // SAFETY: the closure only makes system calls.
    unsafe { command.pre_exec(move || become_nobody(has_user_namespace, max_descriptors)) };
    command
}

fn command(task: &str) -> Command {
    command_of("/proc/self/exe".as_ref(), task)
}

/// The test binary, under this path.
fn command_of(path: &OsStr, task: &str) -> Command {
    let (_, module) = module_path!().split_once("::").unwrap();
    let mut command = Command::new(path);
    command
        .args(["--exact", &format!("{module}::run_nobody"), "--ignored", "--nocapture"])
        .env(TASK_ENV, task);
    command
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives up every privilege. With a user namespace, it gets one of its own, and a mount namespace below it.
fn become_nobody(has_user_namespace: bool, max_descriptors: u64) -> io::Result<()> {
    let write = |path: &CStr, text: &[u8]| -> io::Result<()> {
        // SAFETY: `path` and `text` are valid for the calls.
        unsafe {
            let fd = libc::open(path.as_ptr(), libc::O_WRONLY);
            check(fd)?;
            let written = libc::write(fd, text.as_ptr().cast(), text.len());
            libc::close(fd);
            if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        }
    };
    // SAFETY: all arguments are valid.
    unsafe {
        let limit = libc::rlimit { rlim_cur: max_descriptors, rlim_max: max_descriptors };
        check(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit))?;
        check(libc::setgroups(0, std::ptr::null()))?;
        check(libc::setgid(NOBODY))?;
        check(libc::setuid(NOBODY))?;
        // A change of the user hides /proc/self from it.
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1))?;
        if has_user_namespace {
            check(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNS))?;
            write(c"/proc/self/setgroups", b"deny")?;
            write(c"/proc/self/uid_map", b"0 65534 1")?;
            write(c"/proc/self/gid_map", b"0 65534 1")?;
        }
    }
    Ok(())
}

/// Not a test: what these processes do.
#[test]
#[ignore = "runs in processes that other tests start"]
fn run_nobody() {
    let Ok(task) = std::env::var(TASK_ENV) else { return };
    let folder = PathBuf::from(std::env::var_os(FOLDER_ENV).unwrap_or_default());
    if let Some(connections) = task.strip_prefix("hang and make ") {
        hung::hang(&folder, OnceHung::Make(connections.parse().unwrap()));
    }
    if let Some(count) = task.strip_prefix("close lingering ") {
        lingering::close_lingering(count.parse().unwrap());
    }
    if let Some(server) = task.strip_prefix("flood ") {
        flood::flood(server.parse().unwrap(), b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    }
    match task.as_str() {
        "hang" => hung::hang(&folder, OnceHung::Hold),
        "hang and close" => hung::hang(&folder, OnceHung::HoldAndClose),
        "serve" => hung::serve(),
        "connect without end" => connect_without_end(),
        "fail binds" => fail_binds(),
        "share descriptors" => descriptors::share_descriptors(),
        "share a large table without a first thread" => descriptors::share_large_table(FirstThread::HasEnded),
        "share a large table beside the first thread" => {
            descriptors::share_large_table(FirstThread::HasAnotherTable);
        }
        "connect" => {
            let _held = connect_to_self(Ipv4Addr::LOCALHOST.into());
            print_output("connected");
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
        other => panic!("unknown task {other}"),
    }
}

fn print_output(text: &str) {
    let mut stdout = io::stdout();
    writeln!(stdout, "nobody: {text}").unwrap();
    stdout.flush().unwrap();
}

/// Makes self-connections, and resets each, because TIME_WAITs would exhaust the ports.
fn connect_without_end() {
    let began = Instant::now();
    for number in 0_u64.. {
        let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        if number == 100 {
            print_output(&format!("{:?}", began.elapsed()));
        }
    }
}

/// Binds a port that a self-connection holds, at one address of 127.0.0.0/8 after another.
fn fail_binds() {
    let (_held, port) = hold_port_at_every_address();
    let server = socket(Ipv4Addr::LOCALHOST.into());
    let began = Instant::now();
    for number in 0_u32.. {
        let [_, b, c, d] = number.to_be_bytes();
        let address = SocketAddr::from(([127, b, c, d], port));
        assert!(server.bind(&address.into()).is_err());
        if number == 1_000 {
            print_output(&format!("{:?}", began.elapsed()));
        }
    }
}
