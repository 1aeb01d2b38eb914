//! What the watch has seen of a command: its self-connections with their ends, the servers that they kept out, and the
//! ports that came close. Pure.

use std::collections::{HashMap, HashSet};

use serde_json::Value;

use crate::event::text::{JsonFields, LogRecord};

/// Maximum number of events that are kept, besides the ends of the connections that are kept. Further ones are counted.
const MAX_EVENTS: usize = 20_000;

/// True if this process belongs to the command. `None`: it has exited, so it has no ancestors.
type IsWatched = fn(u32) -> Option<bool>;

/// The events of a command.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) started: JsonFields,
    /// All others that concern the command, in their order.
    pub(super) events: Vec<JsonFields>,
    /// Self-connections beyond what is kept.
    pub(super) further: u64,
    /// Other events beyond what is kept.
    pub(super) further_events: u64,
    /// Events of processes that had exited before it was asked whose they are.
    pub(super) of_nobody: u64,
    pub(super) stopped: Option<JsonFields>,
    /// Why the watch ended before the command did.
    pub(super) ended_early: Option<String>,
    /// The ids of the `established` events that are kept.
    established: HashSet<String>,
}

/// A self-connection of the command.
pub(super) struct FoundConnection<'a> {
    pub(super) established: LogRecord<'a>,
    /// `None`: it is open.
    pub(super) closed: Option<LogRecord<'a>>,
    /// The servers that could not bind its port: the last event of each.
    pub(super) blocked: Vec<LogRecord<'a>>,
}

impl Findings {
    pub(super) fn new(started: JsonFields) -> Self {
        Self { started, ..Self::default() }
    }

    /// Adds an event of the watch. `is_watched`: asks whose it is, because the watch itself doesn't know.
    pub(super) fn add(&mut self, event: JsonFields, is_watched: Option<IsWatched>) {
        let record = LogRecord::new(&event);
        match record.event() {
            "stopped" => {
                self.stopped = Some(event);
                return;
            }
            "established" | "at_risk" | "blocked" | "prevented" => {
                if !self.is_of_command(record, is_watched) {
                    return;
                }
            }
            "closed" => {
                // A connection that is not kept has no `established` here.
                if record.text("id").is_some_and(|id| self.established.contains(id)) {
                    self.events.push(event);
                }
                return;
            }
            "lost" | "unguarded" => {}
            _ => return,
        }
        if self.events.len() >= MAX_EVENTS {
            match record.event() {
                "established" => self.further += 1,
                _ => self.further_events += 1,
            }
            return;
        }
        if record.event() == "established"
            && let Some(id) = record.text("id")
        {
            self.established.insert(id.to_owned());
        }
        self.events.push(event);
    }

    fn is_of_command(&mut self, record: LogRecord<'_>, is_watched: Option<IsWatched>) -> bool {
        let Some(is_watched) = is_watched else { return true };
        let of_pid = |pid: Option<u64>| pid.and_then(|pid| u32::try_from(pid).ok()).and_then(is_watched);
        // A server of the command, or one that a self-connection of the command keeps out.
        let opener = record.object("opener").and_then(|opener| opener.number("pid"));
        match (of_pid(record.number("pid")), of_pid(opener)) {
            (Some(true), _) | (_, Some(true)) => true,
            (Some(false), _) => false,
            (None, _) => {
                self.of_nobody += 1;
                false
            }
        }
    }

    /// The events with this name.
    pub(super) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = LogRecord<'a>> {
        self.events.iter().map(LogRecord::new).filter(move |record| record.event() == name)
    }

    /// The self-connections, in their order.
    pub(super) fn connections<'a>(&'a self) -> Vec<FoundConnection<'a>> {
        let by_id = |name: &'a str| -> HashMap<&'a str, LogRecord<'a>> {
            self.all(name).filter_map(|record| Some((record.text("id")?, record))).collect()
        };
        let (closed, blocked) = (by_id("closed"), by_id("blocked"));
        let kept_out = |id: &str| {
            let mut records: Vec<_> = blocked
                .values()
                .copied()
                .filter(|record| record.object("holder").and_then(|holder| holder.text("id")) == Some(id))
                .collect();
            records.sort_by_key(|record| record.number("seq"));
            records
        };
        let found = |established: LogRecord<'a>| {
            let id = established.text("id")?;
            Some(FoundConnection { established, closed: closed.get(id).copied(), blocked: kept_out(id) })
        };
        self.all("established").filter_map(found).collect()
    }

    /// The servers of the command that a self-connection of somebody else kept out: the last event of each.
    pub(super) fn blocked_by_others(&self) -> Vec<LogRecord<'_>> {
        let holder = |record: LogRecord<'_>| {
            record.object("holder").and_then(|holder| holder.text("id").map(str::to_owned))
        };
        let mut last: Vec<LogRecord<'_>> = Vec::new();
        for record in self.all("blocked") {
            if holder(record).is_some_and(|id| self.established.contains(&id)) {
                continue;
            }
            last.retain(|known| known.text("id") != record.text("id"));
            last.push(record);
        }
        last
    }

    /// The ports at risk that were not hit, the last event of each.
    pub(super) fn came_close(&self) -> Vec<LogRecord<'_>> {
        let place = |record: &LogRecord<'_>| {
            (record.number("netns"), record.text("addr").map(str::to_owned), record.number("port"))
        };
        let hit: Vec<_> = self.connections().iter().map(|found| place(&found.established)).collect();
        let mut last: Vec<LogRecord<'_>> = Vec::new();
        for record in self.all("at_risk") {
            last.retain(|known| place(known) != place(&record));
            if !hit.contains(&place(&record)) {
                last.push(record);
            }
        }
        last
    }

    /// Number of connects to themselves that the guard refused, or would have refused.
    pub(super) fn prevented(&self) -> u64 {
        self.all("prevented").filter_map(|record| record.number("count")).sum()
    }

    /// True if a self-connection was found, or a server that one kept out.
    pub(super) fn has_found(&self) -> bool {
        self.events
            .iter()
            .map(LogRecord::new)
            .any(|record| matches!(record.event(), "established" | "blocked"))
    }

    /// What was lost, by cause, as `stopped` counts it.
    pub(super) fn lost(&self) -> Vec<(&str, u64)> {
        let lost = self.stopped.as_ref().and_then(|stopped| stopped.get("lost")).and_then(Value::as_object);
        lost.into_iter()
            .flatten()
            .filter_map(|(cause, count)| Some((cause.as_str(), count.as_u64()?)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// The methods by which connections were seen.
    pub(super) fn methods(&self) -> Vec<&str> {
        let hooks = self.started.get("hooks").and_then(Value::as_array);
        hooks.into_iter().flatten().filter_map(|hook| hook.get("method")?.as_str()).collect()
    }
}
