//! `selfconn scan`: lists the self-connections that exist now in every network namespace, with the processes
//! that hold them. Can destroy them.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
    mem,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, bail};
use jiff::Timestamp;
use schemars::JsonSchema;
use selfconn_ebpf::state;
use serde::Serialize;

use crate::{
    bpf::{descriptors, namespaces},
    detect::{
        filter::{Rule, Selection},
        remediation::RemedyOutcome,
    },
    event::{
        ConnectionFields,
        text::{self, escape},
    },
    sockets::{self, HolderSearch, NamespaceSelection, SnapshotOptions, SocketEntry, SocketSnapshot},
    system::{
        clock::{self, Offset},
        logger,
        process::{self, Holder},
    },
};

use holders::SocketHolders;

mod holders;

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn scan                exit code 0: nothing found, 1: something, 2: error
  selfconn scan --json | jq -r 'select(.state == \"ESTABLISHED\") | .pid'

  selfconn scan --only uid=1000             list these
  selfconn scan --only uid=1000 --destroy   destroy them; exit code 0: none is left

Root sees the sockets that processes hold in every network namespace, and TIME_WAIT in every one that can be
entered. Another user sees only some. What could not be looked at is listed as not seen, and in the last line of
--json, as unseen; the exit code is about the rest.";

/// Maximum number of holders named in a text line.
const MAX_NAMED_HOLDERS: usize = 4;

#[derive(Debug, clap::Args)]
pub struct ScanArgs {
    /// One JSON object a line, for each self-connection
    #[arg(long)]
    json: bool,
    /// Destroy each listed self-connection; without this option they are only listed
    #[arg(long, conflicts_with = "procfs")]
    destroy: bool,
    /// Only self-connections whose field matches, such as unit=java* or port=8080; may be repeated
    #[arg(long, value_name = "KEY=GLOB")]
    only: Vec<Rule>,
    /// Exclude self-connections whose field matches or is unknown; may be repeated; overrides --only
    #[arg(long, value_name = "KEY=GLOB")]
    except: Vec<Rule>,
    /// Network namespace to look at: the current one, a file such as /run/netns/NAME or /proc/PID/ns/net, the
    /// one with this inode, or all
    #[arg(long, value_name = "self|PATH|INODE|all", default_value = "all")]
    netns: String,
    /// Find every holder of a socket, even if many files are open on this host
    #[arg(long)]
    holders: bool,
    /// Read /proc/net/tcp instead of asking sock_diag
    #[arg(long, hide = true)]
    procfs: bool,
}

/// A `--json` line.
#[derive(Serialize, JsonSchema)]
#[serde(untagged)]
pub(super) enum ScanLine<'a> {
    Entry(Box<ScanEntry>),
    /// The last line.
    Summary(ScanSummary<'a>),
}

/// A self-connection.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ScanEntry {
    #[serde(flatten)]
    connection: ConnectionFields,
    /// Kernel name of the TCP state.
    state: &'static str,
    /// Time at which TIME_WAIT ends and a server can bind the port again.
    #[serde(serialize_with = "text::optional_rfc3339")]
    #[schemars(with = "Option<String>")]
    port_blocked_until: Option<Timestamp>,
    /// Result of `--destroy`. Null without that option.
    result: Option<&'static str>,
    /// Why it could not be destroyed.
    why: Option<String>,
}

/// What was listed, and what could not be.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ScanSummary<'a> {
    event: &'static str,
    /// Number of self-connections, one a line before this.
    connections: usize,
    /// What could not be looked at, as text.
    unseen: &'a [String],
}

/// Results of `--destroy`, one for each listed socket. Empty without that option. `Ok(false)`: the socket was
/// already gone.
type DestroyOutcomes = Vec<Result<bool, String>>;

fn result(outcome: &Result<bool, String>) -> RemedyOutcome {
    match outcome {
        Ok(true) => RemedyOutcome::Destroyed,
        Ok(false) => RemedyOutcome::Gone,
        Err(_) => RemedyOutcome::Failed,
    }
}

