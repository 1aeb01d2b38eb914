//! The tasks of the helper processes.

use std::{
    io::{Read as _, Write as _},
    net::Ipv4Addr,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, IntoRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
};

use selfconn_ebpf::bind_failure::REPORT_INTERVAL_NS;
use socket2::Socket;

use super::{HelperProcess, PASSED_FD, command, receive_fd, with_task};
use crate::support::{
    another_program::AnotherProgram,
    client::{self, connect_to_self, socket},
    guard::connect_itself,
    netns::TestNetns,
};

fn print_output(text: &str) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "helper: {text}").unwrap();
    stdout.flush().unwrap();
}

fn wait_for_stdin_eof() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// Gives the calling thread a mount namespace, in which a file is this network namespace.
fn mount_in_own_mount_namespace(namespace: &std::fs::File) {
    use rustix::{
        mount::{MountFlags, MountPropagationFlags, mount, mount_bind, mount_change},
        thread::{UnshareFlags, unshare_unsafe},
    };
    // SAFETY: only the flag FILES could take descriptors away from other threads, and it is not set.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::FS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
    mount("none", "/tmp", "tmpfs", MountFlags::empty(), None).unwrap();
    std::fs::write("/tmp/namespace", "").unwrap();
    mount_bind(format!("/proc/thread-self/fd/{}", namespace.as_raw_fd()), "/tmp/namespace").unwrap();
}

/// Gives up root, on every thread of this process.
fn become_nobody() {
    const NOBODY: libc::uid_t = 65_534;
    // SAFETY: no memory is involved, and glibc does it for all threads.
    assert_eq!(unsafe { libc::setuid(NOBODY) }, 0, "{}", std::io::Error::last_os_error());
}

/// Ends the first thread of this process, and waits until it is a zombie. The process goes on.
fn end_first_thread() {
    extern "C" fn end_thread(_: libc::c_int) {
        // SAFETY: a system call that ends this thread only.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let pid = std::process::id();
    // SAFETY: the handler calls nothing but a system call. The first thread only waits for the end of the task.
    unsafe {
        libc::signal(libc::SIGUSR1, end_thread as extern "C" fn(libc::c_int) as libc::sighandler_t);
        libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR1);
    }
    while !std::fs::read_to_string("/proc/self/stat").unwrap().contains(") Z ") {
        std::thread::yield_now();
    }
}

/// Makes a process that does nothing. It ends with this one.
fn start_idle_child() {
    // SAFETY: the child makes system calls only.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "{}", std::io::Error::last_os_error());
        if child == 0 {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            loop {
                libc::pause();
            }
        }
    }
}

