//! The report at the end of a command, as text for people. Pure.

use std::{collections::HashMap, fmt::Write as _};

use super::findings::{Findings, FoundConnection};
use crate::{
    event::text::{LogRecord, duration, escape, group_thousands},
    ports::{ReservedPorts, sysctl::RESERVED_KEY},
};

/// How the command was watched, and by what.
pub(super) struct ReportContext<'a> {
    /// The processes, in words.
    pub(super) what: &'a str,
    /// What could not be seen, or happened to the processes.
    pub(super) notes: &'a [String],
    /// The ports that are reserved in this network namespace, and its inode. `None`: unknown.
    pub(super) reserved: Option<(u64, ReservedPorts)>,
}

/// Self-connections of one program at one port, for one reason.
pub(super) struct SimilarConnections<'a> {
    pub(super) first: FoundConnection<'a>,
    pub(super) count: u64,
    /// The longest time that one of them held the port, in nanoseconds. `None`: one is open, or it is unknown.
    pub(super) held_ns: Option<u64>,
}

/// The self-connections by program, address, port and cause, in the order of the first of each.
pub(super) fn groups(findings: &Findings) -> Vec<SimilarConnections<'_>> {
    let mut groups: Vec<SimilarConnections<'_>> = Vec::new();
    let mut indices = HashMap::new();
    for found in findings.connections() {
        let held_ns = found.closed.and_then(|closed| closed.number("duration_ns"));
        let record = found.established;
        let texts = ["comm", "addr", "cause"].map(|key| record.text(key));
        let numbers = ["port", "netns"].map(|key| record.number(key));
        let key = (texts, numbers, record.texts("cmdline").collect::<Vec<_>>());
        let index = *indices.entry(key).or_insert(groups.len());
        match groups.get_mut(index) {
            Some(group) => {
                group.count += 1;
                group.held_ns = group.held_ns.zip(held_ns).map(|(a, b)| a.max(b));
                if group.first.blocked.is_empty() {
                    group.first.blocked = found.blocked;
                }
            }
            None => groups.push(SimilarConnections { first: found, count: 1, held_ns }),
        }
    }
    groups
}

/// The whole report.
pub(super) fn text(findings: &Findings, watched: &ReportContext<'_>) -> String {
    let mut out = String::new();
    // Writing to a string can't fail.
    let _ = write_report(findings, watched, &mut out);
    out
}

fn write_report(findings: &Findings, watched: &ReportContext<'_>, out: &mut String) -> std::fmt::Result {
    let (groups, close) = (groups(findings), findings.came_close());
    let count = groups.iter().map(|group| group.count).sum::<u64>() + findings.further;
    write!(out, "selfconn: {}", counted(count, "self-connection"))?;
    let blocked: usize = groups.iter().map(|group| group.first.blocked.len()).sum();
    let by_others = findings.blocked_by_others();
    if blocked + by_others.len() > 0 {
        write!(out, ", {} kept out", counted((blocked + by_others.len()) as u64, "server"))?;
    }
    if !close.is_empty() {
        write!(out, ", {} at risk", counted(close.len() as u64, "port"))?;
    }
    let mode = |name: &str| findings.all("prevented").any(|record| record.text("mode") == Some(name));
    match findings.prevented() {
        0 => {}
        prevented if mode("refuse") => write!(out, ", {} prevented", group_thousands(prevented))?,
        prevented => write!(out, ", {} that --guard refuse would prevent", group_thousands(prevented))?,
    }
    writeln!(out, "; watched {} by {}{}", watched.what, findings.methods().join(" and "), lost(findings))?;
    for note in watched.notes {
        writeln!(out, "selfconn: {note}")?;
    }
    if let Some(why) = &findings.ended_early {
        writeln!(out, "selfconn: the watch ended before the command: {}", escape(why))?;
    }
    if findings.of_nobody > 0 {
        let events = counted(findings.of_nobody, "event");
        writeln!(
            out,
            "selfconn: {events} of processes that had exited: it is unknown whether of this command"
        )?;
    }
    for group in &groups {
        connection(group, watched.reserved.as_ref(), out)?;
    }
    if findings.further > 0 {
        writeln!(out, "\n{} further self-connections are not shown", group_thousands(findings.further))?;
    }
    if findings.further_events > 0 {
        writeln!(out, "\n{} further events are not shown", group_thousands(findings.further_events))?;
    }
    for record in by_others {
        out.push('\n');
        kept_out(record, out)?;
        out.push_str(": a self-connection that is not in this report has it\n");
    }
    for record in close {
        at_risk(record, out)?;
    }
    Ok(())
}

