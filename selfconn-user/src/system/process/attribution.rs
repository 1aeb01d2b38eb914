//! What a connection has of processes: who has its socket open, and the facts about the process that events name, with
//! whose facts they are.

use std::{rc::Rc, sync::Arc};

use schemars::JsonSchema;
use serde::Serialize;

use super::ProcessInfo;

/// The process that was looked up for a connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Subject {
    /// None was.
    #[default]
    Nobody,
    Opener,
    /// The first holder, when the opener was unknown.
    Holder(Rc<Holder>),
}

/// The process behind a connection, in addition to what the kernel recorded about its opener.
#[derive(Clone, Debug, Default)]
pub struct Attribution {
    /// Whose facts `process` are.
    pub subject: Subject,
    pub process: Rc<ProcessInfo>,
    /// The processes that have the socket open. `None`: not looked up.
    pub holders: Option<Vec<Holder>>,
    /// The name of the device that the socket is bound to, if it is in the daemon's own network namespace.
    pub device: Option<Arc<str>>,
    /// Connects to the same address and port that were refused before. `None`: not counted, because the connection
    /// was found in the socket table.
    pub refused_before: Option<u64>,
}

impl Attribution {
    /// The facts about the process that an event names: the opener, or if it is unknown, the first holder. A holder
    /// may have changed since the look-up, or run another program under another name. Then nothing is known.
    #[must_use]
    pub fn named_process(&self, is_opener_known: bool) -> Rc<ProcessInfo> {
        let is_named = match &self.subject {
            Subject::Nobody => false,
            Subject::Opener => is_opener_known,
            Subject::Holder(holder) => !is_opener_known && self.first_holder() == Some(&**holder),
        };
        if is_named { Rc::clone(&self.process) } else { Rc::default() }
    }

    #[must_use]
    pub fn first_holder(&self) -> Option<&Holder> {
        self.holders.iter().flatten().next()
    }

    /// Number of holders beside the first one.
    #[must_use]
    pub fn more_holders(&self) -> usize {
        self.holders.as_ref().map_or(0, |holders| holders.len().saturating_sub(1))
    }

    /// Keeps no more than this number of holders beside the first one.
    pub fn limit_more_holders(&mut self, limit: usize) {
        if let Some(holders) = &mut self.holders {
            holders.truncate(limit.saturating_add(1));
            holders.shrink_to_fit();
        }
    }

    /// The look-up of this process has ended. Its result is not used if another process is named meanwhile.
    pub fn set_process(&mut self, subject: Subject, process: Rc<ProcessInfo>) {
        let is_outdated = match &subject {
            Subject::Nobody => true,
            Subject::Opener => false,
            Subject::Holder(holder) => {
                self.subject == Subject::Opener || self.first_holder() != Some(&**holder)
            }
        };
        if !is_outdated {
            (self.subject, self.process) = (subject, process);
        }
    }
}

/// What still holds of the attribution of a socket that is closed: no process has it open.
#[derive(Clone, Debug, Default)]
pub struct ClosedAttribution {
    process: Rc<ProcessInfo>,
    device: Option<Arc<str>>,
    refused_before: Option<u64>,
}

impl From<&Attribution> for ClosedAttribution {
    fn from(of_open: &Attribution) -> Self {
        let Attribution { subject: _, process, holders: _, device, refused_before } = of_open;
        Self { process: Rc::clone(process), device: device.clone(), refused_before: *refused_before }
    }
}

impl From<&ClosedAttribution> for Attribution {
    /// Only an opener can be named.
    fn from(of_closed: &ClosedAttribution) -> Self {
        let ClosedAttribution { process, device, refused_before } = of_closed.clone();
        Self { subject: Subject::Opener, process, holders: None, device, refused_before }
    }
}

/// A process that has a socket open, or that closed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Holder {
    /// Pid in the initial pid namespace.
    pub pid: u32,
    /// Name of the process.
    pub comm: Option<String>,
    /// When it started, in clock ticks since boot. `None`: unknown, so nothing about it can be looked up.
    #[serde(skip)]
    pub start_ticks: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_holder_is_kept_whatever_the_limit() {
        let holder = |pid| Holder { pid, comm: None, start_ticks: None };
        for (count, limit, kept) in
            [(8, 3, 4), (8, 7, 8), (8, 0, 1), (1, 0, 1), (0, 0, 0), (8, usize::MAX, 8)]
        {
            let holders = Some((0..count).map(holder).collect());
            let mut attribution = Attribution { holders, ..Attribution::default() };
            attribution.limit_more_holders(limit);
            assert_eq!(attribution.holders.unwrap().len(), kept, "{count} {limit}");
        }
        assert_eq!(Attribution::default().more_holders(), 0, "not looked up");
    }
}
