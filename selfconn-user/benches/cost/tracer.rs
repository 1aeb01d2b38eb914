//! Whatever traces: the daemon, the floor, and the peers. Each is started, waited for until it is live, and ended.

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

/// How long one may take until it is live.
const DEADLINE: Duration = Duration::from_secs(30);

/// One that runs; dropping it ends it.
pub(crate) struct Tracer {
    child: Child,
    /// What it said first.
    pub(crate) first: String,
    is_peer: bool,
    /// How often it said that it has read the socket table; needs `-vv`.
    readings: Arc<AtomicU64>,
}

impl Tracer {
    /// The daemon, as it comes but for these options. Its events go to the log that they name, or nowhere.
    pub(crate) fn daemon(binary: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary);
        command.args(["run", "--json"]).args(options);
        Self::start(command)
    }

    /// Empty programs by these methods.
    pub(crate) fn empty(methods: &[String]) -> Result<Self> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("empty").args(methods);
        Self::start(command)
    }

    /// One of the peers, once it traces what `make` makes.
    pub(crate) fn peer(peer: Peer, mut make: impl FnMut() -> Result<()>) -> Result<Self> {
        let mut command = Command::new(peer.program());
        command.args(peer.arguments());
        if peer == Peer::SsPolling {
            return Self::start(command);
        }
        // The tracepoint's files, for those that look for them; on a thread of its own, whose mounts are nobody else's.
        let (mut tracer, said) = tracefs::with(|| Self::spawn(command))?;
        tracer.is_peer = true;
        thread::spawn({
            let mut stdout = tracer.child.stdout.take().context("no stdout")?;
            move || std::io::copy(&mut stdout, &mut std::io::sink())
        });
        // They don't say when they are live, so their programs must be seen to run.
        let _account = enable_stats(Stats::RunTime).context("have the kernel account for BPF programs")?;
        let runs = |pid| -> Result<u64> {
            Ok(programs::of_process(pid)?.values().map(|account| account.runs).sum())
        };
        let until = Instant::now() + DEADLINE;
        loop {
            if let Some(status) = tracer.child.try_wait()? {
                let why = said.join().ok().flatten().unwrap_or_else(|| status.to_string());
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

    /// Starts it and waits for the first line on stdout; the rest goes nowhere.
    fn start(command: Command) -> Result<Self> {
        let what = command.get_program().to_string_lossy().into_owned();
        let (mut tracer, said) = Self::spawn(command)?;
        let mut stdout = BufReader::new(tracer.child.stdout.take().context("no stdout")?);
        if stdout.read_line(&mut tracer.first)? == 0 {
            let _ = tracer.child.kill();
            tracer.child.wait()?;
            let why = said.join().ok().flatten().unwrap_or_else(|| "it said nothing".to_owned());
            bail!("{what}: {}", why.trim());
        }
        thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        Ok(tracer)
    }

    /// Starts it; what it says first on stderr is the thread's to tell.
    fn spawn(mut command: Command) -> Result<(Self, thread::JoinHandle<Option<String>>)> {
        let what = command.get_program().to_string_lossy().into_owned();
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = spawned.with_context(|| format!("start {what}"))?;
        let stderr = child.stderr.take().context("no stderr")?;
        let readings = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&readings);
        let said = thread::spawn(move || {
            let mut first = None;
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                count.fetch_add(u64::from(line.contains("read the socket table")), Ordering::Relaxed);
                first.get_or_insert(line);
            }
            first
        });
        Ok((Self { child, first: String::new(), is_peer: false, readings }, said))
    }

    /// Processor time of a reading of the socket table, in the mean of so many.
    pub(crate) fn time_of_readings(&self, count: u64) -> Result<Duration> {
        let wait = |count: u64| -> Result<(u64, Duration)> {
            let until = Instant::now() + DEADLINE + Duration::from_secs(2 * count);
            loop {
                let readings = self.readings.load(Ordering::Relaxed);
                if readings >= count {
                    return Ok((readings, proc::on_cpu(self.pid())?));
                }
                ensure!(Instant::now() < until, "the socket table is not read");
                thread::sleep(Duration::from_millis(5));
            }
        };
        let (first, before) = wait(self.readings.load(Ordering::Relaxed) + 1)?;
        let (last, after) = wait(first + count)?;
        Ok((after - before) / u32::try_from(last - first)?)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a user would, and waits.
    pub(crate) fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let until = Instant::now() + if self.is_peer { Duration::from_secs(5) } else { DEADLINE };
        while self.child.try_wait()?.is_none() {
            if Instant::now() > until {
                // bpftrace 0.17 does so now and then. Dropped, it is killed.
                ensure!(self.is_peer, "it does not end");
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Others that watch TCP states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Peer {
    Tcpstates,
    Tcplife,
    Bpftrace,
    SsPolling,
}

impl Peer {
    pub(crate) const ALL: [Self; 4] = [Self::Tcpstates, Self::Tcplife, Self::Bpftrace, Self::SsPolling];

    /// As the table has it.
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
            // Where Debian puts libbpf-tools.
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
            // Its heading is the first line.
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