/// `1 port`, `2 ports`, `no self-connection`.
fn counted(count: u64, what: &str) -> String {
    match count {
        0 => format!("no {what}"),
        1 => format!("1 {what}"),
        _ => format!("{} {what}s", group_thousands(count)),
    }
}

fn lost(findings: &Findings) -> String {
    let lost = findings.lost();
    if findings.stopped.is_none() {
        return ", and what was lost is unknown".to_owned();
    }
    if lost.is_empty() {
        return ", nothing was lost".to_owned();
    }
    let causes: Vec<_> = lost.iter().map(|(cause, count)| format!("{count} {cause}")).collect();
    format!(", lost: {}", escape(&causes.join(", ")))
}

/// `python3 -m pytest` and the pid.
pub(super) fn program(record: LogRecord<'_>) -> String {
    let arguments: Vec<_> = record.texts("cmdline").collect();
    let name = match (arguments.is_empty(), record.text("comm").or_else(|| record.text("thread_comm"))) {
        (false, _) => arguments.join(" "),
        (true, Some(comm)) => comm.to_owned(),
        (true, None) => "an unknown process".to_owned(),
    };
    let name = escape(&name);
    match record.number("pid") {
        Some(pid) => format!("{name} (pid {pid})"),
        None => name,
    }
}

/// `127.0.0.1:40123` or `[::1]:40123`.
pub(super) fn endpoint(record: LogRecord<'_>) -> String {
    let addr = escape(record.text("addr").unwrap_or("?"));
    let port = record.number("port").map_or_else(|| "?".to_owned(), |port| port.to_string());
    if addr.contains(':') { format!("[{addr}]:{port}") } else { format!("{addr}:{port}") }
}

/// Why the two ports are the same, as a sentence without its end.
pub(super) fn cause(record: LogRecord<'_>) -> Option<String> {
    match (record.text("cause")?, record.number("refused_before")) {
        ("ephemeral", Some(0) | None) => {
            Some("nobody listened on this port, and connect() chose it as the source port".to_owned())
        }
        ("ephemeral", Some(refused)) => Some(format!(
            "nobody listened on this port: {} refused, and then connect() chose it as the source port",
            match refused {
                1 => "1 attempt was".to_owned(),
                _ => format!("{} attempts were", group_thousands(refused)),
            }
        )),
        ("bound", _) => Some("the client had bound this port itself before it connected".to_owned()),
        _ => None,
    }
}

fn connection(
    group: &SimilarConnections<'_>,
    reserved: Option<&(u64, ReservedPorts)>,
    out: &mut String,
) -> std::fmt::Result {
    let SimilarConnections { first: FoundConnection { established, closed, blocked }, count, held_ns } =
        group;
    write!(out, "\n{} connected to itself at {}", program(*established), endpoint(*established))?;
    if *count > 1 {
        write!(out, ", {} times", group_thousands(*count))?;
    }
    out.push('\n');
    let mut field = |name: &str, text: &str| writeln!(out, "  {name:<10}{text}");
    if let Some(cause) = cause(*established) {
        field("cause", &cause)?;
    }
    let longest = if *count > 1 { "at most " } else { "" };
    let held = match (closed, held_ns) {
        (None, _) => "it is open".to_owned(),
        (Some(_), Some(ns)) => format!("{longest}{}", duration(*ns)),
        (Some(_), None) => "for an unknown time".to_owned(),
    };
    let time_wait = closed.is_some_and(|closed| closed.text("port_blocked_until").is_some());
    field("held", &format!("{held}{}", if time_wait { ", and 1m0s more in TIME_WAIT" } else { "" }))?;
    for record in blocked {
        let mut line = String::new();
        kept_out(*record, &mut line)?;
        field("kept out", &line)?;
    }
    for (index, fix) in fixes(*established, !blocked.is_empty(), reserved).iter().enumerate() {
        field(if index == 0 { "fix" } else { "or" }, fix)?;
    }
    Ok(())
}

/// `node server.js (pid 7): could not bind 127.0.0.1:80, 3 times`.
fn kept_out(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "{} could not bind {}", program(record), endpoint(record))?;
    match record.number("failures") {
        Some(failures @ 2..) => write!(out, ", {} times", group_thousands(failures)),
        _ => Ok(()),
    }
}

