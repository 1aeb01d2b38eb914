//! Attackers: processes that fill what all users of the host share. Each is the test binary, started again as a user
//! without privileges, in a user namespace with many uids, or as root of a container.

use std::{
    fs::{self, File},
    io::{self, BufRead as _, BufReader, PipeReader, PipeWriter, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsRawFd as _, RawFd},
        unix::process::CommandExt as _,
    },
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::{
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::Socket;

use super::{
    cgroup::TestCgroup,
    client::{connect_to_self, hold_port_at_every_address, socket, unanswered_connects},
    netns::TestNetns,
    nobody::NOBODY,
};

const TASK_ENV: &str = "SELFCONN_TEST_ATTACKER_TASK";
const KIND_ENV: &str = "SELFCONN_TEST_ATTACKER_KIND";
const CGROUP_ENV: &str = "SELFCONN_TEST_ATTACKER_CGROUP";

/// The first uid of the host that the user namespace maps. Uid 0 inside is this one.
const FIRST_MAPPED_UID: u32 = 100_000;
const MAPPED_UIDS: u32 = 65_536;

/// How many control groups a container's root makes who makes several, and how much it does before it goes to the next
/// one.
const GROUPS: u32 = 64;
const IN_A_GROUP: u32 = 2;

/// How many sessions a user has who has several, and how much he does before he goes to the next one.
const SESSIONS: u32 = 8;
const IN_A_SESSION: u32 = 8;

/// How many containers were started: each has a control group of its own.
static CONTAINERS: AtomicU32 = AtomicU32::new(0);

/// The user of each pod, as images without a user of their own have it.
pub(crate) const POD_UID: u32 = 65_532;

/// Who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttackerKind {
    /// Uid 65534 of the host.
    Nobody,
    /// Uid 65534 of the host, in one session after another, each of which is a control group that root made.
    Sessions,
    /// 65,536 uids of a user namespace that uid 65534 made, as a subordinate range gives them.
    MappedUids,
    /// Root in a control group, a mount and a pid namespace of its own, without a user namespace.
    ContainerRoot,
    /// Root of a system container, as LXC makes them: in a user namespace that root made, and in a control group below
    /// which it makes others, one after another.
    SystemContainerRoot,
    /// As [`Self::ContainerRoot`], but always [`POD_UID`]. It is not in [`Self::ALL`].
    Pod,
}

impl AttackerKind {
    pub(crate) const ALL: [Self; 5] =
        [Self::Nobody, Self::Sessions, Self::MappedUids, Self::ContainerRoot, Self::SystemContainerRoot];

    const fn has_user_namespace(self) -> bool {
        matches!(self, Self::MappedUids | Self::SystemContainerRoot)
    }

    fn name(self) -> String {
        format!("{self:?}")
    }

    /// The calling thread gets another real uid, if this attacker has more than one, and its process goes to another
    /// session.
    fn become_user(self, number: u32) {
        let uid = match self {
            Self::Nobody => return,
            Self::Sessions => {
                if number.is_multiple_of(IN_A_SESSION) {
                    enter_session(number / IN_A_SESSION);
                }
                return;
            }
            Self::SystemContainerRoot => {
                if number.is_multiple_of(IN_A_GROUP) {
                    enter_new_group(number / IN_A_GROUP);
                }
                1 + number % (MAPPED_UIDS - 1)
            }
            Self::MappedUids => 1 + number % (MAPPED_UIDS - 1),
            Self::ContainerRoot => 1_000 + number % 10_000,
            Self::Pod => POD_UID,
        };
        set_real_uid(uid);
    }

    fn become_next(self, uids: &mut impl Iterator<Item = u32>) {
        self.become_user(uids.next().unwrap());
    }
}