/// A connection of 127.0.0.1 to itself between two sockets: its addresses are equal, its ports are not.
fn ordinary_connection() -> [Socket; 3] {
    let loopback = Ipv4Addr::LOCALHOST;
    let listener = socket(loopback.into());
    listener.bind(&std::net::SocketAddr::from((loopback, 0)).into()).unwrap();
    listener.listen(1).unwrap();
    let client = socket(loopback.into());
    client.connect(&listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    [listener, client, server]
}

/// Runs another program in this process.
fn execute(another: &AnotherProgram, task: &str) {
    let error = with_task(another.command(), task).exec();
    panic!("{error}");
}

/// Sends a byte through a socket that this process has from itself or from an earlier program.
fn send_through(fd: i32) {
    // SAFETY: the descriptor is open, and nothing else in this process uses it.
    let socket = unsafe { Socket::from_raw_fd(fd) };
    socket.send(b"s").unwrap();
    print_output("sent");
    wait_for_stdin_eof();
}

fn set_process_name(name: &str) {
    std::fs::write("/proc/self/comm", name).unwrap();
}

pub(super) fn run_task(task: &str) {
    let connect = || connect_to_self(Ipv4Addr::LOCALHOST.into());
    match task {
        "connect" => {
            set_process_name("a-client");
            let (_socket, port) = connect();
            print_output(&port.to_string());
            wait_for_stdin_eof();
        }
        "connect again and again" => {
            let _ = connect();
            print_output("connected");
            std::thread::spawn(|| {
                loop {
                    let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
                    socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(20));
                }
            });
            wait_for_stdin_eof();
        }
        // It stops in between.
        "connect once, and then often" => {
            let _ = connect();
            print_output("connected");
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP).unwrap();
            for _ in 0..150 {
                connect().0.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            }
            print_output("connected often");
            wait_for_stdin_eof();
        }
        "connect by an orphan" => {
            let mut parent = HelperProcess::start("leave an orphan");
            assert_eq!(parent.read_output(), "done");
            parent.finish();
        }
        "leave an orphan" => drop(command("connect and live on").process_group(0).spawn().unwrap()),
        "connect and live on" => {
            drop(connect());
            print_output("done");
            // A process that has exited has no ancestors to ask for.
            std::thread::sleep(std::time::Duration::from_secs(3));
        }
        "connect itself twice" => {
            for _ in 0..2 {
                print_output(&connect_itself(Ipv4Addr::LOCALHOST.into()).to_string());
            }
            wait_for_stdin_eof();
        }
        "connect itself" => print_output(&connect_itself(Ipv4Addr::LOCALHOST.into()).to_string()),
        connect if connect.starts_with("connect itself in cgroup ") => {
            let directory = std::path::Path::new(&connect["connect itself in cgroup ".len()..]);
            std::fs::write(directory.join("cgroup.procs"), "0").unwrap();
            print_output(&connect_itself(Ipv4Addr::LOCALHOST.into()).to_string());
        }
        connect if connect.starts_with("connect in cgroup ") => {
            let directory = std::path::Path::new(&connect["connect in cgroup ".len()..]);
            std::fs::create_dir_all(directory).unwrap();
            std::fs::write(directory.join("cgroup.procs"), "0").unwrap();
            let (_socket, port) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            print_output(&port.to_string());
            wait_for_stdin_eof();
        }
        storm if storm.starts_with("connect storm ") => {
            for _ in 0..storm["connect storm ".len()..].parse().unwrap() {
                let socket = connect_to_self(Ipv4Addr::LOCALHOST.into()).0;
                socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            }
            print_output("done");
            wait_for_stdin_eof();
        }
        // Until its stdin is closed. The first one leaves no TIME_WAIT.
        connect if connect.starts_with("connect and hold ") || connect.starts_with("connect and close ") => {
            use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
            let maximum = getrlimit(Resource::Nofile).maximum;
            setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
            let (what, count) = connect.rsplit_once(' ').unwrap();
            let connect = |_| connect_to_self(Ipv4Addr::LOCALHOST.into()).0;
            let sockets: Vec<_> = (0..count.parse::<usize>().unwrap()).map(connect).collect();
            for socket in sockets.iter().filter(|_| what == "connect and hold") {
                socket.set_linger(Some(std::time::Duration::ZERO)).unwrap();
            }
            print_output("connected");
            wait_for_stdin_eof();
        }
        // The SYN is deferred, so each connect is in progress until its socket is closed.
        connect if connect.starts_with("keep connecting ") => {
            let target: std::net::SocketAddr = connect["keep connecting ".len()..].parse().unwrap();
            std::thread::spawn(move || {
                loop {
                    let socket = socket(target.ip());
                    client::enable_fastopen_connect(&socket);
                    socket.connect(&target.into()).unwrap();
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
            });
            print_output("connecting");
            wait_for_stdin_eof();
        }
        connect if connect.starts_with("connect refused ") => {
            set_process_name("a-connector");
            let target: std::net::SocketAddr = connect["connect refused ".len()..].parse().unwrap();
            std::net::TcpStream::connect(target).unwrap_err();
            print_output("refused");
        }
        bind if bind.starts_with("bind ") => {
            set_process_name("a-server");
            let address: std::net::SocketAddr = bind["bind ".len()..].parse().unwrap();
            print_output(match std::net::TcpListener::bind(address) {
                Ok(_) => "bound",
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => "in use",
                Err(error) => panic!("{error}"),
            });
        }
        // Under another name each time, and no sooner than the programs report the next failure of a process.
        bind if bind.starts_with("fail to bind renamed ") => {
            let (count, address) = bind["fail to bind renamed ".len()..].split_once(' ').unwrap();
            let (count, address): (u32, std::net::SocketAddr) =
                (count.parse().unwrap(), address.parse().unwrap());
            for number in 0..count {
                set_process_name(&format!("server-{number}"));
                std::net::TcpListener::bind(address).unwrap_err();
                std::thread::sleep(std::time::Duration::from_nanos(REPORT_INTERVAL_NS));
            }
            print_output("in use");
        }
        // Does not return before the kernel gives up, or somebody kills this process.
        "mount NFS" => {
            use rustix::mount::{MountFlags, mount};
            let options =
                c"vers=3,proto=tcp,mountproto=tcp,nolock,noresvport,addr=127.0.0.1,mountaddr=127.0.0.1,\
                            port=40000,mountport=40000";
            let directory = std::env::temp_dir().join(format!("selfconn-nfs-{}", std::process::id()));
            std::fs::create_dir(&directory).unwrap();
            print_output("mounting");
            let outcome = mount("127.0.0.1:/x", &directory, "nfs", MountFlags::empty(), Some(options));
            std::fs::remove_dir(&directory).unwrap();
            panic!("{outcome:?}");
        }
        "connect and kill itself" => {
            set_process_name("short-lived");
            let (_socket, _) = connect();
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
        "connect and exec" => {
            let another = AnotherProgram::new();
            set_process_name("before-exec");
            become_nobody();
            let (socket, port) = connect();
            socket.set_cloexec(false).unwrap();
            print_output(&port.to_string());
            execute(&another, "wait");
        }
        "defer the SYN and send" | "defer the SYN and exec" => {
            let another = task.ends_with("exec").then(AnotherProgram::new);
            set_process_name("before-send");
            become_nobody();
            let socket = client::deferred_connect_to_self(Ipv4Addr::LOCALHOST.into());
            socket.set_cloexec(false).unwrap();
            print_output("deferred");
            let fd = socket.into_raw_fd();
            match another {
                Some(another) => execute(&another, &format!("send through {fd}")),
                None => send_through(fd),
            }
        }
        send if send.starts_with("send through ") => {
            send_through(send["send through ".len()..].parse().unwrap());
        }
        bind if bind.starts_with("fail to bind and exec ") => {
            let another = AnotherProgram::new();
            set_process_name("a-server");
            become_nobody();
            let address: std::net::SocketAddr = bind["fail to bind and exec ".len()..].parse().unwrap();
            std::net::TcpListener::bind(address).unwrap_err();
            execute(&another, "wait");
        }
        "connect and pass to child" => {
            set_process_name("a-parent");
            let (socket, _) = connect();
            let mut child = HelperProcess::start_with_fd("hold", &socket);
            drop(socket);
            // It has its name and the socket.
            child.read_output();
            print_output(&child.pid().to_string());
            // The child keeps running. Its stdin is a pipe from this process, so it ends when this process
            // does.
            wait_for_stdin_eof();
            child.finish();
        }
        "hold" => {
            set_process_name("a-child");
            // SAFETY: the process that starts this task passes it this descriptor, and nothing else in this
            // process uses it.
            let _held = unsafe { OwnedFd::from_raw_fd(PASSED_FD) };
            print_output("held");
            wait_for_stdin_eof();
        }
        "hold and exec" => {
            set_process_name("before-exec");
            // The socket is at a descriptor without close-on-exec.
            execute(&AnotherProgram::new(), "wait");
        }
        "receive and hold" => {
            set_process_name("a-receiver");
            // SAFETY: the process that starts this task passes it this descriptor, and nothing else in this
            // process uses it.
            let from = unsafe { OwnedFd::from_raw_fd(PASSED_FD) };
            let _held = receive_fd(&from);
            print_output("received");
            wait_for_stdin_eof();
        }
        "hold in a namespace that only the sockets keep" => {
            set_process_name("only-sockets");
            let (inode, _held) =
                TestNetns::with_new_in_helper(|net| (net.inode, (connect(), ordinary_connection())));
            become_nobody();
            print_output(&inode.to_string());
            wait_for_stdin_eof();
        }
        "hold in a namespace that a descriptor keeps" => {
            set_process_name("a-descriptor");
            let (inode, _held) = TestNetns::with_new_in_helper(|net| {
                (net.inode, (connect(), std::fs::File::open("/proc/thread-self/ns/net").unwrap()))
            });
            become_nobody();
            print_output(&inode.to_string());
            wait_for_stdin_eof();
        }
        "hold in a namespace that a thread is in" => {
            set_process_name("a-thread");
            TestNetns::with_new_in_helper(|net| {
                let _held = connect();
                become_nobody();
                print_output(&net.inode.to_string());
                wait_for_stdin_eof();
            });
        }
        "keep a namespace by a mount in a mount namespace" => {
            let namespace = TestNetns::with_new_in_helper(|_| {
                drop(connect());
                std::fs::File::open("/proc/thread-self/ns/net").unwrap()
            });
            mount_in_own_mount_namespace(&namespace);
            let inode = std::os::unix::fs::MetadataExt::ino(&namespace.metadata().unwrap());
            drop(namespace);
            print_output(&inode.to_string());
            // From here on the first thread of this process is in that mount namespace, too.
            let error = command("wait").exec();
            panic!("{error}");
        }
        "hold without a first thread" => {
            set_process_name("no-leader");
            let net = TestNetns::enter_new_in_helper();
            let held = connect();
            become_nobody();
            end_first_thread();
            print_output(&net.inode.to_string());
            wait_for_stdin_eof();
            drop(held);
            // The first thread would end the process.
            std::process::exit(0);
        }
        "hold in a descriptor table of a thread" => {
            set_process_name("own-table");
            TestNetns::with_new_in_helper(|net| {
                // SAFETY: this thread uses only descriptors that it opens from here on, and stdin and stdout.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FILES) }.unwrap();
                let _held = connect();
                become_nobody();
                print_output(&net.inode.to_string());
                wait_for_stdin_eof();
            });
        }
        "wait" => {
            print_output("waiting");
            wait_for_stdin_eof();
        }
        wait if wait.starts_with("wait with children ") => {
            (0..wait["wait with children ".len()..].parse().unwrap()).for_each(|_: u32| start_idle_child());
            print_output("waiting");
            wait_for_stdin_eof();
        }
        "rename threads" => {
            set_process_name("a-leader");
            let connect = move || {
                std::fs::write("/proc/thread-self/comm", "renamed\u{1b}[31m").unwrap();
                connect().1
            };
            let port = std::thread::spawn(connect).join().unwrap();
            print_output(&port.to_string());
        }
        other => panic!("unknown task {other}"),
    }
}
