//! One line for each connection: what was opened is held until its end is found, and told with it. What has no end in
//! the log is told as open.

use std::collections::{BTreeMap, HashMap};

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::sink::text::{Painter, Record, duration};

/// More than this many connections are not held back; the oldest are told as they are.
const HELD: usize = 50_000;

type Event = Map<String, Value>;

/// Makes lines of events.
#[derive(Debug)]
pub(super) struct View {
    painter: Painter,
    /// Those that were opened and not closed so far, in order.
    held: BTreeMap<u64, Event>,
    numbers: HashMap<String, u64>,
    next: u64,
}

impl View {
    pub(super) fn new(painter: Painter) -> Self {
        Self { painter, held: BTreeMap::new(), numbers: HashMap::new(), next: 0 }
    }

    /// Takes in an event, and appends what there is to be told now.
    pub(super) fn take(&mut self, event: Event, out: &mut String) {
        let record = Record::new(&event);
        let id = record.text("id").map(ToOwned::to_owned);
        match (record.event(), id) {
            ("established", Some(id)) => {
                self.next += 1;
                if let Some(earlier) = self.numbers.insert(id, self.next) {
                    self.held.remove(&earlier);
                }
                self.held.insert(self.next, event);
                if self.held.len() > HELD
                    && let Some((_, oldest)) = self.held.pop_first()
                {
                    self.forget(&oldest);
                    self.line(&oldest, None, out);
                }
            }
            ("closed", Some(id)) => {
                if let Some(number) = self.numbers.remove(&id) {
                    self.held.remove(&number);
                }
                self.line(&event, None, out);
            }
            // A run begins or ends: nobody watches what an earlier one left open.
            ("started" | "stopped", _) => {
                self.flush(Some("UNCLOSED"), out);
                self.line(&event, None, out);
            }
            _ => self.line(&event, None, out),
        }
    }

    /// The log has nothing more for now. At the first time what is open has been so for long; later it is news.
    pub(super) fn caught_up(&mut self, is_news: bool, out: &mut String) {
        self.flush((!is_news).then_some("OPEN"), out);
    }

    fn flush(&mut self, word: Option<&str>, out: &mut String) {
        self.numbers.clear();
        for event in std::mem::take(&mut self.held).into_values() {
            self.line(&event, word, out);
        }
    }

    fn forget(&mut self, event: &Event) {
        if let Some(id) = Record::new(event).text("id") {
            self.numbers.remove(id);
        }
    }

    fn line(&self, event: &Event, word: Option<&str>, out: &mut String) {
        let record = Record::new(event);
        self.painter.line(record, word, out);
        if word == Some("OPEN")
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
    use crate::sink::text::parse;

    /// The words of the lines.
    fn words(lines: &[&str], is_news: bool) -> Vec<String> {
        let mut view = View::new(Painter { colour: false });
        let mut out = String::new();
        for line in lines {
            view.take(parse(line.as_bytes()).unwrap(), &mut out);
        }
        view.caught_up(is_news, &mut out);
        assert!(view.held.is_empty() && view.numbers.is_empty());
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
        assert_eq!(words(&[CLOSED_A], false), [a], "its opening is before what is shown");
        assert_eq!(words(&[OPEN_A, OPEN_A], false), ["OPEN 127.0.0.1:1"]);
        assert_eq!(words(&[OPEN_B], true), ["ESTABLISHED 127.0.0.1:2"]);
        assert_eq!(
            words(&[OPEN_A, OPEN_B, CLOSED_A, STOPPED], false),
            [a, "UNCLOSED 127.0.0.1:2", "stopped 3"]
        );
    }

    #[test]
    fn more_than_can_be_held_is_told_and_not_kept() {
        let mut view = View::new(Painter { colour: false });
        let mut out = String::new();
        for number in 0..HELD + 5 {
            let line = format!(r#"{{"event":"established","id":"{number}","addr":"::1","port":3}}"#);
            view.take(parse(line.as_bytes()).unwrap(), &mut out);
        }
        assert_eq!((view.held.len(), view.numbers.len(), out.lines().count()), (HELD, HELD, 5));
    }
}