/// What fixes it, the best first.
pub(super) fn fixes(
    established: LogRecord<'_>,
    kept_a_server_out: bool,
    reserved: Option<&(u64, ReservedPorts)>,
) -> Vec<String> {
    let check = "in the client: after connect(), getsockname() and getpeername() must differ; else close it and try again";
    if established.text("cause") == Some("bound") {
        return vec![
            "bind the client to another port than the one that it connects to, or to none".to_owned(),
            check.to_owned(),
        ];
    }
    let reserve = established.number("port").and_then(|port| u16::try_from(port).ok()).map(|port| {
        match reserved.filter(|(netns, _)| established.number("netns") == Some(*netns)) {
            Some((_, reserved)) => format!(
                "reserve the port, so that connect() never chooses it: sysctl -w {RESERVED_KEY}={}",
                reserved.with([port])
            ),
            None => {
                format!("reserve the port in its network namespace: selfconn audit --port {port} prints how")
            }
        }
    });
    let hold = "keep the port: a socket that is bound to it by bind(), and need not listen, holds it; \
                a port that connect() chose is not held";
    let last = "stop the clients before their server: close the listener last";
    let was_served = kept_a_server_out || established.number("refused_before").is_some_and(|count| count > 0);
    // A port that was tried again and again is a server's. One that was hit at once was to be a dead port.
    let (first, second) =
        if was_served { (reserve, Some(last.to_owned())) } else { (Some(hold.to_owned()), reserve) };
    first.into_iter().chain(second).chain([check.to_owned()]).collect()
}

