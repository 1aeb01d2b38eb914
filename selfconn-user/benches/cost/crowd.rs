//! Many ordinary sockets, held by processes of their own: both ends of half as many loopback connections.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Child, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::net::Net;

/// So many in one process, whose table of descriptors is limited.
const EACH: usize = 15_000;

/// Holds them until this is dropped.
pub(crate) struct Crowd(Vec<Child>);

impl Crowd {
    /// `count` sockets in this namespace.
    pub(crate) fn new(net: &Net, count: usize) -> Result<Self> {
        let mut crowd = Self(Vec::new());
        let mut left = count;
        while left > 0 {
            let each = left.min(EACH);
            left -= each;
            let mut command = net.own(&["hold", &each.to_string()]);
            let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let stdout = child.stdout.take().context("no stdout")?;
            crowd.0.push(child);
            let mut line = String::new();
            ensure!(BufReader::new(stdout).read_line(&mut line)? > 0, "cannot hold {count} sockets");
        }
        Ok(crowd)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Holds `count` sockets until stdin ends; says so when they are there.
pub(crate) fn hold(count: usize) -> Result<()> {
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    let mut held = Vec::new();
    let mut listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    for pair in 0..count / 2 {
        // A port of its own for each few thousand: the source ports of one destination are limited.
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
