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

/// How long a process may take to end. It is killed after that.
const END_DEADLINE: Duration = Duration::from_secs(20);

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

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
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

    /// Asks the process to end, and waits for that.
    pub(super) fn end(&mut self) {
        let deadline = Instant::now() + END_DEADLINE;
        let mut is_asked = false;
        // The child has not been waited for while this is `None`, so the pid is still its own.
        while let Ok(None) = self.child.try_wait() {
            if !is_asked {
                is_asked = true;
                // A stopped process handles a signal only after it continues.
                let _ = self.signal(Signal::TERM).and_then(|()| self.signal(Signal::CONT));
            } else if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
            } else {
                thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

impl Drop for BackgroundProcess {
    fn drop(&mut self) {
        self.end();
    }
}

/// A loopback address with a port that was free a moment ago.
pub(super) fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?)
}

/// The status and the body of an HTTP response.
pub(crate) fn http_get(address: SocketAddr, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut response = String::new();
    stream.read_to_string(&mut response)?;
    let (head, body) = response.split_once("\r\n\r\n").context("the response is not HTTP")?;
    let status = head.split_ascii_whitespace().nth(1).unwrap_or_default();
    Ok((status.to_owned(), body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_process_is_ended_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sleep");
        command.arg("1000");
        let process = BackgroundProcess::start(command, "sleep", dir.path()).unwrap();
        process.signal(Signal::STOP).unwrap();
        let begin = Instant::now();
        drop(process);
        assert!(begin.elapsed() < END_DEADLINE, "SIGTERM ends it");
    }
}
