//! Programs that run in the background during a check: started, queried over HTTP, and always ended.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

/// Much longer than the few seconds that it takes.
const DEADLINE: Duration = Duration::from_secs(60);

/// A process that is ended when this is dropped.
pub(super) struct BackgroundProcess {
    child: Child,
    output: PathBuf,
}

impl BackgroundProcess {
    /// Starts it. Its output goes into a file of this name in `dir`.
    pub(super) fn start(mut command: Command, name: &str, dir: &Path) -> Result<Self> {
        let output = dir.join(name);
        let file = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().with_context(|| format!("start {name}"))?;
        Ok(Self { child, output })
    }

    pub(super) fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("send a signal")
    }

    /// Waits until the condition holds. The error contains the process's output.
    pub(super) fn wait_until(&mut self, what: &str, holds: impl Fn() -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + DEADLINE;
        while !holds()? {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > deadline {
                let output = std::fs::read_to_string(&self.output).unwrap_or_default();
                bail!(
                    "it does not hold that {what} (ended: {ended:?}); {}:\n{output}",
                    self.output.display()
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for BackgroundProcess {
    fn drop(&mut self) {
        // The child was not waited for, so the pid is still its own. It may have ended.
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        let _ = self.child.wait();
    }
}

/// A loopback address with a port that was free a moment ago.
pub(super) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?)
}

/// The status and the body of an HTTP response.
pub(super) fn http_get(address: SocketAddr, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("the response is not HTTP")?;
    let status = head.split_ascii_whitespace().nth(1).unwrap_or_default();
    Ok((status.to_owned(), body.to_owned()))
}
