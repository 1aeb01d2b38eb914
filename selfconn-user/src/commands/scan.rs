//! `selfconn scan`: the self-connections that exist now, in every network namespace, and who holds them.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
    io::{self, Write as _},
    process::ExitCode,
};

use anyhow::{Context as _, Result, anyhow, bail};
use selfconn_ebpf::state;
use serde::Serialize;

use crate::{
    clock::{self, Offset},
    event::Subject,
    filter::{Rule, Selection},
    logger,
    process::{self, Facts, Holder},
    remedy::Outcome,
    sink::text::escape,
    sockets::{self, Found, Options, Search, Survey, holders},
};

/// Shown below the options.
pub const EXAMPLE: &str = "\
Examples:
  selfconn scan                exit code 0: nothing found, 1: something, 2: error
  selfconn scan --json | jq -r 'select(.state == \"ESTABLISHED\") | .pid'

  selfconn scan --only comm=java             these...
  selfconn scan --only comm=java --destroy   ...are destroyed; exit code 0: none of them is left

As root it sees every network namespace; as another user its own, and says what it could not see.";

/// As many holders are named in a line for people.
const NAMED: usize = 4;

/// Options of `scan`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// One JSON object a line, for each self-connection
    #[arg(long)]
    json: bool,
    /// Destroy each of them; without this, what is listed is what would be destroyed
    #[arg(long, conflicts_with = "procfs")]
    destroy: bool,
    /// Only those of which this field matches, such as comm=java* or port=8080; may be repeated
    #[arg(long, value_name = "KEY=GLOB")]
    only: Vec<Rule>,
    /// None of which this field matches, or is unknown; may be repeated, and wins
    #[arg(long, value_name = "KEY=GLOB")]
    except: Vec<Rule>,
    /// Look for every holder of a socket, however many files are open on this host
    #[arg(long)]
    holders: bool,
    /// Read /proc/net/tcp instead of asking sock_diag
    #[arg(long, hide = true)]
    procfs: bool,
}

/// A self-connection, as `--json` has it.
#[derive(Debug, Serialize)]
struct Row {
    #[serde(flatten)]
    subject: Subject,
    /// The kernel's name of it.
    state: &'static str,
    /// When TIME_WAIT ends and a server can bind the port again.
    port_blocked_until: Option<String>,
    /// What `--destroy` came to; null without it.
    result: Option<&'static str>,
    /// Why it could not be destroyed.
    why: Option<String>,
}

/// Of each that was found, what `--destroy` came to; empty without it.
type Outcomes = Vec<Result<bool, String>>;

fn result(outcome: &Result<bool, String>) -> Outcome {
    match outcome {
        Ok(true) => Outcome::Destroyed,
        Ok(false) => Outcome::Gone,
        Err(_) => Outcome::Failed,
    }
}