/// The calling thread gets another real uid, and keeps its effective one and its capabilities.
pub(crate) fn set_real_uid(uid: u32) {
    // SAFETY: no memory is involved. The system call, unlike the function of glibc, is for this thread only.
    assert_eq!(unsafe { libc::syscall(libc::SYS_setresuid, uid, -1, -1) }, 0, "{uid}");
}

/// Moves this process to one of its sessions.
fn enter_session(number: u32) {
    let session =
        format!("{}/session-{}.scope/cgroup.procs", std::env::var(CGROUP_ENV).unwrap(), number % SESSIONS);
    fs::write(session, "0").unwrap();
}

/// Moves this process to a control group below its container's.
fn enter_new_group(number: u32) {
    let group = format!("{}/group-{}/inner", std::env::var(CGROUP_ENV).unwrap(), number % GROUPS);
    fs::create_dir_all(&group).unwrap();
    fs::write(format!("{group}/cgroup.procs"), "0").unwrap();
}

/// Such a process, after its attack. It ends when this value is dropped.
pub(crate) struct Attacker {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// Dropped after the process.
    _cgroup: Option<TestCgroup>,
}

impl Attacker {
    /// Starts an attacker in the network namespace of the calling thread. `None`: this host has no control group of
    /// version 2 for a container, or for sessions.
    pub(crate) fn start(kind: AttackerKind, task: &str) -> Option<Self> {
        let name = match kind {
            AttackerKind::ContainerRoot | AttackerKind::Pod => {
                Some(format!("docker/4a5b{}", CONTAINERS.fetch_add(1, Ordering::Relaxed)))
            }
            AttackerKind::Sessions => Some("user-65534.slice".to_owned()),
            AttackerKind::SystemContainerRoot => Some("lxc.payload.web1".to_owned()),
            AttackerKind::Nobody | AttackerKind::MappedUids => None,
        };
        let cgroup = match name.as_deref().map(TestCgroup::create).transpose() {
            Ok(cgroup) => cgroup,
            Err(why) => {
                println!("FACT no_{kind:?}={why}");
                return None;
            }
        };
        if let (AttackerKind::Sessions, Some(cgroup)) = (kind, &cgroup) {
            cgroup.delegate();
            (0..SESSIONS).for_each(|session| cgroup.delegate_below(&format!("session-{session}.scope")));
        }
        if let (AttackerKind::SystemContainerRoot, Some(cgroup)) = (kind, &cgroup) {
            cgroup.delegate_to(FIRST_MAPPED_UID);
        }
        let procs: Option<File> = cgroup.as_ref().map(TestCgroup::procs);
        let procs_fd = procs.as_ref().map(std::os::fd::AsRawFd::as_raw_fd);
        let (_, module) = module_path!().split_once("::").unwrap();
        let mut command = Command::new("/proc/self/exe");
        command
            .args(["--exact", &format!("{module}::run_attacker"), "--ignored", "--nocapture"])
            .env(TASK_ENV, task)
            .env(KIND_ENV, kind.name())
            .env(CGROUP_ENV, cgroup.as_ref().map_or(Path::new(""), TestCgroup::path))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let map = IdMap::new();
        let (map_request, map_done) = (map.request.1.as_raw_fd(), map.done.0.as_raw_fd());
        // SAFETY: the closure only makes system calls; the files outlive the spawn.
        unsafe { command.pre_exec(move || confine(kind, procs_fd, map_request, map_done)) };
        // The process waits for its map before spawn() returns.
        let mut child = thread::scope(|scope| {
            if kind.has_user_namespace() {
                scope.spawn(|| map.write());
            }
            command.spawn().unwrap()
        });
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stdin = child.stdin.take().unwrap();
        Some(Self { child, stdin, stdout, _cgroup: cgroup })
    }

    /// Waits until the process has done the next part of its task.
    pub(crate) fn wait(&mut self) {
        let mut line = String::new();
        while !line.contains("attacker: ") {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the attacker has ended");
        }
    }

