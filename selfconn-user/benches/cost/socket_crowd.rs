//! Many ordinary sockets, held by helper processes: both ends of loopback connections.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::net::NetNamespace;

/// The number of sockets of one process, because its descriptors are limited.
const SOCKETS_PER_PROCESS: usize = 15_000;

/// The helper processes. They end when this is dropped.
pub(crate) struct SocketHelpers(Vec<Child>);

impl SocketHelpers {
    /// `count` sockets in this namespace.
    pub(crate) fn new(net: &NetNamespace, count: usize) -> Result<Self> {
        let mut crowd = Self(Vec::new());
        let mut left = count;
        while left > 0 {
            let each = left.min(SOCKETS_PER_PROCESS);
            left -= each;
            let mut command = net.helper(&["hold", &each.to_string()]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let stdout = child.stdout.take().context("no stdout")?;
            crowd.0.push(child);
            let mut line = String::new();
            ensure!(BufReader::new(stdout).read_line(&mut line)? > 0, "cannot hold {count} sockets");
        }
        Ok(crowd)
    }
}

impl Drop for SocketHelpers {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Holds `count` sockets until stdin ends. Prints a line when they are there.
pub(crate) fn hold(count: usize) -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    let mut held = Vec::new();
    let mut listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    for pair in 0..count / 2 {
        // A listener has some thousand connections only, because the source ports of a destination are
        // limited.
        if pair % 5_000 == 4_999 {
            listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        }
        let client = TcpStream::connect(listener.local_addr()?)?;
        held.push((client, listener.accept()?.0));
    }
    println!("held");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
