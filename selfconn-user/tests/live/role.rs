//! Other processes: the test binary itself, started again in a role. They share the network namespace of the thread
//! that starts them.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::Ipv4Addr,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::process::CommandExt as _,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use socket2::Socket;

use crate::client::connect_to_self;

const ROLE: &str = "SELFCONN_TEST_ROLE";

/// Far from those that a process opens by itself; dup2 onto the same number would leave close-on-exec set.
const HANDED: libc::c_int = 100;

/// A process in a role. It says a line when it has done its part, and ends when its stdin does.
pub(crate) struct Role {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Role {
    /// Starts this binary as `role`.
    pub(crate) fn start(role: &str) -> Self {
        Self::spawn(&mut command(role))
    }

    /// Starts this binary as `role`, with a descriptor of ours as [`HANDED`].
    pub(crate) fn start_with(role: &str, descriptor: &Socket) -> Self {
        let fd = descriptor.as_raw_fd();
        let mut command = command(role);
        // SAFETY: dup2 is safe to call between fork and exec; `descriptor` outlives the spawn.
        unsafe {
            command.pre_exec(move || {
                if libc::dup2(fd, HANDED) == HANDED { Ok(()) } else { Err(std::io::Error::last_os_error()) }
            });
        }
        Self::spawn(&mut command)
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

    /// What it says when it has done its part; libtest's own lines are passed over.
    pub(crate) fn says(&mut self) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the role said nothing");
            if let Some((_, said)) = line.split_once("role: ") {
                return said.trim_end().to_owned();
            }
        }
    }

    /// Lets it end, and waits for that.
    pub(crate) fn end(mut self) {
        self.stdin.take();
        let _ = self.child.wait().unwrap();
    }

    /// SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn command(role: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["--exact", "role::in_a_role", "--ignored", "--nocapture"]).env(ROLE, role);
    command
}

fn say(what: &str) {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "role: {what}").unwrap();
    stdout.flush().unwrap();
}

fn wait_for_the_end() {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
}

/// Passes a socket to whoever has the other end of a unix socket.
pub(crate) fn pass(socket: &Socket, through: &Socket) {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let descriptors = [socket.as_fd()];
    assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)));
    // A descriptor can't travel without a byte.
    sendmsg(through, &[std::io::IoSlice::new(b"s")], &mut rights, SendFlags::empty()).unwrap();
}

fn receive(from: &OwnedFd) -> OwnedFd {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    recvmsg(from, &mut [std::io::IoSliceMut::new(&mut [0])], &mut rights, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut received = rights.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    received.next().expect("a descriptor came along")
}

fn name_this_process(name: &str) {
    std::fs::write("/proc/self/comm", name).unwrap();
}

/// Not a test: what a process in a role does.
#[test]
#[ignore = "runs in processes that other tests start"]
fn in_a_role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let connect = || connect_to_self(Ipv4Addr::LOCALHOST.into());
    match role.as_str() {
        "connect" => {
            name_this_process("a-client");
            let (_socket, port) = connect();
            say(&port.to_string());
            wait_for_the_end();
        }
        dial if dial.starts_with("dial ") => {
            name_this_process("a-dialler");
            let target: std::net::SocketAddr = dial["dial ".len()..].parse().unwrap();
            std::net::TcpStream::connect(target).unwrap_err();
            say("refused");
        }
        bind if bind.starts_with("bind ") => {
            name_this_process("a-server");
            let address: std::net::SocketAddr = bind["bind ".len()..].parse().unwrap();
            say(match std::net::TcpListener::bind(address) {
                Ok(_) => "bound",
                Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => "in use",
                Err(error) => panic!("{error}"),
            });
        }
        "connect and die" => {
            name_this_process("short-lived");
            let (_socket, _) = connect();
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL).unwrap();
        }
        "connect and exec" => {
            name_this_process("before-exec");
            let (socket, port) = connect();
            socket.set_cloexec(false).unwrap();
            say(&port.to_string());
            let error = command("wait").exec();
            panic!("{error}");
        }
        "connect and hand down" => {
            name_this_process("a-parent");
            let (socket, _) = connect();
            let mut child = Role::start_with("hold", &socket);
            drop(socket);
            say(&child.pid().to_string());
            // The child lives on; it ends when its stdin does, that is with this process.
            child.says();
            wait_for_the_end();
            child.end();
        }
        "hold" => {
            name_this_process("a-child");
            // SAFETY: whoever starts this role gives it this descriptor, and nothing else here uses it.
            let _held = unsafe { OwnedFd::from_raw_fd(HANDED) };
            say("held");
            wait_for_the_end();
        }
        "receive and hold" => {
            name_this_process("a-receiver");
            // SAFETY: whoever starts this role gives it this descriptor, and nothing else here uses it.
            let from = unsafe { OwnedFd::from_raw_fd(HANDED) };
            let _held = receive(&from);
            say("received");
            wait_for_the_end();
        }
        "wait" => {
            say("waiting");
            wait_for_the_end();
        }
        "rename threads" => {
            name_this_process("a-leader");
            let connect = move || {
                std::fs::write("/proc/thread-self/comm", "renamed\u{1b}[31m").unwrap();
                connect().1
            };
            let port = std::thread::spawn(connect).join().unwrap();
            say(&port.to_string());
        }
        other => panic!("no role {other}"),
    }
}
