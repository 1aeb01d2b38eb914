//! Renders one line for each connection: an `established` event is held back until its `closed` event is
//! found, and then only `closed` is shown. A connection without an end in the log is shown as open.

use std::collections::{BTreeMap, HashMap};

use crate::event::{
    format_of,
    text::{JsonFields, LogRecord, Style, duration},
};
use jiff::Timestamp;

/// Maximum number of connections that are held back. Beyond it, the oldest ones are shown without their end.
const MAX_OPEN_CONNECTIONS: usize = 50_000;

/// Renders events as lines.
#[derive(Debug)]
pub(super) struct ConnectionView {
    style: Style,
    /// Events of the connections that are not closed so far, in order.
    open: BTreeMap<u64, JsonFields>,
    /// Key in `open` of each connection id.
    positions: HashMap<String, u64>,
    next: u64,
}

impl ConnectionView {
    pub(super) fn new(style: Style) -> Self {
        Self { style, open: BTreeMap::new(), positions: HashMap::new(), next: 0 }
    }

    /// Adds an event and appends the lines that can be shown now.
    pub(super) fn push(&mut self, event: JsonFields, out: &mut String) {
        let record = LogRecord::new(&event);
        let id = record.text("id").map(ToOwned::to_owned);
        match (record.event(), id) {
            ("established", Some(id)) => {
                self.next += 1;
                if let Some(earlier) = self.positions.insert(id, self.next) {
                    self.open.remove(&earlier);
                }
                self.open.insert(self.next, event);
                if self.open.len() > MAX_OPEN_CONNECTIONS
                    && let Some((_, oldest)) = self.open.pop_first()
                {
                    self.remove_id(&oldest);
                    self.write_line(&oldest, None, out);
                }
            }
            ("closed", Some(id)) => {
                if let Some(number) = self.positions.remove(&id) {
                    self.open.remove(&number);
                }
                self.write_line(&event, None, out);
            }
            // A run begins or ends, so the end of connections that an earlier run left open is not observed.
            ("started" | "stopped", _) => {
                self.flush(Some("UNCLOSED"), out);
                self.write_line(&event, None, out);
            }
            _ => self.write_line(&event, None, out),
        }
    }

    /// Called when the log has no more events for now. The first time, connections without an end are shown
    /// as `OPEN` with their age. Later (`is_live`) they have just been established and are shown as such.
    pub(super) fn caught_up(&mut self, is_live: bool, out: &mut String) {
        self.flush((!is_live).then_some("OPEN"), out);
    }

    fn flush(&mut self, label: Option<&str>, out: &mut String) {
        self.positions.clear();
        for event in std::mem::take(&mut self.open).into_values() {
            self.write_line(&event, label, out);
        }
    }

    fn remove_id(&mut self, event: &JsonFields) {
        if let Some(id) = LogRecord::new(event).text("id") {
            self.positions.remove(id);
        }
    }

    fn write_line(&self, event: &JsonFields, label: Option<&str>, out: &mut String) {
        let record = LogRecord::new(event);
        self.style.line(format_of(record), record, label, out);
        if label == Some("OPEN")
            && let Some(since) = record.time()
        {
            let age = Timestamp::now().duration_since(since).as_nanos().max(0);
            out.push_str(&format!("; for {}", duration(u64::try_from(age).unwrap_or(u64::MAX))));
        }
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::text::parse;

    /// The first words of each line after the time.
    fn words(lines: &[&str], is_live: bool) -> Vec<String> {
        let mut view = ConnectionView::new(Style { colour: false });
        let mut out = String::new();
        for line in lines {
            view.push(parse(line.as_bytes()).unwrap(), &mut out);
        }
        view.caught_up(is_live, &mut out);
        assert!(view.open.is_empty() && view.positions.is_empty());
        let word = |line: &str| line.split_whitespace().skip(1).take(2).collect::<Vec<_>>().join(" ");
        out.lines().map(word).collect()
    }

    const OPEN_A: &str = r#"{"event":"established","id":"a","addr":"127.0.0.1","port":1}"#;
    const OPEN_B: &str = r#"{"event":"established","id":"b","addr":"127.0.0.1","port":2}"#;
    const CLOSED_A: &str = r#"{"event":"closed","id":"a","addr":"127.0.0.1","port":1}"#;
    const STOPPED: &str = r#"{"event":"stopped","made":3,"open":1}"#;

    #[test]
    fn a_connection_is_one_line() {
        let (a, b) = ("closed 127.0.0.1:1", "OPEN 127.0.0.1:2");
        assert_eq!(words(&[OPEN_A, OPEN_B, CLOSED_A], false), [a, b]);
        assert_eq!(words(&[OPEN_A, CLOSED_A], true), [a]);
        assert_eq!(words(&[CLOSED_A], false), [a], "it was established before the shown part of the log");
        assert_eq!(words(&[OPEN_A, OPEN_A], false), ["OPEN 127.0.0.1:1"]);
        assert_eq!(words(&[OPEN_B], true), ["ESTABLISHED 127.0.0.1:2"]);
        assert_eq!(
            words(&[OPEN_A, OPEN_B, CLOSED_A, STOPPED], false),
            [a, "UNCLOSED 127.0.0.1:2", "stopped 3"]
        );
    }

    #[test]
    fn connections_beyond_the_limit_are_shown_and_not_kept() {
        let mut view = ConnectionView::new(Style { colour: false });
        let mut out = String::new();
        for number in 0..MAX_OPEN_CONNECTIONS + 5 {
            let line = format!(r#"{{"event":"established","id":"{number}","addr":"::1","port":3}}"#);
            view.push(parse(line.as_bytes()).unwrap(), &mut out);
        }
        assert_eq!(
            (view.open.len(), view.positions.len(), out.lines().count()),
            (MAX_OPEN_CONNECTIONS, MAX_OPEN_CONNECTIONS, 5)
        );
    }
}