/// Lists the self-connections, and destroys them with `--destroy`.
///
/// # Errors
/// If no socket table can be read or stdout cannot be written.
pub fn run(args: &ScanArgs) -> Result<ExitCode> {
    logger::init(0, false);
    if args.destroy {
        sockets::can_destroy().map_err(|why| anyhow!("--destroy: {why}"))?;
        for rule in &args.except {
            if let Some(warning) = rule.warning_of_exception() {
                warn(&format!("--except {rule}: {warning}"));
            }
        }
    }
    // Outside the initial pid namespace the holders' pids in /proc are not those that the output needs.
    let search = if args.holders { HolderSearch::Complete } else { HolderSearch::Quick };
    let knows_pids = process::is_in_initial_pid_ns();
    // What is destroyed must be known to be held.
    let holders = (knows_pids || args.destroy).then_some(search);
    let selection = NamespaceSelection::parse(&args.netns);
    let mut snapshot = snapshot(args, &selection, holders)
        .with_context(|| format!("cannot read the socket tables (--netns {})", escape(&args.netns)))?;
    if snapshot.namespaces.is_empty() && snapshot.entries.is_empty() {
        if let NamespaceSelection::Inode(inode) = selection {
            let unseen = snapshot.unseen.iter().map(|item| format!("; not seen: {item}"));
            bail!("no network namespace with the inode {inode} was found{}", unseen.collect::<String>());
        }
        bail!("no socket table can be read: {}", snapshot.unseen.join("; "));
    }
    snapshot.entries.sort_by_key(|SocketEntry { endpoint, cookie, .. }| {
        (endpoint.netns, endpoint.ip(), endpoint.port, endpoint.is_ipv6(), *cookie)
    });
    let mut holders = SocketHolders::default();
    if knows_pids {
        holders.found = mem::take(&mut snapshot.holders);
    } else if snapshot.entries.iter().any(|entry| entry.inode != 0) {
        let why = "holders: their pids are unknown outside the initial pid namespace";
        holders.found.unseen = Some(why.to_owned());
    }
    let rules = Selection { only: args.only.clone(), except: args.except.clone() };
    let mut left_alone = Vec::new();
    snapshot.entries.retain(|entry| match rules.exclusion(&holders.connection_fields(entry)) {
        None => true,
        Some(exclusion) if exclusion.is_certain => false,
        // A list has what it is asked for, by what is known of the holder. What may be another's is not destroyed.
        Some(exclusion) if args.destroy => {
            let address = std::net::SocketAddr::new(entry.endpoint.ip(), entry.endpoint.port);
            left_alone.push(format!("{address}: {}", exclusion.why));
            false
        }
        Some(exclusion) => !exclusion.is_by_except,
    });
    let outcomes = if args.destroy {
        destroy(&snapshot.entries, &rules, &mut holders).context("cannot start a thread")?
    } else {
        DestroyOutcomes::new()
    };
    if let Some(why) = &snapshot.without_sock_diag {
        warn(&format!("sock_diag: {why}: cookies and interfaces are unknown: /proc/net/tcp has none"));
    }
    let command_lines = holders.lookups.unseen();
    let mut unseen = mem::take(&mut snapshot.unseen);
    unseen.extend(holders.found.unseen.clone().into_iter().chain(command_lines));
    for item in &unseen {
        warn(&format!("not seen: {item}"));
    }
    let out = if args.json {
        let mut out = json(&snapshot, &mut holders, &outcomes)?;
        let connections = snapshot.entries.len();
        let summary = ScanSummary { event: "summary", connections, unseen: &unseen };
        serde_json::to_writer(&mut out, &ScanLine::Summary(summary))?;
        out.push(b'\n');
        out
    } else {
        table(&snapshot, &holders, &outcomes).into_bytes()
    };
    super::print(&out)?;
    for item in &left_alone {
        warn(&format!("not destroyed: {item}"));
    }
    let gone = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    Ok(if snapshot.entries.len() == gone && left_alone.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(1)
    })
}

