//! Socket crowds: helper processes that hold many sockets. The test process itself is not suitable as a
//! holder, because a process that another test starts has a copy of every descriptor for a moment and is a
//! holder, too.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpListener, TcpStream},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::Duration,
};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use socket2::{SockRef, Socket};

use super::{
    client::{connect_to_self, run_self_connection},
    helper_process::HelperProcess,
};

/// The process name of a socket crowd.
pub(crate) const CROWD_COMM: &str = "a-crowd";

const CROWD_ENV: &str = "SELFCONN_TEST_CROWD";

/// The sockets that such a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CrowdSockets {
    /// This many self-connections to this address. It reports the port and cookie of the last one.
    SelfConnections(usize, IpAddr),
    /// This many ordinary sockets: both ends of half as many connections.
    Ordinary(usize),
    /// A self-connection to this address, closed in order and in TIME_WAIT. It reports the port.
    TimeWait(IpAddr),
    /// A self-connection that its child process holds, too. It reports the pid of the child.
    Shared,
}

/// A process in the network namespace of the thread that starts it. It holds sockets until this value is
/// dropped, and then ends.
pub(crate) struct SocketCrowd {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Kept open because libtest in the process keeps writing.
    _stdout: BufReader<ChildStdout>,
    /// The report that it printed when its sockets were open.
    pub(crate) report: Value,
}

impl SocketCrowd {
    pub(crate) fn start(sockets: CrowdSockets) -> Self {
        let task = match sockets {
            CrowdSockets::SelfConnections(count, address) => json!(["self-connections", count, address]),
            CrowdSockets::Ordinary(count) => json!(["ordinary", count]),
            CrowdSockets::TimeWait(address) => json!(["time-wait", address]),
            CrowdSockets::Shared => json!(["shared"]),
        };
        // libtest names a test without its crate.
        let (_, module) = module_path!().split_once("::").unwrap();
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", &format!("{module}::run_crowd_process"), "--ignored", "--nocapture"])
            .env(CROWD_ENV, task.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let report = stdout
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .find_map(|line| Some(serde_json::from_str(line.split_once("crowd: ")?.1).unwrap()))
            .unwrap_or_else(|| panic!("{sockets:?} reported nothing"));
        Self { stdin: child.stdin.take(), _stdout: stdout, child, report }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for SocketCrowd {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}

/// Not a test: what a socket crowd process does.
#[test]
#[ignore = "runs in processes that other tests start"]
fn run_crowd_process() {
    let Ok(text) = std::env::var(CROWD_ENV) else { return };
    fs::write("/proc/self/comm", CROWD_COMM).unwrap();
    let task: Value = serde_json::from_str(&text).unwrap();
    let count = || usize::try_from(task[1].as_u64().unwrap()).unwrap();
    let address = |at: usize| task[at].as_str().unwrap().parse::<IpAddr>().unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let mut report = Value::Null;
    let mut child = None;
    let sockets: Vec<Socket> = match task[0].as_str().unwrap() {
        "self-connections" => {
            let sockets: Vec<_> = (0..count()).map(|_| connect_to_self(address(2))).collect();
            let (last, port) = sockets.last().unwrap();
            report = json!({"port": port, "cookie": last.cookie().unwrap()});
            sockets.into_iter().map(|(socket, _)| socket).collect()
        }
        "ordinary" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let server = listener.local_addr().unwrap();
            let connect = |_| [TcpStream::connect(server).unwrap(), listener.accept().unwrap().0];
            (0..count() / 2).flat_map(connect).map(Socket::from).collect()
        }
        "time-wait" => {
            report = json!({"port": run_self_connection(address(1))});
            vec![]
        }
        "shared" => {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            let mut holder = HelperProcess::start_with_fd("hold", &socket);
            holder.read_output();
            report = json!({"child": holder.pid()});
            child = Some(holder);
            vec![socket]
        }
        other => panic!("unknown task {other}"),
    };
    for socket in &sockets {
        // No TIME_WAIT, which would exhaust the ports.
        SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "crowd: {report}").unwrap();
    stdout.flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    if let Some(child) = child {
        child.finish();
    }
}
