//! The processes that trace: the daemon, empty programs, and other tools. Each is started, is waited for
//! until it traces, and is ended.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::sys::{Stats, enable_stats};
use selfconn::bpf::tracefs;

use crate::{proc, programs};

/// How long a start may take.
const DEADLINE: Duration = Duration::from_secs(30);

/// A running process. It ends when this is dropped.
pub(crate) struct TracerProcess {
    child: Child,
    /// Its first line of output.
    pub(crate) first: String,
    is_peer: bool,
    /// How often it logged that it has read the socket table; needs `-vv`.
    snapshots: Arc<AtomicU64>,
}

impl TracerProcess {
    /// The daemon with these options.
    pub(crate) fn daemon(binary: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary);
        // The load is one owner's. What its share of the log leaves out would not be measured.
        command.args(["run", "--json", "--log-rate", "4294967295"]).args(options);
        Self::start(command)
    }

    /// Empty programs by these methods.
    pub(crate) fn empty(methods: &[String]) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("empty").args(methods);
        Self::start(command)
    }

    /// Another tool. Waits until it traces what `make` makes.
    pub(crate) fn peer(peer: Peer, mut make: impl FnMut() -> Result<()>) -> Result<Self> {
        let mut command = Command::new(peer.program());
        command.args(peer.arguments());
        if peer == Peer::SsPolling {
            return Self::start(command);
        }
        // Some tools read tracefs, which is mounted on a thread with its own mounts.
        let (mut tracer, first_error) = tracefs::with(|| Self::spawn(command))?;
        tracer.is_peer = true;
        thread::spawn({
            let mut stdout = tracer.child.stdout.take().context("no stdout")?;
            move || std::io::copy(&mut stdout, &mut std::io::sink())
        });
        // They don't print when they are live, so their programs must be seen to run.
        let _stats = enable_stats(Stats::RunTime).context("let the kernel measure BPF programs")?;
        let runs =
            |pid| -> Result<u64> { Ok(programs::of_process(pid)?.values().map(|stats| stats.runs).sum()) };
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = tracer.child.try_wait()? {
                let why = first_error.join().ok().flatten().unwrap_or_else(|| status.to_string());
                bail!("{}: {}", peer.program(), why.trim());
            }
            let before = runs(tracer.pid())?;
            make()?;
            if runs(tracer.pid())? > before {
                return Ok(tracer);
            }
            ensure!(Instant::now() < until, "{} traces nothing", peer.program());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts it and waits for its first line on stdout. The rest is discarded.
    pub(crate) fn start(command: Command) -> Result<Self> {
        let what = command.get_program().to_string_lossy().into_owned();
        let (mut tracer, first_error) = Self::spawn(command)?;
        let mut stdout = BufReader::new(tracer.child.stdout.take().context("no stdout")?);
        if stdout.read_line(&mut tracer.first)? == 0 {
            let _ = tracer.child.kill();
            tracer.child.wait()?;
            let why = first_error.join().ok().flatten().unwrap_or_else(|| "it printed nothing".to_owned());
            bail!("{what}: {}", why.trim());
        }
        thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        Ok(tracer)
    }

    /// Starts it. The thread returns its first line on stderr.
    fn spawn(mut command: Command) -> Result<(Self, thread::JoinHandle<Option<String>>)> {
        let what = command.get_program().to_string_lossy().into_owned();
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.with_context(|| format!("start {what}"))?;
        let stderr = child.stderr.take().context("no stderr")?;
        let snapshots = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&snapshots);
        let first_error = thread::spawn(move || {
            let mut first = None;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                count.fetch_add(u64::from(line.contains("read the socket table")), Ordering::Relaxed);
                first.get_or_insert(line);
            }
            first
        });
        Ok((Self { child, first: String::new(), is_peer: false, snapshots }, first_error))
    }

    /// The mean CPU time of this number of snapshots of the socket table.
    pub(crate) fn cpu_time_of_snapshots(&self, count: u64) -> Result<Duration> {
        let wait = |count: u64| -> Result<(u64, Duration)> {
            let until = Instant::now() + DEADLINE + Duration::from_secs(2 * count);
            loop {
                let snapshots = self.snapshots.load(Ordering::Relaxed);
                if snapshots >= count {
                    return Ok((snapshots, proc::on_cpu(self.pid())?));
                }
                ensure!(Instant::now() < until, "the socket table is not read");
                thread::sleep(Duration::from_millis(5));
            }
        };
        let (first, before) = wait(self.snapshots.load(Ordering::Relaxed) + 1)?;
        let (last, after) = wait(first + count)?;
        Ok((after - before) / u32::try_from(last - first)?)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it by SIGTERM, and waits.
    pub(crate) fn stop(mut self) -> Result<()> {
        let has_ended = self.terminate(if self.is_peer { Duration::from_secs(5) } else { DEADLINE })?;
        // bpftrace 0.17 sometimes does not end. The drop kills it.
        ensure!(has_ended || self.is_peer, "it does not end");
        Ok(())
    }

    /// Sends SIGTERM, and waits at most this long for the end. True: it has ended.
    fn terminate(&mut self, timeout: Duration) -> Result<bool> {
        let until = Instant::now() + timeout;
        if self.child.try_wait()?.is_none() {
            let pid = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        }
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(true)
    }
}

impl Drop for TracerProcess {
    fn drop(&mut self) {
        /// How long the end may take. A guard's filter on `lo` outlives a daemon that is killed.
        const END_TIMEOUT: Duration = Duration::from_secs(2);
        let _ = self.terminate(END_TIMEOUT);
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Other tools that trace TCP states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Tcpstates,
    Tcplife,
    Bpftrace,
    SsPolling,
}

impl Peer {
    pub(crate) const ALL: [Self; 4] = [Self::Tcpstates, Self::Tcplife, Self::Bpftrace, Self::SsPolling];

    /// Its name in the table.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcpstates => "tcpstates",
            Self::Tcplife => "tcplife",
            Self::Bpftrace => "bpftrace",
            Self::SsPolling => "ss_polling",
        }
    }

    fn program(self) -> String {
        let candidates: &[&str] = match self {
            // Debian's package libbpf-tools has them in sbin.
            Self::Tcpstates => &["/usr/sbin/tcpstates", "/usr/bin/tcpstates"],
            Self::Tcplife => &["/usr/sbin/tcplife", "/usr/bin/tcplife"],
            Self::Bpftrace => &["bpftrace"],
            Self::SsPolling => &["sh"],
        };
        let there = candidates.iter().find(|path| fs::exists(path).unwrap_or(false));
        there.unwrap_or(&candidates[candidates.len() - 1]).to_string()
    }

    fn arguments(self) -> Vec<&'static str> {
        match self {
            Self::Tcpstates | Self::Tcplife => vec![],
            Self::Bpftrace => vec![
                "-e",
                "BEGIN { printf(\"live\\n\"); } tracepoint:sock:inet_sock_set_state \
                 /args->sport == args->dport && args->saddr == args->daddr/ { printf(\"%d\\n\", pid); }",
            ],
            Self::SsPolling => {
                vec![
                    "-c",
                    "trap exit TERM; echo live; while :; do ss -tanH | awk '$4 == $5'; sleep 0.1; done",
                ]
            }
        }
    }
}