    /// Lets it begin the next part.
    pub(crate) fn go_on(&mut self) {
        self.stdin.write_all(b"\n").unwrap();
    }
}

impl Drop for Attacker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn check(outcome: libc::c_int) -> io::Result<()> {
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The pipes by which a process asks for the map of its user namespace, and waits for it.
struct IdMap {
    request: (PipeReader, PipeWriter),
    done: (PipeReader, PipeWriter),
}

impl IdMap {
    fn new() -> Self {
        Self { request: io::pipe().unwrap(), done: io::pipe().unwrap() }
    }

    /// Waits for the process, and writes its map, as newuidmap(1) does for a user with subordinate uids.
    fn write(&self) {
        let mut pid = [0; 4];
        (&self.request.0).read_exact(&mut pid).unwrap();
        let map = format!("0 {FIRST_MAPPED_UID} {MAPPED_UIDS}");
        for file in ["uid_map", "gid_map"] {
            fs::write(format!("/proc/{}/{file}", u32::from_ne_bytes(pid)), &map).unwrap();
        }
        (&self.done.1).write_all(b"m").unwrap();
    }
}

/// Makes the calling process one of this kind, between fork and exec.
fn confine(
    kind: AttackerKind,
    cgroup_procs: Option<RawFd>,
    map_request: RawFd,
    map_done: RawFd,
) -> io::Result<()> {
    let is_one = |count: isize| if count == 1 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: all arguments are valid.
    unsafe {
        if let Some(procs) = cgroup_procs {
            is_one(libc::write(procs, c"0".as_ptr().cast(), 1))?;
        }
        if matches!(kind, AttackerKind::ContainerRoot | AttackerKind::Pod) {
            check(libc::unshare(libc::CLONE_NEWNS | libc::CLONE_NEWPID))?;
            // The first child is in the pid namespace. This process stays behind, so that its parent can end both.
            let child = libc::fork();
            check(child)?;
            if child != 0 {
                libc::syscall(libc::SYS_close_range, 0, u32::MAX, 0);
                libc::waitpid(child, std::ptr::null_mut(), 0);
                libc::_exit(0);
            }
            return check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL));
        }
        check(libc::setgroups(0, std::ptr::null()))?;
        if kind != AttackerKind::SystemContainerRoot {
            check(libc::setgid(NOBODY))?;
            check(libc::setuid(NOBODY))?;
            // A change of the user hides /proc/self from it.
            check(libc::prctl(libc::PR_SET_DUMPABLE, 1))?;
        }
        if kind.has_user_namespace() {
            check(libc::unshare(libc::CLONE_NEWUSER))?;
            let pid = libc::getpid();
            if libc::write(map_request, (&raw const pid).cast(), 4) != 4 {
                return Err(io::Error::last_os_error());
            }
            is_one(libc::read(map_done, (&raw mut *[0_u8; 1].as_mut_ptr()).cast(), 1))?;
            check(libc::setresgid(0, 0, 0))?;
            check(libc::setresuid(0, 0, 0))?;
            // The change of the ids has ended it.
            check(libc::prctl(libc::PR_SET_DUMPABLE, 1))?;
        }
    }
    Ok(())
}

/// The port of [`crowd_at_a_port`].
const CROWDED_PORT: u16 = 7_777;

fn shared_socket(address: SocketAddr) -> Socket {
    let socket = socket(address.ip());
    socket.set_reuse_address(true).unwrap();
    socket
}

/// Self-connections at one port of as many addresses, and maybe of as many users, and a listener there. They share
/// their port, so that only the listener keeps a server out that shares it, too.
fn crowd_at_a_port(
    kind: AttackerKind,
    count: usize,
    uids: &mut impl Iterator<Item = u32>,
) -> (Vec<TcpListener>, Vec<Socket>) {
    let listener_at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), CROWDED_PORT);
    let listener = shared_socket(listener_at);
    listener.bind(&listener_at.into()).unwrap();
    listener.listen(1).unwrap();
    let first = u32::from(Ipv4Addr::new(127, 1, 0, 0));
    let connect = |number| {
        kind.become_next(uids);
        let at = SocketAddr::new(Ipv4Addr::from(first + number).into(), CROWDED_PORT);
        let connection = shared_socket(at);
        connection.bind(&at.into()).unwrap();
        connection.connect(&at.into()).unwrap();
        connection
    };
    (vec![listener.into()], (0..u32::try_from(count).unwrap()).map(connect).collect())
}

