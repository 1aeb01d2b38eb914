//! What is asked of parsers and sinks whatever bytes they get: the checks behind the fuzz targets in `fuzz/`, and
//! behind the property tests here. In no build that is shipped.

use std::rc::Rc;

use jiff::Timestamp;
use selfconn_ebpf::{COMM_LEN, Opener, Task, Transition, family, state};
use serde_json::Value;

use crate::{
    connection::{Connections, Happening, comm},
    event::{Event, Subject, What},
    kernel::host::Capabilities,
    ports::{LocalPorts, PortRange, ReservedPorts},
    process::{self, Facts, Holder, Who},
    sink::{journal, json_line, text},
    sockets,
};

/// Every parser of text out of `/proc`.
pub fn proc_text(bytes: &[u8]) {
    process::parse_anything(bytes);
    sockets::parse_anything(bytes);
    let _ = std::str::from_utf8(bytes).map(Capabilities::parse);
}

/// A line of a log, perhaps of a newer version, perhaps damaged: what people are shown of it is harmless.
///
/// # Panics
/// When it isn't.
pub fn log_line(bytes: &[u8]) {
    if let Some(fields) = text::parse(bytes) {
        let mut shown = String::new();
        let written = text::render(text::Record::new(&fields), &mut shown);
        assert!(written.is_ok());
        assert_harmless(&shown);
        // It is handed our own lines only, whose keys are ours.
        if fields.keys().all(|key| key.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')) {
            journal_entry(text::Record::new(&fields), bytes);
        }
    }
}

/// The texts of the two sysctls of local ports, from `/proc/sys` or from a file for the boot: what is read is what the
/// kernel would print of it.
///
/// # Panics
/// When it isn't.
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
        assert_eq!(ports.expected_dials() as usize, expected);
        for port in [0, 1, 32_768, 60_999, u16::MAX] {
            let _ = ports.reach(port);
        }
    }
}

/// What the journal is handed of a line: read as the journal reads it, it has the fields of the line, and no others.
fn journal_entry(record: text::Record<'_>, json: &[u8]) {
    const OURS: [&str; 5] = ["MESSAGE", "MESSAGE_ID", "PRIORITY", "SYSLOG_IDENTIFIER", "SELFCONN_JSON"];
    let mut entry = Vec::new();
    journal::entry(record, json, &mut entry);
    let mut rest = entry.as_slice();
    let mut names = Vec::new();
    while let Some(end) = rest.iter().position(|byte| matches!(byte, b'=' | b'\n')) {
        let (name, value) = (std::str::from_utf8(&rest[..end]).expect("a name is text"), &rest[end + 1..]);
        let length = match rest[end] {
            b'=' => value.iter().position(|byte| *byte == b'\n').expect("a value ends"),
            _ => u64::from_le_bytes(value[..8].try_into().expect("eight bytes")) as usize + 8,
        };
        assert_eq!(value[length], b'\n', "{name}");
        if name == "MESSAGE" {
            assert_harmless(std::str::from_utf8(&value[..length]).expect("a message is text"));
        }
        names.push(name.to_owned());
        rest = &value[length + 1..];
    }
    assert!(rest.is_empty(), "{rest:?}");
    let of_line = record.fields().filter(|(_, value)| !value.is_null());
    let expected: Vec<_> = OURS
        .into_iter()
        .map(str::to_owned)
        .chain(of_line.map(|(key, _)| format!("SELFCONN_{}", key.to_ascii_uppercase())))
        .collect();
    assert_eq!(names, expected);
}

