//! Hostile processes: the test binary, started again as uid 65534 without any privilege in the initial user
//! namespace.

use std::{
    ffi::{CStr, OsStr},
    fs::{self, Permissions},
    io::{self, BufRead as _, BufReader, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{fs::PermissionsExt as _, process::CommandExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{CWD, FileType, Mode, makedev, mknodat},
    process::{Resource, getrlimit},
};

use super::client::{connect_to_self, socket};

/// The user of these processes.
pub(crate) const NOBODY: u32 = 65_534;

/// How many descriptors such a process may have.
const MAX_DESCRIPTORS: u64 = 20_000;

/// How many slots a large table has, unless this machine permits fewer.
const LARGE_TABLE: u64 = 500_000;

const TASK_ENV: &str = "SELFCONN_TEST_NOBODY_TASK";
const FOLDER_ENV: &str = "SELFCONN_TEST_NOBODY_FOLDER";

/// A process that is hung closes its socket this long after its output.
const CLOSES_AFTER: Duration = Duration::from_millis(300);

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
    /// Then it connects a socket to itself, and [`Self::read_output`] returns. `None`: this kernel has no FUSE.
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

    /// A process that fails binds as fast as it can, at ever other addresses.
    pub(crate) fn failing_binds() -> Self {
        Self::start("fail binds", folder(), false, MAX_DESCRIPTORS)
    }

    /// Many processes with one table of many descriptors, each of which a walk over all tasks visits for each process.
    pub(crate) fn sharing_descriptors() -> Self {
        Self::start("share descriptors", folder(), false, MAX_DESCRIPTORS)
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
        Self::spawn(command, folder())
    }

    fn start(task: &str, folder: tempfile::TempDir, has_user_namespace: bool, max_descriptors: u64) -> Self {
        let mut command = command(task);
        command.env(FOLDER_ENV, folder.path());
        // SAFETY: the closure only makes system calls.
        unsafe { command.pre_exec(move || become_nobody(has_user_namespace, max_descriptors)) };
        Self::spawn(command, folder)
    }

    fn spawn(mut command: Command, folder: tempfile::TempDir) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped());
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
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder that everybody may enter.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    folder
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
        hang(&folder, OnceHung::Make(connections.parse().unwrap()));
    }
    match task.as_str() {
        "hang" => hang(&folder, OnceHung::Hold),
        "hang and close" => hang(&folder, OnceHung::HoldAndClose),
        "serve" => serve(),
        "fail binds" => fail_binds(),
        "share descriptors" => share_descriptors(),
        "share a large table without a first thread" => share_large_table(FirstThread::HasEnded),
        "share a large table beside the first thread" => share_large_table(FirstThread::HasAnotherTable),
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

/// What a process does when its memory map is locked.
#[derive(Clone, Copy)]
enum OnceHung {
    /// It holds a self-connection.
    Hold,
    /// It holds one for a moment.
    HoldAndClose,
    /// It makes this number, one after another.
    Make(usize),
}

/// Connects a new socket to this address, or to itself, and resets the connection.
fn connect_and_reset(to: Option<SocketAddr>) {
    let client = socket(Ipv4Addr::LOCALHOST.into());
    client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let own = client.local_addr().unwrap();
    client.connect(&to.map_or(own, Into::into)).unwrap();
    client.set_linger(Some(Duration::ZERO)).unwrap();
}

/// A page fault on a file that its server never gives holds the `mmap_lock` for reading. munmap() waits to
/// write, and every later reader waits behind it, such as a reader of `/proc/PID/cmdline`.
fn hang(folder: &Path, once_hung: OnceHung) -> ! {
    use rustix::mount::{MountFlags, mount};
    let device = fs::File::options().read(true).write(true).open(folder.join("fuse")).unwrap();
    let mount_point = folder.join("mount");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = std::ffi::CString::new(options).unwrap();
    mount("x", &mount_point, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).unwrap();
    let mut server = command("serve");
    server.stdin(Stdio::from(OwnedFd::from(device))).stdout(Stdio::null());
    // The server must end with this process: only then the kernel aborts its requests, and this process can end.
    // SAFETY: prctl is safe to call between fork and exec.
    unsafe { server.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))) };
    #[expect(clippy::zombie_processes, reason = "this process ends by SIGKILL, and its child with it")]
    let _server = server.spawn().unwrap();
    // The device is closed here, in this process: the command has it.
    drop(server);
    let file = fs::File::open(mount_point.join("f")).unwrap();
    // Everything that runs while the lock is held has run before, because a page fault would wait for it.
    let (client, listener) = (socket(Ipv4Addr::LOCALHOST.into()), TcpListener::bind("127.0.0.1:0").unwrap());
    let closed: SocketAddr = listener.local_addr().unwrap();
    connect_and_reset(Some(closed));
    drop(listener);
    assert!(socket(Ipv4Addr::LOCALHOST.into()).connect(&closed.into()).is_err());
    client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let own = client.local_addr().unwrap();
    thread::sleep(Duration::from_millis(1));
    // SAFETY: a new mapping, which nothing else refers to. The threads below use its address only.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), 4_096, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
    };
    assert_ne!(page, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    let address = page as usize;
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(700));
        // SAFETY: the mapping is not used any more, except by the read below, which never returns.
        unsafe { libc::munmap(address as *mut libc::c_void, 4_096) }
    });
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        // SAFETY: the mapping is readable. The read never returns.
        unsafe { std::ptr::read_volatile(address as *const u8) }
    });
    thread::sleep(Duration::from_millis(1_200));
    match once_hung {
        OnceHung::Make(connections) => (0..connections).for_each(|_| connect_and_reset(None)),
        OnceHung::Hold | OnceHung::HoldAndClose => client.connect(&own).unwrap(),
    }
    let message = b"nobody: hung\n";
    // SAFETY: the buffer is valid for the call.
    unsafe { libc::write(1, message.as_ptr().cast(), message.len()) };
    if matches!(once_hung, OnceHung::HoldAndClose) {
        thread::sleep(CLOSES_AFTER);
        drop(client);
    }
    loop {
        // SAFETY: no arguments.
        unsafe { libc::pause() };
    }
}

