//! Checks that parsers and outputs must pass for any input. The fuzz targets in `fuzz/` and the property
//! tests in this file call them. No released build contains this module.

use std::{rc::Rc, sync::Arc};

use jiff::Timestamp;
use selfconn_ebpf::{COMM_LEN, Endpoint, Opener, Task, Transition, state};
use serde_json::Value;
use zerocopy::FromZeros as _;

use crate::{
    detect::connection::{ConnectionEvent, Connections, comm},
    event::{ConnectionFields, Envelope, Event, EventKind, render, text},
    output::journald,
    ports::{LocalPorts, PortRange, ReservedPorts},
    sockets,
    system::{
        identity::Identity,
        process::{self, Attribution, Holder, ProcessInfo, Subject},
    },
};

/// Runs every parser of text from `/proc`. No input may make it panic.
pub fn proc_text(bytes: &[u8]) {
    process::parse_anything(bytes);
    sockets::parse_anything(bytes);
}

/// Renders a log line, which can be from a newer version or damaged: its text must be safe for a terminal.
///
/// # Panics
/// If the text is not safe.
pub fn log_line(bytes: &[u8]) {
    if let Some(fields) = text::parse(bytes) {
        assert_harmless(&render(text::LogRecord::new(&fields)));
        // The journal output only gets lines of selfconn itself, so only such keys are tested.
        if fields.keys().all(|key| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')) {
            journal_entry(text::LogRecord::new(&fields), bytes);
        }
    }
}

/// Parses the texts of the two sysctls of local ports, from `/proc/sys` or from a configuration file for the
/// boot: the result must print as the kernel would print it.
///
/// # Panics
/// If it does not.
pub fn sysctl_text(range: &str, reserved: &str) {
    if let Ok(range) = PortRange::parse(range) {
        let firsts = range.first_ports();
        assert!(firsts.len() > 0 && firsts.clone().all(|port| range.contains(port)), "{range}");
    }
    if let Ok(reserved) = ReservedPorts::parse(reserved) {
        let printed = reserved.to_string();
        assert_eq!(ReservedPorts::parse(&printed).as_ref(), Ok(&reserved), "{printed}");
        assert_eq!(reserved.is_empty(), printed.is_empty());
    }
    if let Ok(ports) = LocalPorts::parse(range, reserved) {
        let expected = ports.first_ports().count();
        assert_eq!(ports.expected_connects() as usize, expected);
        for port in [0, 1, 32_768, 60_999, u16::MAX] {
            let _ = ports.reach(port);
        }
    }
}

/// Builds the journal entry of a line. Parsed as the journal parses it, the entry must have the fields of the
/// line and no others.
fn journal_entry(record: text::LogRecord<'_>, json: &[u8]) {
    const FIXED_FIELDS: [&str; 5] =
        ["MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "SELFCONN_JSON"];
    let mut entry = Vec::new();
    journald::entry(record, json, &mut entry);
    let mut rest = entry.as_slice();
    let mut names = Vec::new();
    while let Some(end) = rest.iter().position(|byte| matches!(byte, b'=' | b'\n')) {
        let (name, value) =
            (std::str::from_utf8(&rest[..end]).expect("a field name is UTF-8"), &rest[end + 1..]);
        let length = match rest[end] {
            b'=' => value.iter().position(|byte| *byte == b'\n').expect("a value has an end"),
            _ => u64::from_le_bytes(value[..8].try_into().expect("a length has eight bytes")) as usize + 8,
        };
        assert_eq!(value[length], b'\n', "{name}");
        if name == "MESSAGE" {
            assert_harmless(std::str::from_utf8(&value[..length]).expect("a message is UTF-8"));
        }
        names.push(name.to_owned());
        rest = &value[length + 1..];
    }
    assert!(rest.is_empty(), "{rest:?}");
    let line_fields = record.fields().filter(|(_, value)| !value.is_null());
    let expected: Vec<_> = FIXED_FIELDS
        .into_iter()
        .map(str::to_owned)
        .chain(line_fields.map(|(key, _)| format!("SELFCONN_{}", key.to_ascii_uppercase())))
        .collect();
    assert_eq!(names, expected);
}

/// Reports a connection of a process that chose hostile names: the JSON must be one line that contains these
/// names unchanged, and the text must be safe for a terminal.
///
/// # Panics
/// If one of the two is not the case.
pub fn hostile_names(names: &[String]) {
    let fields = connection_fields(names);
    let event =
        Event { time: Timestamp::UNIX_EPOCH, seq: 1, kind: EventKind::Established(Box::new(fields.clone())) };

    let host = names.first().cloned().unwrap_or_default();
    let identity = Identity { host, machine_id: None, boot_id: None, run: 1 };
    let envelope = Envelope::new(&identity);
    let mut line = Vec::new();
    event.write_json_line(&envelope, &mut line);
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert_eq!(line.last(), Some(&b'\n'));
    let read_back: Value = serde_json::from_slice(&line).expect("a line is JSON");
    assert_eq!(read_back["event"], "established");
    assert_eq!(read_back["host"], identity.host);
    assert_eq!(read_back["comm"], serde_json::json!(fields.comm));
    assert_eq!(read_back["thread_comm"], serde_json::json!(fields.thread_comm));
    assert_eq!(read_back["cmdline"], serde_json::json!(fields.cmdline));
    assert_eq!(read_back["cgroup"], serde_json::json!(fields.cgroup));

    log_line(&line);

    assert_harmless(&render(text::LogRecord::new(&event.to_json_fields(&envelope))));
}

/// Asserts that a text starts no new line, moves no cursor, sets no colour, and changes no text direction.
fn assert_harmless(line: &str) {
    // An event can have further lines. They begin with a line break and four spaces, which selfconn itself
    // writes.
    for part in line.split("\n    ") {
        let unsafe_char = part.chars().find(|c| c.is_control() || is_format(*c));
        assert_eq!(unsafe_char, None, "in {line:?}");
    }
}

/// The characters of Unicode's category Cf that affect a terminal: direction marks and characters without
/// width.
fn is_format(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}')
}