/// Reads the socket tables. The iterator over descriptors is used only if each holder must be known, or if a namespace
/// may exist that nothing else leads to.
fn snapshot(
    args: &ScanArgs,
    selection: &NamespaceSelection,
    holders: Option<HolderSearch>,
) -> io::Result<SocketSnapshot> {
    let options = SnapshotOptions {
        procfs_only: args.procfs,
        holders,
        selection: Some(selection),
        ..SnapshotOptions::default()
    };
    let is_one = matches!(selection, NamespaceSelection::Current | NamespaceSelection::At(_));
    // The iterators would hide what procfs shows.
    if args.procfs || is_one && !args.destroy && !args.holders {
        return sockets::snapshot(options, &[]);
    }
    let list = namespaces::open_for_command();
    let options = SnapshotOptions { namespaces: list.as_ref().ok(), ..options };
    let is_all = *selection == NamespaceSelection::All;
    let is_quick = is_all && !args.destroy && !args.holders && list.is_ok();
    let descriptors = if is_quick { None } else { descriptors::open_for_command().ok() };
    let open_descriptors = is_quick.then_some(descriptors::open_for_command as fn() -> _);
    let options = SnapshotOptions { descriptors: descriptors.as_ref(), open_descriptors, ..options };
    let mut snapshot = sockets::snapshot(options, &[])?;
    if is_all {
        snapshot.unseen.extend(list.err().map(|why| sockets::no_list(&why)));
    }
    Ok(snapshot)
}

/// Destroys the sockets, but for those that the kernel itself uses, or may use. A socket without an inode is one that
/// its program has closed.
fn destroy(
    entries: &[SocketEntry],
    selection: &Selection,
    holders: &mut SocketHolders,
) -> io::Result<DestroyOutcomes> {
    let spared = |entry: &SocketEntry| {
        let fields = (entry.inode != 0).then(|| holders.connection_fields(entry))?;
        selection.kernel_socket_reason(&fields)
    };
    let spared: Vec<_> = entries.iter().map(spared).collect();
    let targets =
        entries.iter().zip(&spared).filter(|(_, why)| why.is_none()).map(|(entry, _)| entry.clone());
    let mut outcomes = sockets::destroy_all(&targets.collect::<Vec<_>>())?.into_iter();
    let outcome = |why: Option<&str>| match why {
        Some(why) => Some(Err(why.to_owned())),
        None => outcomes.next(),
    };
    Ok(spared.into_iter().filter_map(outcome).collect())
}

fn warn(message: &str) {
    let _ = writeln!(io::stderr(), "selfconn: {}", escape(message));
}

fn json(
    snapshot: &SocketSnapshot,
    holders: &mut SocketHolders,
    outcomes: &DestroyOutcomes,
) -> Result<Vec<u8>> {
    let clock = Offset::now();
    let now_ns = clock::boot_ns();
    let mut out = Vec::new();
    for (number, entry) in snapshot.entries.iter().enumerate() {
        // With a cookie, which is unique on this boot, the id is the same in each scan. Else it is valid for
        // this scan only.
        let id = match entry.cookie {
            Some(cookie) => format!("scan-{cookie:x}"),
            None => format!("scan-{:x}-{number:x}", snapshot.began_ns),
        };
        let until = |left: Duration| clock.wall(now_ns + u64::try_from(left.as_nanos()).unwrap_or(0));
        let outcome = outcomes.get(number);
        let time_wait_left = entry.time_wait_left.filter(|_| !matches!(outcome, Some(Ok(_))));
        let row = ScanEntry {
            connection: ConnectionFields { id: Some(id), ..holders.connection_fields(entry) },
            state: state::name(entry.state),
            port_blocked_until: time_wait_left.map(until),
            result: outcome.map(|outcome| result(outcome).name()),
            why: outcome.and_then(|outcome| outcome.as_ref().err()).cloned(),
        };
        serde_json::to_writer(&mut out, &ScanLine::Entry(Box::new(row)))?;
        out.push(b'\n');
    }
    Ok(out)
}

