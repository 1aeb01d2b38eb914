//! Programs that run for a while: started, asked over HTTP, and ended whatever happens.

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

/// Generous; what works is there within seconds.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// A process that is ended when it is dropped.
pub(super) struct Running {
    child: Child,
    name: String,
    output: PathBuf,
}

impl Running {
    /// What it says goes into a file in `dir`.
    pub(super) fn start(mut command: Command, dir: &Path) -> Result<Self> {
        let program = Path::new(command.get_program()).file_name().unwrap_or_default();
        let name = program.to_string_lossy().into_owned();
        let output = dir.join(format!("{name}.out"));
        let file = File::create(&output).with_context(|| format!("create {}", output.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { child, name, output })
    }

    /// Waits until `is_so`. What it said is part of the error.
    pub(super) fn until(&mut self, what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
        let until = Instant::now() + DEADLINE;
        while !is_so()? {
            let ended = self.child.try_wait()?;
            if ended.is_some() || Instant::now() > until {
                let said = std::fs::read_to_string(&self.output).unwrap_or_default();
                bail!("{what}: not so ({} {ended:?}); it said:\n{said}", self.name);
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.child.id().cast_signed()) {
            // It is a child that was not waited for, so the number is still its own.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

/// A port of the loopback address that was free a moment ago.
pub(super) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?)
}

/// Status and body.
pub(super) fn get(at: SocketAddr, path: &str) -> Result<(String, String)> {
    let mut stream = TcpStream::connect(at)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("no answer in HTTP")?;
    let status = head.split_ascii_whitespace().nth(1).unwrap_or_default();
    Ok((status.to_owned(), body.to_owned()))
}