/// Processes of several users that fail to bind that port at every address until this one ends.
fn fail_to_bind_crowded_port(kind: AttackerKind, uids: &mut impl Iterator<Item = u32>) {
    const PROCESSES: u32 = 20;
    for _ in 0..PROCESSES {
        kind.become_next(uids);
        // SAFETY: the child makes system calls only.
        if unsafe { libc::fork() } != 0 {
            continue;
        }
        // SAFETY: no memory is involved. The child must not hold the connections, too.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            libc::syscall(libc::SYS_close_range, 3, u32::MAX, 0);
        }
        loop {
            for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                let at = SocketAddr::new(any, CROWDED_PORT);
                let _ = shared_socket(at).bind(&at.into());
            }
            // The programs report one in 100 ms of each.
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Not a test: what these processes do.
#[test]
#[ignore = "runs in processes that other tests start"]
fn run_attacker() {
    let Ok(task) = std::env::var(TASK_ENV) else { return };
    let kind = std::env::var(KIND_ENV).unwrap();
    let kind =
        AttackerKind::ALL.into_iter().chain([AttackerKind::Pod]).find(|known| known.name() == kind).unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let (what, count) = task.rsplit_once(' ').unwrap();
    let count: usize = count.parse().unwrap();
    let mut stdin = io::stdin().lines();
    let mut held: Vec<(Vec<TcpListener>, Vec<Socket>)> = Vec::new();
    let mut uids = 0..;
    loop {
        match what {
            // The connects of the last time end when the new ones are there.
            "unanswered" => held = vec![unanswered(kind, count, &mut uids)],
            _ if let Some(first) = what.strip_prefix("refused from ") => {
                refused_ports(kind, first.parse().unwrap(), count, &mut uids);
            }
            "binds" => fail_binds(kind, count, 60, &mut uids, hold_port_at_every_address),
            // The slot of one of hundreds of ports may be that of a held one in another namespace. Fifty failed binds in
            // a second are within the rate of a user.
            "binds at a server's port" => fail_binds(kind, count, 50, &mut uids, listen_at_every_address),
            "binds at a crowded port" if held.is_empty() => {
                held.push(crowd_at_a_port(kind, count, &mut uids));
            }
            "binds at a crowded port" => fail_to_bind_crowded_port(kind, &mut uids),
            "connections" => {
                let connect = |_| {
                    kind.become_next(&mut uids);
                    connect_to_self(Ipv4Addr::LOCALHOST.into()).0
                };
                held.push((Vec::new(), (0..count).map(connect).collect()));
            }
            // A thread stays in each, so that everybody can enter it.
            "namespaces with threads" => {
                for _ in 0..count {
                    let (connected, is_connected) = mpsc::channel();
                    thread::Builder::new()
                        .stack_size(64 * 1_024)
                        .spawn(move || {
                            TestNetns::enter_new_in_helper();
                            let _held = connect_to_self(Ipv4Addr::LOCALHOST.into());
                            connected.send(()).unwrap();
                            loop {
                                thread::park();
                            }
                        })
                        .unwrap();
                    is_connected.recv().unwrap();
                }
            }
            other => panic!("unknown task {other}"),
        }
        let mut stdout = io::stdout();
        writeln!(stdout, "attacker: {what}").unwrap();
        stdout.flush().unwrap();
        // Killed while it waits, or told to attack again.
        if stdin.next().is_none() {
            return;
        }
    }
}

/// Connects that never end. Those with many uids are also in many network namespaces.
fn unanswered(
    kind: AttackerKind,
    count: usize,
    uids: &mut impl Iterator<Item = u32>,
) -> (Vec<TcpListener>, Vec<Socket>) {
    const PER_NAMESPACE: usize = 2;
    if let AttackerKind::Nobody | AttackerKind::Sessions = kind {
        let sessions = if kind == AttackerKind::Sessions { SESSIONS.min(count as u32) } else { 1 };
        let connect = |session| {
            if kind == AttackerKind::Sessions {
                enter_session(session);
            }
            unanswered_connects(count.div_ceil(sessions as usize))
        };
        let (listeners, clients): (Vec<_>, Vec<_>) = (0..sessions).map(connect).unzip();
        return (listeners, clients.into_iter().flatten().collect());
    }
    let (mut listeners, mut all) = (Vec::new(), Vec::new());
    while all.len() < count {
        let numbers: Vec<u32> = uids.by_ref().take(PER_NAMESPACE).collect();
        // Its sockets keep the namespace.
        let (listener, clients) = TestNetns::with_new_in_helper(|_| {
            // A listener with a full queue answers no more; the first two connects fill it.
            let (listener, mut clients) = unanswered_connects(2);
            let server = listener.local_addr().unwrap();
            for number in numbers {
                kind.become_user(number);
                let client = socket(Ipv4Addr::LOCALHOST.into());
                client.set_nonblocking(true).unwrap();
                let _ = client.connect(&server.into());
                clients.push(client);
            }
            (listener, clients)
        });
        listeners.push(listener);
        all.extend(clients);
    }
    (listeners, all)
}

/// Calls `work` until `count` is done. [`AttackerKind::MappedUids`] uses a new network namespace for each `in_each` of
/// them; all of the namespaces are there until the end.
fn in_namespaces(kind: AttackerKind, count: usize, in_each: usize, mut work: impl FnMut(usize) + Send) {
    if kind != AttackerKind::MappedUids {
        return work(count);
    }
    let mut namespaces = Vec::new();
    for begin in (0..count).step_by(in_each) {
        namespaces.push(TestNetns::with_new_in_helper(|_| {
            work(in_each.min(count - begin));
            File::open("/proc/thread-self/ns/net").unwrap()
        }));
    }
}

/// Connects to many closed ports, once to each, from this one on.
fn refused_ports(
    kind: AttackerKind,
    first: u16,
    count: usize,
    uids: &mut (impl Iterator<Item = u32> + Send),
) {
    let mut ports = (first..).step_by(2);
    in_namespaces(kind, count, 2, |count| {
        for port in ports.by_ref().take(count) {
            kind.become_next(uids);
            // A hit is as good as a refusal, and as rare as one in 14,000.
            let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
        }
    });
}

/// A server that keeps others from its port at every address, and the port.
fn listen_at_every_address() -> (TcpListener, u16) {
    let server = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let port = server.local_addr().unwrap().port();
    (server, port)
}

/// Fails to bind the port that `hold` returns, at one address of 127.0.0.0/8 after another, at most `in_each` times in
/// a namespace.
fn fail_binds<Holder>(
    kind: AttackerKind,
    count: usize,
    in_each: usize,
    uids: &mut (impl Iterator<Item = u32> + Send),
    hold: impl Fn() -> (Holder, u16) + Sync,
) {
    let mut numbers = 0_u32..;
    in_namespaces(kind, count, in_each, |count| {
        let (_held, port) = hold();
        let server = socket(Ipv4Addr::LOCALHOST.into());
        for number in numbers.by_ref().take(count) {
            kind.become_next(uids);
            let [_, b, c, d] = number.to_be_bytes();
            assert!(server.bind(&SocketAddr::from(([127, b, c, d], port)).into()).is_err());
        }
    });
}