/// Serves a filesystem with one file at stdin: two reads fail, and the others get no answer
/// (`include/uapi/linux/fuse.h`).
fn serve() {
    const LOOKUP: u32 = 1;
    const FORGET: u32 = 2;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const INIT: u32 = 26;
    const INTERRUPT: u32 = 36;
    const BATCH_FORGET: u32 = 42;
    let mut request = vec![0; 1 << 20];
    let mut reads = 0;
    loop {
        let length = match rustix::io::read(io::stdin(), &mut request[..]) {
            Ok(length) => length,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => continue,
            Err(_) => return,
        };
        // struct fuse_in_header: len, opcode, unique, nodeid.
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        assert!(length >= 40);
        let (opcode, unique, node) = (word(4), long(8), long(16));
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        // struct fuse_attr: ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev,
        // blksize, flags.
        let attributes = |node: u64| {
            let mode = if node == 1 { 0o040_755 } else { 0o100_644 };
            let mut attributes = [node, 4_096, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
            attributes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 0, 0]));
            attributes
        };
        let (error, body) = match opcode {
            // struct fuse_init_out: major, minor, max_readahead, flags, max_background, max_write, ...
            INIT => (0, words(&[7, 31, 4_096, 0, 0, 4_096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            // struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid, two nanoseconds, attr.
            LOOKUP => {
                let entry = [2, 0, 1_000, 1_000, 0].map(u64::to_ne_bytes).concat();
                (0, [entry, attributes(2)].concat())
            }
            // struct fuse_attr_out: attr_valid, nanoseconds and padding, attr.
            GETATTR => (0, [[1_000, 0].map(u64::to_ne_bytes).concat(), attributes(node)].concat()),
            // struct fuse_open_out: fh, open_flags, padding.
            OPEN => (0, [1, 0].map(u64::to_ne_bytes).concat()),
            READ if reads == 2 => continue,
            READ => {
                reads += 1;
                (-libc::EIO, Vec::new())
            }
            FORGET | INTERRUPT | BATCH_FORGET => continue,
            _ => (-libc::ENOSYS, Vec::new()),
        };
        // struct fuse_out_header: len, error, unique.
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut reply = [length.to_ne_bytes(), error.to_ne_bytes()].concat();
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        let _ = rustix::io::write(io::stdin(), &reply);
    }
}

/// Binds the port of a listener, at one address of 127.0.0.0/8 after another.
fn fail_binds() {
    let (_held, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = socket(Ipv4Addr::LOCALHOST.into());
    let began = Instant::now();
    for number in 0_u32.. {
        let [_, b, c, d] = number.to_be_bytes();
        let address = SocketAddr::from(([127, b, c, d], port));
        assert!(server.bind(&address.into()).is_err());
        if number == 20_000 {
            print_output(&format!("{:?}", began.elapsed()));
        }
    }
}

/// Has as many descriptors as it may, and shares them with 2,000 processes.
fn share_descriptors() {
    const PROCESSES: usize = 2_000;
    const STACK_BYTES: usize = 16 << 10;
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        // SAFETY: neither has a pointer. The process ends with the one that made it.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::pause()
        }
    }
    // A duplicate takes no memory but its place in the table.
    let duplicates = (0..MAX_DESCRIPTORS).map_while(|_| rustix::io::dup(io::stdin()).ok());
    let count = duplicates.map(std::mem::forget).count() as u64;
    assert!(count > MAX_DESCRIPTORS / 2, "{count} descriptors");
    let mut stacks = vec![0_u8; PROCESSES * STACK_BYTES];
    for stack in stacks.chunks_exact_mut(STACK_BYTES) {
        let flags = libc::CLONE_VM | libc::CLONE_FILES | libc::SIGCHLD;
        let top = stack.as_mut_ptr_range().end;
        // SAFETY: the stack is the new process's own, is aligned as `malloc` aligns, and stays.
        check(unsafe { libc::clone(wait, top.cast(), flags, std::ptr::null_mut()) }).unwrap();
    }
    print_output(&format!("{count} descriptors"));
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}