/// Looks, and tells.
///
/// # Errors
/// When no socket table can be read, or stdout not written.
pub fn run(args: &Args) -> Result<ExitCode> {
    logger::init(0, false);
    if args.destroy {
        sockets::can_destroy().map_err(|why| anyhow!("--destroy: {why}"))?;
    }
    let options = Options { procfs_only: args.procfs, ..Options::default() };
    let mut survey = sockets::survey(options, &[]).context("cannot start a thread")?;
    if survey.namespaces.is_empty() {
        bail!("no socket table can be read: {}", survey.unseen.join("; "));
    }
    survey.found.sort_by_key(|found| (found.netns, found.addr, found.port, found.is_ipv6, found.cookie));
    let mut holding = Holding::look(&survey.found, args.holders);
    let selection = Selection { only: args.only.clone(), except: args.except.clone() };
    survey.found.retain(|found| selection.spares(&holding.subject(found, String::new())).is_none());
    let outcomes = if args.destroy {
        sockets::destroy_all(&survey.found).context("cannot start a thread")?
    } else {
        Outcomes::new()
    };
    if let Some(why) = &survey.without_sock_diag {
        warn(&format!("sock_diag: {why}: cookies and interfaces are unknown: /proc/net/tcp has none"));
    }
    for what in survey.unseen.iter().chain(&holding.unseen) {
        warn(&format!("not seen: {what}"));
    }
    let out = if args.json {
        json(&survey, &mut holding, &outcomes)?
    } else {
        text(&survey, &holding, &outcomes).into_bytes()
    };
    super::print(&out)?;
    let gone = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    Ok(if survey.found.len() == gone { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn warn(what: &str) {
    let _ = writeln!(io::stderr(), "selfconn: {}", escape(what));
}

/// The processes behind the sockets.
#[derive(Debug, Default)]
struct Holding {
    /// Of each socket that has any, by its inode.
    of: HashMap<u64, Vec<Holder>>,
    facts: HashMap<u32, Facts>,
    /// Whether there can't be more holders.
    complete: bool,
    unseen: Vec<String>,
}

impl Holding {
    fn look(found: &[Found], every: bool) -> Self {
        let inodes: HashSet<_> = found.iter().map(|found| found.inode).filter(|inode| *inode != 0).collect();
        if inodes.is_empty() {
            return Self::default();
        }
        if !process::is_in_initial_pid_ns() {
            let why = "holders: their pids are unknown outside the initial pid namespace".to_owned();
            return Self { unseen: vec![why], ..Self::default() };
        }
        let holders = holders(&inodes, if every { Search::Complete } else { Search::Quick });
        let unseen = holders.unseen.into_iter().collect();
        Self { of: holders.of, complete: holders.complete, unseen, ..Self::default() }
    }

    /// Nobody holds a socket without an inode. `None`: who holds it could not be seen.
    fn holders(&self, found: &Found) -> Option<&[Holder]> {
        if found.inode == 0 { Some(&[]) } else { self.of.get(&found.inode).map(Vec::as_slice) }
    }

    fn subject(&mut self, found: &Found, id: String) -> Subject {
        let holders = self.holders(found).map(<[_]>::to_vec);
        let first = holders.as_ref().and_then(|holders| holders.first()).cloned();
        let facts = first.as_ref().map(|holder| {
            self.facts
                .entry(holder.pid)
                .or_insert_with(|| process::read(holder.pid).unwrap_or_default())
                .clone()
        });
        let facts = facts.unwrap_or_default();
        Subject {
            id,
            cookie: found.cookie,
            source: "scan",
            family: if found.is_ipv6 { "ipv6" } else { "ipv4" },
            addr: found.addr.to_string(),
            ifindex: found.ifindex,
            port: found.port,
            netns: Some(found.netns),
            cause: None,
            pid: first.as_ref().map(|holder| holder.pid),
            tid: None,
            comm: first.as_ref().and_then(|holder| holder.comm.clone()),
            thread_comm: None,
            exe: facts.exe,
            cmdline: facts.cmdline,
            uid: found.uid,
            cgroup: facts.cgroup,
            unit: facts.unit,
            container: facts.container,
            owner: first.map(|_| "holder"),
            holders: holders.filter(|_| found.inode == 0 || self.complete),
            isn: None,
            peer_isn: None,
        }
    }
}

fn json(survey: &Survey, holding: &mut Holding, outcomes: &Outcomes) -> Result<Vec<u8>> {
    let clock = Offset::now();
    let now_ns = clock::boot_ns();
    let mut out = Vec::new();
    for (number, found) in survey.found.iter().enumerate() {
        // The same in each scan where there is a cookie, which is unique on this boot; else this scan's own.
        let id = match found.cookie {
            Some(cookie) => format!("scan-{cookie:x}"),
            None => format!("scan-{:x}-{number:x}", survey.began_ns),
        };
        let until = |left| {
            let left_ns = u64::try_from(left).unwrap_or(0);
            format!("{:.9}", clock.wall(now_ns + left_ns))
        };
        let outcome = outcomes.get(number);
        let time_wait_left = found.time_wait_left.filter(|_| !matches!(outcome, Some(Ok(_))));
        let row = Row {
            subject: holding.subject(found, id),
            state: state::name(found.state),
            port_blocked_until: time_wait_left.map(|left| until(left.as_nanos())),
            result: outcome.map(|outcome| result(outcome).name()),
            why: outcome.and_then(|outcome| outcome.as_ref().err()).cloned(),
        };
        serde_json::to_writer(&mut out, &row)?;
        out.push(b'\n');
    }
    Ok(out)
}

fn text(survey: &Survey, holding: &Holding, outcomes: &Outcomes) -> String {
    let mut out = String::new();
    let ends: Vec<_> = survey.found.iter().map(end).collect();
    let width = ends.iter().map(String::len).max().unwrap_or(0);
    for (number, (found, end)) in survey.found.iter().zip(&ends).enumerate() {
        let _ = write!(out, "{:<11}  {end:<width$}  netns {:<10}  ", state::name(found.state), found.netns);
        match (found.time_wait_left, holding.holders(found)) {
            (Some(left), _) => {
                let _ = write!(out, "no process; holds the port for {:.1} s more", left.as_secs_f64());
            }
            (None, Some([])) => out.push_str("no process; the kernel ends it"),
            (None, Some(holders)) => name_all(holders, &mut out),
            (None, None) => out.push_str("an unknown process"),
        }
        match outcomes.get(number) {
            None => {}
            Some(Ok(true)) => out.push_str(": destroyed"),
            Some(Ok(false)) => out.push_str(": gone by itself"),
            Some(Err(why)) => {
                let _ = write!(out, ": NOT destroyed: {}", escape(why));
            }
        }
        out.push('\n');
    }
    let plural = |count, one: &str| if count == 1 { format!("1 {one}") } else { format!("{count} {one}s") };
    let namespaces = plural(survey.namespaces.len(), "network namespace");
    let _ = match survey.found.len() {
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

fn end(found: &Found) -> String {
    let Found { addr, port, .. } = found;
    match found.ifindex {
        Some(ifindex) => format!("[{addr}%{ifindex}]:{port}"),
        None if addr.is_ipv6() => format!("[{addr}]:{port}"),
        None => format!("{addr}:{port}"),
    }
}

fn name_all(holders: &[Holder], out: &mut String) {
    for (n, Holder { pid, comm }) in holders.iter().take(NAMED).enumerate() {
        let comma = if n == 0 { "" } else { ", " };
        let _ = write!(out, "{comma}{}[{pid}]", escape(comm.as_deref().unwrap_or("")));
    }
    if holders.len() > NAMED {
        let _ = write!(out, " and {} more", holders.len() - NAMED);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn found(addr: &str, state: u8, inode: u64) -> Found {
        Found {
            addr: addr.parse().unwrap(),
            port: 40_000,
            is_ipv6: addr.contains(':'),
            state,
            netns: 4_026_531_840,
            ifindex: None,
            cookie: Some(0xabc),
            inode,
            uid: (inode != 0).then_some(33),
            time_wait_left: None,
        }
    }

    fn survey() -> (Survey, Holding) {
        let time_wait = Duration::from_millis(59_949);
        let found = vec![
            found("127.0.0.1", state::ESTABLISHED, 1),
            Found { ifindex: Some(2), ..found("fe80::1", state::ESTABLISHED, 2) },
            Found { time_wait_left: Some(time_wait), ..found("::1", state::TIME_WAIT, 0) },
            found("127.0.0.2", state::CLOSING, 0),
            Found { cookie: None, ..found("127.0.0.3", state::ESTABLISHED, 3) },
        ];
        let holder = |pid| Holder { pid, comm: Some("a\nb".to_owned()) };
        let of = HashMap::from([(1, vec![holder(u32::MAX)]), (2, (1..=6).map(holder).collect())]);
        let survey = Survey { found, namespaces: [1, 2, 3].into(), began_ns: 0xff, ..Survey::default() };
        (survey, Holding { of, complete: true, ..Holding::default() })
    }

    #[test]
    fn people_get_a_line_for_each_and_the_counts() {
        let (survey, holding) = survey();
        assert_eq!(
            text(&survey, &holding, &vec![]),
            "\
ESTABLISHED  127.0.0.1:40000    netns 4026531840  a\\nb[4294967295]
ESTABLISHED  [fe80::1%2]:40000  netns 4026531840  a\\nb[1], a\\nb[2], a\\nb[3], a\\nb[4] and 2 more
TIME_WAIT    [::1]:40000        netns 4026531840  no process; holds the port for 59.9 s more
CLOSING      127.0.0.2:40000    netns 4026531840  no process; the kernel ends it
ESTABLISHED  127.0.0.3:40000    netns 4026531840  an unknown process
5 self-connections in 3 network namespaces
"
        );
        let nothing = Survey { namespaces: [1].into(), ..Survey::default() };
        assert_eq!(text(&nothing, &holding, &vec![]), "nothing found in 1 network namespace\n");
    }

    #[test]
    fn what_was_destroyed_is_told_and_what_was_not_says_why() {
        let (survey, mut holding) = survey();
        let outcomes = vec![Ok(true), Ok(false), Ok(true), Err("no\nway".to_owned()), Ok(true)];
        let text = text(&survey, &holding, &outcomes);
        for says in [
            "a\\nb[4294967295]: destroyed\n",
            " and 2 more: gone by itself\n",
            "s more: destroyed\n",
            "the kernel ends it: NOT destroyed: no\\nway\n",
            "5 self-connections in 3 network namespaces, 3 destroyed\n",
        ] {
            assert!(text.contains(says), "{says} is not in {text}");
        }
        let bytes = json(&survey, &mut holding, &outcomes).unwrap();
        let rows: Vec<serde_json::Value> =
            bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect();
        let results: Vec<_> = rows.iter().map(|row| row["result"].as_str().unwrap()).collect();
        assert_eq!(results, ["destroyed", "gone", "destroyed", "failed", "destroyed"]);
        assert_eq!(rows[3]["why"], "no\nway");
        assert!(rows[2]["port_blocked_until"].is_null(), "it is free: {}", rows[2]);
    }

    #[test]
    fn json_has_a_line_for_each_and_null_for_the_unknown() {
        let (survey, mut holding) = survey();
        let bytes = json(&survey, &mut holding, &vec![]).unwrap();
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
        holding.complete = false;
        let bytes = json(&survey, &mut holding, &vec![]).unwrap();
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