/// A process that chooses its names: the JSON is one line that holds them, and the text is harmless.
///
/// # Panics
/// When it isn't so.
pub fn hostile_names(names: &[String]) {
    let subject = subject(names);
    let event = Event { time: Timestamp::UNIX_EPOCH, what: What::Established(Box::new(subject.clone())) };

    let mut line = Vec::new();
    json_line(&event, &mut line);
    assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
    assert_eq!(line.last(), Some(&b'\n'));
    let read_back: Value = serde_json::from_slice(&line).expect("a line is JSON");
    assert_eq!(read_back["event"], "established");
    assert_eq!(read_back["comm"], serde_json::json!(subject.comm));
    assert_eq!(read_back["thread_comm"], serde_json::json!(subject.thread_comm));
    assert_eq!(read_back["cmdline"], serde_json::json!(subject.cmdline));
    assert_eq!(read_back["cgroup"], serde_json::json!(subject.cgroup));

    log_line(&line);

    let mut shown = Vec::new();
    text::line(&event, &mut shown);
    let shown = String::from_utf8(shown).expect("text is UTF-8");
    assert_harmless(shown.strip_suffix('\n').expect("a line ends"));
}

/// Nothing in it starts a line, moves a cursor, colours, or turns text around.
fn assert_harmless(line: &str) {
    // Further lines of an event are ours: they begin with a line break and four spaces.
    for part in line.split("\n    ") {
        let bad = part.chars().find(|c| c.is_control() || is_format(*c));
        assert_eq!(bad, None, "in {line:?}");
    }
}

/// The characters of Unicode's category Cf that matter to a terminal: marks of direction and what has no width.
fn is_format(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0001}' | '\u{e0020}'..='\u{e007f}')
}

/// The subject of a self-connection whose opener is called by these names.
fn subject(names: &[String]) -> Subject {
    let name = |index: usize| names.get(index).cloned();
    let kernel_name = |index: usize| {
        let mut bytes = [0; COMM_LEN];
        for (to, from) in bytes[..COMM_LEN - 1].iter_mut().zip(name(index).unwrap_or_default().bytes()) {
            *to = from;
        }
        bytes
    };
    let task = Task { pid: 7, tid: 8, comm: kernel_name(0), leader: kernel_name(1) };
    let opener = Opener { at_ns: 1, start_ns: 1, task, uid: 0, cause: 0 };
    let transition = Transition {
        opener,
        port: 80,
        family: family::INET,
        old: state::SYN_RECV,
        new: state::ESTABLISHED,
        ..Transition::from_bytes(&[0; size_of::<Transition>()]).expect("its own length")
    };
    let who = Who {
        facts: Rc::new(Facts {
            comm: name(2),
            exe: name(3),
            cmdline: Some(names.to_vec()),
            cgroup: name(4),
            unit: name(5),
            container: name(6),
        }),
        holders: Some(vec![Holder { pid: 9, comm: name(7) }]),
    };
    let mut subject = None;
    Connections::new(1).apply(&transition, |happening| {
        if let Happening::Established(connection) = happening {
            subject = Some(Subject::new(connection, 1, &who));
        }
    });
    let subject = subject.expect("an ESTABLISHED socket is a connection");
    assert_eq!(subject.thread_comm, Some(comm(&task.comm)));
    subject
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_were_made_to_deceive_do_not() {
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
        fn no_name_gets_out_of_its_field(names in proptest::collection::vec(".*|\\PC*|[\\x00-\\x1f\\x7f-\\x9f\u{202a}-\u{202e}]{0,40}", 0..9)) {
            hostile_names(&names);
        }

        #[test]
        fn no_line_of_a_log_gets_out_of_its_line(
            kind in "started|established|state|closed|lost|stopped|at_risk|blocked|remedied|.*",
            fields in proptest::collection::vec(("time|addr|port|comm|pid|how|where|hooks|limits|kernel|from|to|.*", ".*"), 0..8),
        ) {
            let mut object = serde_json::Map::from_iter(fields.into_iter().map(|(key, value)| (key, Value::from(value))));
            object.insert("event".to_owned(), kind.into());
            log_line(&serde_json::to_vec(&object).unwrap());
        }

        #[test]
        fn what_a_sysctl_says_is_read_as_the_kernel_prints_it(
            range in r"[0-9]{1,5}[ \t][0-9]{1,5}|\PC*",
            reserved in r"([0-9]{1,5}(-[0-9]{1,5})?,){0,6}|\PC*",
        ) {
            sysctl_text(&range, &reserved);
        }

        #[test]
        fn no_text_of_proc_is_too_odd(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            proc_text(&bytes);
        }
    }
}