/// The fields of a self-connection whose opener has these names.
fn connection_fields(names: &[String]) -> ConnectionFields {
    let name = |index: usize| names.get(index).cloned();
    let kernel_name = |index: usize| {
        let mut bytes = [0; COMM_LEN];
        for (to, from) in bytes[..COMM_LEN - 1].iter_mut().zip(name(index).unwrap_or_default().bytes()) {
            *to = from;
        }
        bytes
    };
    let task = Task { pid: 7, tid: 8, comm: kernel_name(0), leader: kernel_name(1) };
    let opener = Opener { at_ns: 1, start_ns: 1, task, ..Opener::UNKNOWN };
    let transition = Transition {
        opener,
        endpoint: Endpoint::new(0, [127, 0, 0, 1].into(), 80, false),
        old: state::SYN_RECV,
        new: state::ESTABLISHED,
        ..Transition::new_zeroed()
    };
    let attribution = Attribution {
        subject: Subject::Opener,
        device: None,
        refused_before: Some(1),
        process: Rc::new(ProcessInfo {
            comm: name(2),
            exe: name(3).map(Arc::from),
            is_exe_ours: true,
            cmdline: Some(Arc::new(names.iter().map(String::as_str).collect())),
            cgroup: name(4).map(Arc::from),
            unit: name(5).map(Arc::from),
            container: name(6).map(Arc::from),
            pod: name(8).map(Arc::from),
            owner_cgroup: None,
            uid: None,
        }),
        holders: Some(vec![Holder { pid: 9, comm: name(7), start_ticks: None }]),
    };
    let mut fields = None;
    Connections::new(1).apply(&transition, |event| {
        if let ConnectionEvent::Established(connection) = event {
            fields = Some(ConnectionFields::new(connection, 1, &attribution));
        }
    });
    let fields = fields.expect("an ESTABLISHED socket is a connection");
    assert_eq!(fields.thread_comm, Some(comm(&task.comm)));
    fields
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::FORMATS;

    #[test]
    fn hostile_names_are_rendered_safely() {
        for name in [
            "\n{\"event\":\"fake\"}",
            "\r\u{1b}[2K\u{1b}[1Aroot",
            "\u{1b}]0;title\u{7}",
            "\u{202e}gpj.exe",
            "a\u{200b}b\u{2066}c\u{feff}",
            "\"},{\"event\":\"closed\"",
            "\\n\\u000a",
            "\u{fffd}\u{9b}31m",
            "%s%n$(reboot)`reboot`",
        ] {
            hostile_names(&vec![name.to_owned(); 8]);
            hostile_names(&vec![name.repeat(4_096 / name.len() + 1); 8]);
        }
    }

    proptest! {
        #[test]
        fn any_name_stays_in_its_field(names in proptest::collection::vec(".*|\\PC*|[\\x00-\\x1f\\x7f-\\x9f\u{202a}-\u{202e}]{0,40}", 0..9)) {
            hostile_names(&names);
        }

        #[test]
        fn any_log_line_is_rendered_safely(
            kind in prop_oneof![proptest::sample::select(&FORMATS).prop_map(|format| format.event.to_owned()), ".*"],
            fields in proptest::collection::vec(("time|addr|port|comm|pid|how|where|hooks|limits|kernel|from|to|.*", ".*"), 0..8),
        ) {
            let mut object = serde_json::Map::from_iter(fields.into_iter().map(|(key, value)| (key, Value::from(value))));
            object.insert("event".to_owned(), kind.into());
            log_line(&serde_json::to_vec(&object).unwrap());
        }

        #[test]
        fn a_parsed_sysctl_prints_as_the_kernel_prints_it(
            range in r"[0-9]{1,5}[ \t][0-9]{1,5}|\PC*",
            reserved in r"([0-9]{1,5}(-[0-9]{1,5})?,){0,6}|\PC*",
        ) {
            sysctl_text(&range, &reserved);
        }

        #[test]
        fn no_text_from_proc_makes_a_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            proc_text(&bytes);
        }
    }
}