fn at_risk(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "\n{} came close at {}", program(record), endpoint(record))?;
    if let Some(refused) = record.number("refused") {
        write!(out, ": {} attempts were refused", group_thousands(refused))?;
    }
    if let Some(expected) = record.number("expected_dials") {
        write!(out, ", and one in {} connects to itself", group_thousands(expected))?;
    }
    out.push('\n');
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// The findings of these events.
    pub(in super::super) fn findings(events: &[Value]) -> Findings {
        let object = |value: &Value| value.as_object().unwrap().clone();
        let started = json!({"event": "started", "hooks": [{"method": "tp_btf"}, {"method": null}, {"method": "kprobe"}]});
        let mut findings = Findings::new(object(&started));
        for event in events {
            findings.add(object(event), None);
        }
        findings
    }

    /// `established` of a client that retried.
    pub(in super::super) fn established(id: &str, refused: u64) -> Value {
        json!({"event": "established", "id": id, "addr": "127.0.0.1", "port": 40_124, "netns": 7, "cause": "ephemeral",
            "refused_before": refused, "pid": 9, "comm": "python3", "cmdline": ["python3", "-m", "pytest"]})
    }

    pub(in super::super) fn stopped(lost: &Value) -> Value {
        json!({"event": "stopped", "lost": lost})
    }

    fn render(events: &[Value]) -> String {
        let reserved = ReservedPorts::parse("8080").unwrap();
        let watched = ReportContext { what: "control group /a", notes: &[], reserved: Some((7, reserved)) };
        text(&findings(events), &watched)
    }

    #[test]
    fn nothing_found_is_a_line_with_what_was_watched_and_lost() {
        let watched = "selfconn: no self-connection; watched control group /a by tp_btf and kprobe";
        assert_eq!(render(&[stopped(&json!({"ring": 0}))]), format!("{watched}, nothing was lost\n"));
        assert_eq!(render(&[stopped(&json!({"ring": 3, "log": 0}))]), format!("{watched}, lost: 3 ring\n"));
        assert_eq!(render(&[]), format!("{watched}, and what was lost is unknown\n"), "the watch was killed");
    }

    #[test]
    fn a_client_that_retried_is_reported_with_the_server_that_it_kept_out() {
        let closed = |id: &str, ns: u64| json!({"event": "closed", "id": id, "duration_ns": ns, "port_blocked_until": "2026-11-26T12:00:00Z"});
        let blocked = |failures: u64| {
            json!({"event": "blocked", "id": "b1", "addr": "0.0.0.0", "port": 40_124, "pid": 11, "comm": "node",
                "failures": failures, "holder": {"id": "1"}})
        };
        let events = [
            established("1", 57),
            blocked(1),
            closed("1", 2_400_000_000),
            blocked(3),
            established("2", 60),
            closed("2", 5_000_000),
            stopped(&json!({})),
        ];
        assert_eq!(
            render(&events),
            "selfconn: 2 self-connections, 1 server kept out; watched control group /a by tp_btf and kprobe, nothing was lost\n\
             \n\
             python3 -m pytest (pid 9) connected to itself at 127.0.0.1:40124, 2 times\n  \
             cause     nobody listened on this port: 57 attempts were refused, and then connect() chose it as the source port\n  \
             held      at most 2.4s, and 1m0s more in TIME_WAIT\n  \
             kept out  node (pid 11) could not bind 0.0.0.0:40124, 3 times\n  \
             fix       reserve the port, so that connect() never chooses it: sysctl -w net.ipv4.ip_local_reserved_ports=8080,40124\n  \
             or        stop the clients before their server: close the listener last\n  \
             or        in the client: after connect(), getsockname() and getpeername() must differ; else close it and try again\n"
        );
    }

    #[test]
    fn the_first_fix_is_that_of_the_case() {
        let first = |event: Value, kept_out| {
            let findings = findings(&[event]);
            fixes(findings.connections()[0].established, kept_out, None).remove(0)
        };
        assert!(
            first(established("1", 0), false).starts_with("keep the port: "),
            "a dead port that was hit at once"
        );
        assert!(first(established("1", 0), true).starts_with("reserve the port in its network namespace"));
        assert!(first(established("1", 1), false).starts_with("reserve the port in its network namespace"));
        let mut bound = established("1", 0);
        bound["cause"] = "bound".into();
        assert!(first(bound, false).starts_with("bind the client to another port"));
    }

    #[test]
    fn a_port_that_was_hit_did_not_only_come_close() {
        let risk = |port: u64| {
            json!({"event": "at_risk", "addr": "127.0.0.1", "port": port, "netns": 7, "pid": 9, "comm": "a\u{1b}",
                "refused": 2_000, "expected_dials": 14_116})
        };
        let text =
            render(&[risk(40_124), risk(40_126), risk(40_126), established("1", 1), stopped(&json!({}))]);
        assert!(text.starts_with("selfconn: 1 self-connection, 1 port at risk; "), "{text}");
        let line = "a\\u{1b} (pid 9) came close at 127.0.0.1:40126: 2,000 attempts were refused, and one in 14,116 connects to itself\n";
        assert!(text.ends_with(line), "{text}");
    }

    #[test]
    fn a_server_that_another_commands_connection_keeps_out_is_found() {
        let blocked = json!({"event": "blocked", "id": "b1", "addr": "::", "port": 80, "pid": 11, "comm": "node",
            "failures": 1, "holder": {"id": "other"}});
        let events = [blocked, stopped(&json!({}))];
        assert!(findings(&events).has_found());
        let text = render(&events);
        assert!(text.starts_with("selfconn: no self-connection, 1 server kept out; "), "{text}");
        assert!(
            text.ends_with(
                "node (pid 11) could not bind [::]:80: a self-connection that is not in this report has it\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn beyond_what_is_kept_events_are_counted_and_no_end_is_missing() {
        let mut events: Vec<_> = (0..20_002).map(|number| established(&number.to_string(), 0)).collect();
        events.push(json!({"event": "at_risk", "addr": "127.0.0.1", "port": 1, "netns": 7}));
        events.extend(
            (0..20_002).map(|number| json!({"event": "closed", "id": number.to_string(), "duration_ns": 5})),
        );
        events.push(stopped(&json!({})));
        let text = render(&events);
        assert!(text.starts_with("selfconn: 20,002 self-connections; "), "{text}");
        assert!(!text.contains("it is open"), "{text}");
        for line in ["\n2 further self-connections are not shown\n", "\n1 further events are not shown\n"] {
            assert!(text.contains(line), "{text}");
        }
    }

    #[test]
    fn what_is_of_others_is_not_reported_without_a_group() {
        let object = |value: Value| value.as_object().unwrap().clone();
        let mut findings = Findings::default();
        let is_ours = |pid| match pid {
            9 => Some(true),
            10 => Some(false),
            _ => None,
        };
        for (id, pid) in [("1", 9), ("2", 10), ("3", 11)] {
            let mut event = established(id, 0);
            event["pid"] = pid.into();
            findings.add(object(event), Some(is_ours));
            findings.add(object(json!({"event": "closed", "id": id})), Some(is_ours));
        }
        assert_eq!((findings.connections().len(), findings.of_nobody, findings.events.len()), (1, 1, 2));
    }

    #[test]
    fn what_a_guard_prevented_is_counted_and_is_no_finding() {
        for (mode, expected) in
            [("refuse", "5 prevented"), ("dry-run", "5 that --guard refuse would prevent")]
        {
            let prevented = |count: u64| json!({"event": "prevented", "mode": mode, "count": count});
            let events = [prevented(2), prevented(3), stopped(&json!({}))];
            assert!(!findings(&events).has_found());
            assert!(render(&events).starts_with(&format!("selfconn: no self-connection, {expected}; ")));
        }
    }
}