/// Makes a child with 5,000 threads that share the largest permitted table, without a descriptor.
fn share_large_table(first_thread: FirstThread) {
    const THREADS: usize = 5_000;
    const STACK_BYTES: usize = 16 << 10;
    extern "C" fn wait(_: *mut libc::c_void) -> libc::c_int {
        loop {
            // SAFETY: no arguments.
            unsafe { libc::pause() };
        }
    }
    let mut stacks = vec![0_u8; THREADS * STACK_BYTES];
    let slots = getrlimit(Resource::Nofile).current.unwrap();
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    check(child).unwrap();
    if child == 0 {
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        // SAFETY: all arguments are valid. Each stack is its thread's own, is aligned as `malloc` aligns, and stays.
        unsafe {
            // The child ends with the process that made it.
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            // A table never shrinks.
            let last = libc::c_int::try_from(slots - 1).unwrap_or(0);
            if libc::dup2(0, last) != last || libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0) != 0 {
                libc::_exit(1);
            }
            for stack in stacks.chunks_exact_mut(STACK_BYTES) {
                let top = stack.as_mut_ptr_range().end;
                if libc::clone(wait, top.cast(), flags, std::ptr::null_mut()) < 0 {
                    libc::_exit(2);
                }
            }
            if first_thread == FirstThread::HasEnded {
                libc::syscall(libc::SYS_exit, 0);
            }
            // The new table has room for the descriptors that there are: none.
            libc::unshare(libc::CLONE_FILES);
        }
        wait(std::ptr::null_mut());
    }
    let until = Instant::now() + Duration::from_secs(30);
    let is_made = || {
        let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|line| line.split_ascii_whitespace().next()?.parse::<u64>().ok())
        };
        let first_slots = match first_thread {
            FirstThread::HasEnded => 0..1,
            FirstThread::HasAnotherTable => 1..1_024,
        };
        let threads = field("Threads:").unwrap_or(0);
        // A child that has given up has no other thread.
        assert!(!status.contains("zombie") || threads > 1, "{status}");
        threads == THREADS as u64 + 1 && first_slots.contains(&field("FDSize:").unwrap_or(0))
    };
    while !is_made() {
        assert!(Instant::now() < until, "the threads are not made in time");
        thread::sleep(Duration::from_millis(10));
    }
    print_output(&format!("{THREADS} threads of {child}"));
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}
