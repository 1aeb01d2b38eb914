//! systemd-journal-upload into systemd-journal-remote, by TLS: nothing is missing. journald has a /run and an
//! /etc/systemd of its own, so the machine's journal, if it has one, is not touched.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{
    super::{
        background::{BackgroundProcess, free_address},
        document::Document,
    },
    Shipping,
    log_source::{HOST, connect_to_self},
};
use crate::{environment, run, workspace::Workspace};

/// Where the configuration for the upload expects key and certificates, and where they are in the check.
const CERTIFICATES: [&str; 3] =
    ["/etc/ssl/private/journal-upload.pem", "/etc/ssl/certs/journal-upload.pem", "/etc/ssl/ca/trusted.pem"];

/// Gives the shell mounts of its own and becomes journald. The argument is the configuration for the upload.
const JOURNALD: &str = "mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /etc/systemd && \
    mkdir -p /run/log/journal /run/systemd/journal /etc/systemd/journal-upload.conf.d && \
    cp \"$0\" /etc/systemd/journal-upload.conf.d/selfconn.conf && exec /lib/systemd/systemd-journald";

/// Becomes the daemon, with stdout as a service has it. systemd-cat doesn't set the variable, as systemd does.
const DAEMON: &str = "JOURNAL_STREAM=$(stat --dereference --format=%d:%i /proc/$$/fd/2); \
    export JOURNAL_STREAM; exec \"$0\" run --states --cmdline full --log-rate 200 --host-name \"$1\"";

/// A host whose journal is uploaded, and the host that it is uploaded to.
struct Hosts<'a> {
    packages: &'a Shipping,
    dir: PathBuf,
    journald: BackgroundProcess,
    address: String,
}

