//! Processes that hold sockets. The test process itself is no good holder: whenever a test beside this one starts a
//! process, that one has a copy of every descriptor for a moment, and is a holder, too.

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

use crate::{
    client::{connect_to_self, talk_to_self},
    role::Role,
};

/// The name of such a process.
pub(super) const COMM: &str = "a-crowd";

const CROWD: &str = "SELFCONN_TEST_CROWD";

/// What a process of ours does.
#[derive(Clone, Copy, Debug)]
pub(super) enum Holds {
    /// So many self-connections to this address. It says the port and cookie of the last.
    Selves(usize, IpAddr),
    /// So many ordinary sockets, both ends of half as many connections.
    Ordinary(usize),
    /// A self-connection to this address that has ended in order, in TIME_WAIT. It says the port.
    TimeWait(IpAddr),
    /// A self-connection that a child of it holds, too. It says the child's pid.
    Shared,
}

/// A process in the namespace of the thread that starts it, which holds sockets until this is dropped, and is then gone
/// with all of them.
pub(super) struct Crowd {
    child: Child,
    stdin: Option<ChildStdin>,
    /// Kept open, for the test harness writes on.
    _stdout: BufReader<ChildStdout>,
    /// What it said when its sockets were open.
    pub(super) said: Value,
}

impl Crowd {
    pub(super) fn start(holds: Holds) -> Self {
        let what = match holds {
            Holds::Selves(count, address) => json!(["selves", count, address]),
            Holds::Ordinary(count) => json!(["ordinary", count]),
            Holds::TimeWait(address) => json!(["time-wait", address]),
            Holds::Shared => json!(["shared"]),
        };
        let mut child = Command::new("/proc/self/exe")
            .args(["--exact", "scan::crowd::in_a_crowd", "--ignored", "--nocapture"])
            .env(CROWD, what.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let said = stdout
            .by_ref()
            .lines()
            .map_while(Result::ok)
            .find_map(|line| Some(serde_json::from_str(line.split_once("crowd: ")?.1).unwrap()))
            .unwrap_or_else(|| panic!("{holds:?} said nothing"));
        Self { stdin: child.stdin.take(), _stdout: stdout, child, said }
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stdin.take();
        let _ = self.child.wait();
    }
}

/// Not a test: what a process in a crowd does.
#[test]
#[ignore = "runs in processes that other tests start"]
fn in_a_crowd() {
    let Ok(what) = std::env::var(CROWD) else { return };
    fs::write("/proc/self/comm", COMM).unwrap();
    let what: Value = serde_json::from_str(&what).unwrap();
    let count = || usize::try_from(what[1].as_u64().unwrap()).unwrap();
    let address = |at: usize| what[at].as_str().unwrap().parse::<IpAddr>().unwrap();
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    let mut said = Value::Null;
    let mut child = None;
    let sockets: Vec<Socket> = match what[0].as_str().unwrap() {
        "selves" => {
            let sockets: Vec<_> = (0..count()).map(|_| connect_to_self(address(2))).collect();
            let (last, port) = sockets.last().unwrap();
            said = json!({"port": port, "cookie": last.cookie().unwrap()});
            sockets.into_iter().map(|(socket, _)| socket).collect()
        }
        "ordinary" => {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let server = listener.local_addr().unwrap();
            let connect = |_| [TcpStream::connect(server).unwrap(), listener.accept().unwrap().0];
            (0..count() / 2).flat_map(connect).map(Socket::from).collect()
        }
        "time-wait" => {
            said = json!({"port": talk_to_self(address(1))});
            vec![]
        }
        "shared" => {
            let (socket, _) = connect_to_self(Ipv4Addr::LOCALHOST.into());
            let mut holder = Role::start_with("hold", &socket);
            holder.says();
            said = json!({"child": holder.pid()});
            child = Some(holder);
            vec![socket]
        }
        other => panic!("no crowd is {other}"),
    };
    for socket in &sockets {
        // No TIME_WAIT, which would use up the ports.
        SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut stdout = std::io::stdout();
    writeln!(stdout, "crowd: {said}").unwrap();
    stdout.flush().unwrap();
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    if let Some(child) = child {
        child.end();
    }
}