fn table(snapshot: &SocketSnapshot, holders: &SocketHolders, outcomes: &DestroyOutcomes) -> String {
    let mut out = String::new();
    let endpoints: Vec<_> = snapshot.entries.iter().map(endpoint).collect();
    let width = endpoints.iter().map(String::len).max().unwrap_or(0);
    for (number, (entry, endpoint)) in snapshot.entries.iter().zip(&endpoints).enumerate() {
        let (state, netns) = (state::name(entry.state), entry.endpoint.netns);
        let _ = write!(out, "{state:<11}  {endpoint:<width$}  netns {netns:<10}  ");
        match (entry.time_wait_left, holders.holders(entry)) {
            (Some(left), _) => {
                let _ = write!(out, "no process; holds the port for {:.1} s more", left.as_secs_f64());
            }
            (None, Some([])) => out.push_str("no process; the kernel is closing it"),
            (None, Some(holders)) => write_holders(holders, &mut out),
            (None, None) if holders.has_none(entry) => {
                out.push_str("no process has it open; the kernel may use it itself");
            }
            (None, None) => out.push_str("an unknown process"),
        }
        match outcomes.get(number) {
            None => {}
            Some(Ok(true)) => out.push_str(": destroyed"),
            Some(Ok(false)) => out.push_str(": already closed"),
            Some(Err(why)) => {
                let _ = write!(out, ": NOT destroyed: {}", escape(why));
            }
        }
        out.push('\n');
    }
    let plural = |count, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
    let namespaces = plural(snapshot.namespaces.len(), "network namespace");
    let _ = match snapshot.entries.len() {
        0 => writeln!(out, "nothing found in {namespaces}"),
        count if outcomes.is_empty() => {
            writeln!(out, "{} in {namespaces}", plural(count, "self-connection"))
        }
        count => {
            let destroyed = outcomes.iter().filter(|outcome| **outcome == Ok(true)).count();
            writeln!(out, "{} in {namespaces}, {destroyed} destroyed", plural(count, "self-connection"))
        }
    };
    out
}

fn endpoint(entry: &SocketEntry) -> String {
    let (addr, port) = (entry.endpoint.ip(), entry.endpoint.port);
    let device = match (&entry.device, entry.endpoint.device()) {
        (Some(name), _) => format!("%{}", escape(name)),
        (None, Some(ifindex)) => format!("%{ifindex}"),
        (None, None) => String::new(),
    };
    if addr.is_ipv6() { format!("[{addr}{device}]:{port}") } else { format!("{addr}{device}:{port}") }
}