impl<'a> Hosts<'a> {
    fn start(packages: &'a Shipping, workspace: &Workspace, dir: &Path) -> Result<Self> {
        let mut openssl = environment::plain("openssl");
        openssl.args([
            "req",
            "-x509",
            "-newkey",
            "rsa:2048",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=localhost",
        ]);
        openssl.args(["-addext", "subjectAltName=DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]);
        run::output(openssl.current_dir(dir))?;
        let port = free_address()?.port();
        let file = workspace.root.join("packaging/shipping/journal-upload.conf");
        let mut config = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        let [key, certificate, trusted] = CERTIFICATES;
        let path = |name: &str| dir.join(name).display().to_string();
        for (from, to) in [
            ("https://journal.example:19532", format!("https://localhost:{port}")),
            (key, path("key.pem")),
            (certificate, path("cert.pem")),
            (trusted, path("cert.pem")),
        ] {
            ensure!(config.contains(from), "journal-upload.conf has no {from}");
            config = config.replace(from, &to);
        }
        fs::write(dir.join("upload.conf"), config).context("write upload.conf")?;
        fs::create_dir(dir.join("remote")).context("make a directory for the other host's journal")?;
        let mut command = environment::plain("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", JOURNALD])
            .arg(dir.join("upload.conf"));
        let journald = BackgroundProcess::start(command, "journald", dir)?;
        let mut this = Self { packages, dir: dir.to_owned(), journald, address: format!("127.0.0.1:{port}") };
        let socket = format!("/proc/{}/root/run/systemd/journal/socket", this.journald.pid());
        this.journald.wait_until("journald listens", || Ok(Path::new(&socket).exists()))?;
        Ok(this)
    }

    /// A program that sees the journal of the first host.
    fn beside_journald(&self) -> Command {
        let mut command = environment::plain("nsenter");
        command.arg("--mount").arg("--target").arg(self.journald.pid().to_string()).arg("--");
        command
    }

    fn daemon(&self, selfconn: &Path) -> Result<BackgroundProcess> {
        let mut command = self.beside_journald();
        command.args(["systemd-cat", "--identifier=selfconn", "sh", "-c", DAEMON]).arg(selfconn).arg(HOST);
        let mut daemon = BackgroundProcess::start(command, "selfconn", &self.dir)?;
        daemon.wait_until("the daemon has started", || Ok(self.numbers(&self.here())?.contains(&1)))?;
        Ok(daemon)
    }

    fn remote(&self) -> Result<BackgroundProcess> {
        let mut command = self.packages.program("lib/systemd/systemd-journal-remote");
        command.arg(format!("--listen-https={}", self.address)).arg("--output").arg(self.dir.join("remote"));
        for (option, file) in [("--key", "key.pem"), ("--cert", "cert.pem")] {
            command.arg(option).arg(self.dir.join(file));
        }
        let mut remote = BackgroundProcess::start(command, "journal-remote", &self.dir)?;
        remote.wait_until("the other host listens", || {
            Ok(std::net::TcpStream::connect(&self.address).is_ok())
        })?;
        Ok(remote)
    }

    fn upload(&self) -> Result<BackgroundProcess> {
        let mut command = self.beside_journald();
        command.arg(self.packages.root.join("lib/systemd/systemd-journal-upload"));
        command.arg("--directory=/run/log/journal");
        command.arg(format!("--save-state={}", self.dir.join("upload.state").display()));
        BackgroundProcess::start(command, "journal-upload", &self.dir)
    }

    /// Begins a new journal file, as a full one does.
    fn rotate(&self) -> Result<()> {
        self.journald.signal(Signal::USR2)
    }

    /// Reads the journal of the first host.
    fn here(&self) -> impl Fn() -> Command {
        || {
            let mut command = self.beside_journald();
            command.args(["journalctl", "--directory=/run/log/journal"]);
            command
        }
    }

    /// Reads the journal that was uploaded.
    fn there(&self) -> impl Fn() -> Command {
        || {
            let mut command = environment::plain("journalctl");
            command.arg("--directory").arg(self.dir.join("remote"));
            command
        }
    }

    /// The `seq` of each event in a journal, in its order. Empty while there is no file.
    fn numbers(&self, journal: &impl Fn() -> Command) -> Result<Vec<u64>> {
        let mut command = journal();
        command.args(["--identifier=selfconn", "--output=cat", "--output-fields=SELFCONN_SEQ", "--quiet"]);
        let Ok(text) = run::output(&mut command) else { return Ok(Vec::new()) };
        text.lines().map(|line| line.parse().with_context(|| format!("{line:?} is not a seq"))).collect()
    }
}

pub(super) fn ships(packages: &Shipping, workspace: &Workspace) -> Result<String> {
    let dir = tempfile::tempdir().context("make a directory for journals")?;
    let hosts = Hosts::start(packages, workspace, dir.path())?;
    let selfconn = workspace.target.join("debug/selfconn");
    let mut daemon = hosts.daemon(&selfconn)?;
    let mut remote = hosts.remote()?;
    let upload = hosts.upload()?;
    let load = |count| connect_to_self(&selfconn, count);

    load(20)?;
    hosts.rotate()?;
    load(10)?;
    remote.wait_until("something is uploaded", || Ok(!hosts.numbers(&hosts.there())?.is_empty()))?;
    upload.signal(Signal::KILL)?;
    drop(upload);
    load(10)?;
    let upload = hosts.upload()?;
    load(10)?;
    remote.signal(Signal::KILL)?;
    drop(remote);
    load(10)?;
    // It ends when nobody listens any more. Its service starts it again.
    drop(upload);
    let mut remote = hosts.remote()?;
    let upload = hosts.upload()?;
    load(10)?;
    daemon.end();
    let made = hosts.numbers(&hosts.here())?;
    let last = made.len() as u64;
    ensure!(made.iter().copied().eq(1..=last), "the journal of the host itself has a gap: {made:?}");
    remote.wait_until("the last event is uploaded", || Ok(hosts.numbers(&hosts.there())?.contains(&last)))?;
    drop((upload, remote));
    let mut there = hosts.numbers(&hosts.there())?;
    let uploaded = there.len();
    there.sort_unstable();
    there.dedup();
    ensure!(there == made, "of {made:?} there are {there:?}");

    let path = dir.path().join("remote").display().to_string();
    let section = Document::read(workspace, "fleet.md")?.section("A journal")?;
    let queries = section.blocks("sh");
    ensure!(queries.len() == 2, "docs/fleet.md has {} queries", queries.len());
    let ask = |query: &str, directory: &str| {
        let shipped = "/var/log/journal/remote";
        ensure!(query.contains(shipped), "the query reads another directory: {query}");
        run::output(environment::plain("sh").args(["-c", &query.replace(shipped, directory)]))
    };
    let answer = ask(queries[0], &path)?;
    ensure!(answer.contains(HOST), "the question: {answer:?}");
    let incomplete = ask(queries[1], &path)?;
    ensure!(incomplete.is_empty(), "no run is incomplete, but: {incomplete}");
    // A journal in which an event is missing.
    let mut export = hosts.there()();
    export.args(["--output=export", "--identifier=selfconn"]);
    let export = run::output_bytes(&mut export)?;
    let gap = dir.path().join("gap");
    fs::create_dir(&gap)?;
    let mut import = packages.program("lib/systemd/systemd-journal-remote");
    import.arg("--output").arg(gap.join("gap.journal")).arg("-");
    run::filter(&mut import, &without_event(&export, 2))?;
    let incomplete = ask(queries[1], &gap.display().to_string())?;
    ensure!(incomplete.contains(&format!("{HOST}\t")), "a missing event is not seen: {incomplete:?}");
    Ok(format!(
        "made {last}, uploaded {uploaded}, twice {}, missing 0; {}",
        uploaded - there.len(),
        answer.lines().next().unwrap_or_default().trim()
    ))
}

/// Entries in the journal's export format, without those with this `seq`. An empty line ends an entry, and no value of
/// an event contains one.
fn without_event(export: &[u8], number: u64) -> Vec<u8> {
    let has_number = format!("\nSELFCONN_SEQ={number}\n").into_bytes();
    let mut kept = Vec::new();
    let mut rest = export;
    while !rest.is_empty() {
        let end = rest.windows(2).position(|pair| pair == b"\n\n").map_or(rest.len(), |at| at + 2);
        let (entry, after) = rest.split_at(end);
        if !entry.windows(has_number.len()).any(|window| window == has_number) {
            kept.extend_from_slice(entry);
        }
        rest = after;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_taken_out_of_an_export() {
        let [first, twelfth, second] =
            ["A=1\nSELFCONN_SEQ=1\nB=2\n\n", "A=1\nSELFCONN_SEQ=12\n\n", "A=1\nSELFCONN_SEQ=2\n\n"];
        let export = [first, twelfth, second].concat();
        assert_eq!(without_event(export.as_bytes(), 2), [first, twelfth].concat().as_bytes());
        assert_eq!(without_event(export.as_bytes(), 3), export.as_bytes());
    }
}