fn write_holders(holders: &[Holder], out: &mut String) {
    for (n, Holder { pid, comm, .. }) in holders.iter().take(MAX_NAMED_HOLDERS).enumerate() {
        let comma = if n == 0 { "" } else { ", " };
        let _ = write!(out, "{comma}{}[{pid}]", escape(comm.as_deref().unwrap_or("")));
    }
    if holders.len() > MAX_NAMED_HOLDERS {
        let _ = write!(out, " and {} more", holders.len() - MAX_NAMED_HOLDERS);
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::Endpoint;

    use super::*;
    use crate::{
        detect::samples,
        sockets::{Holders, SocketRef},
    };

    fn entry(addr: &str, state: u8, inode: u64) -> SocketEntry {
        let endpoint = Endpoint { netns: 4_026_531_840, ..samples::endpoint(addr, 40_000) };
        SocketEntry {
            cookie: Some(0xabc),
            inode,
            uid: (inode != 0).then_some(33),
            ..samples::entry(endpoint, state)
        }
    }

    /// The same socket, bound to a device.
    fn bound(mut entry: SocketEntry) -> SocketEntry {
        entry.endpoint.ifindex = 2;
        entry
    }

    fn snapshot() -> (SocketSnapshot, SocketHolders) {
        let time_wait = Duration::from_millis(59_949);
        let entries = vec![
            entry("127.0.0.1", state::ESTABLISHED, 1),
            bound(entry("fe80::1", state::ESTABLISHED, 2)),
            SocketEntry { time_wait_left: Some(time_wait), ..entry("::1", state::TIME_WAIT, 0) },
            entry("127.0.0.2", state::CLOSING, 0),
            SocketEntry { cookie: None, ..entry("127.0.0.3", state::ESTABLISHED, 3) },
        ];
        let holder = |pid| Holder { pid, comm: Some("a\nb".to_owned()), start_ticks: Some(0) };
        let by_inode = [(1, vec![holder(u32::MAX)]), (2, (1..=6).map(holder).collect())];
        let by_socket =
            by_inode.into_iter().map(|(inode, holders)| (SocketRef::of_inode(inode), holders)).collect();
        let found = Holders { by_socket, complete: true, unseen: None };
        let snapshot = SocketSnapshot {
            entries,
            namespaces: [(1, 0), (2, 0), (3, 0)].into(),
            began_ns: 0xff,
            ..SocketSnapshot::default()
        };
        (snapshot, SocketHolders { found, ..SocketHolders::default() })
    }

    #[test]
    fn text_output_has_a_line_for_each_socket_and_a_summary() {
        let (snapshot, holders) = snapshot();
        assert_eq!(
            table(&snapshot, &holders, &vec![]),
            "\
ESTABLISHED  127.0.0.1:40000    netns 4026531840  a\\nb[4294967295]
ESTABLISHED  [fe80::1%2]:40000  netns 4026531840  a\\nb[1], a\\nb[2], a\\nb[3], a\\nb[4] and 2 more
TIME_WAIT    [::1]:40000        netns 4026531840  no process; holds the port for 59.9 s more
CLOSING      127.0.0.2:40000    netns 4026531840  no process; the kernel is closing it
ESTABLISHED  127.0.0.3:40000    netns 4026531840  no process has it open; the kernel may use it itself
5 self-connections in 3 network namespaces
"
        );
        let nothing = SocketSnapshot { namespaces: [(1, 0)].into(), ..SocketSnapshot::default() };
        assert_eq!(table(&nothing, &holders, &vec![]), "nothing found in 1 network namespace\n");
    }

    #[test]
    fn destroy_outcomes_are_shown_with_the_reason_of_a_failure() {
        let (snapshot, mut holders) = snapshot();
        let outcomes = vec![Ok(true), Ok(false), Ok(true), Err("no\nway".to_owned()), Ok(true)];
        let text = table(&snapshot, &holders, &outcomes);
        for expected in [
            "a\\nb[4294967295]: destroyed\n",
            " and 2 more: already closed\n",
            "s more: destroyed\n",
            "the kernel is closing it: NOT destroyed: no\\nway\n",
            "5 self-connections in 3 network namespaces, 3 destroyed\n",
        ] {
            assert!(text.contains(expected), "{expected} is not in {text}");
        }
        let bytes = json(&snapshot, &mut holders, &outcomes).unwrap();
        let rows: Vec<serde_json::Value> =
            bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let results: Vec<_> = rows.iter().map(|row| row["result"].as_str().unwrap()).collect();
        assert_eq!(results, ["destroyed", "gone", "destroyed", "failed", "destroyed"]);
        assert_eq!(rows[3]["why"], "no\nway");
        assert!(rows[2]["port_blocked_until"].is_null(), "the port is free: {}", rows[2]);
    }

    #[test]
    fn json_has_a_line_for_each_socket_and_null_for_unknown_fields() {
        let (snapshot, mut holders) = snapshot();
        let bytes = json(&snapshot, &mut holders, &vec![]).unwrap();
        let rows: Vec<serde_json::Value> =
            bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        assert_eq!(rows.len(), 5);
        assert_eq!(rows[0]["id"], "scan-abc");
        assert_eq!(rows[0]["owner"], "holder");
        assert_eq!(rows[0]["comm"], "a\nb");
        assert_eq!(rows[0]["exe"], serde_json::Value::Null, "there is no such process");
        assert_eq!(rows[0]["uid"], 33);
        assert_eq!(rows[1]["pid"], 1);
        assert_eq!(rows[1]["holders"].as_array().unwrap().len(), 6);
        assert_eq!(rows[2]["state"], "TIME_WAIT");
        assert!(rows[2]["port_blocked_until"].is_string());
        assert_eq!(rows[2]["holders"], serde_json::json!([]));
        assert_eq!(rows[4]["id"], "scan-ff-4");
        holders.found.complete = false;
        let bytes = json(&snapshot, &mut holders, &vec![]).unwrap();
        let first: serde_json::Value =
            serde_json::from_slice(bytes.split(|byte| *byte == b'\n').next().unwrap()).unwrap();
        assert_eq!((&first["comm"], &first["holders"]), (&"a\nb".into(), &serde_json::Value::Null));
        for unknown in [
            "holders",
            "pid",
            "comm",
            "owner",
            "cause",
            "isn",
            "cookie",
            "port_blocked_until",
            "result",
            "why",
        ] {
            assert!(rows[4][unknown].is_null(), "{unknown}: {}", rows[4]);
        }
    }
}
