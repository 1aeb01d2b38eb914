//! The causes of a loss: what was not observed, not kept or not written. The `lost` events, the totals of
//! `stopped` and the metrics have a number for each [`LossCause`], and the documents have a row for each.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Serialize, Serializer};

/// Why something was lost. To add a cause, add a variant: the compiler and a test ask for the rest, and events
/// and metrics report it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossCause {
    /// The ring buffer had no room for a transition.
    Ring,
    /// The hooks missed a self-connection that the socket table contained.
    Missed,
    /// An event could not be written to the log file.
    Log,
    /// The reader of stdout did not read an event in time.
    Stdout,
    /// The journal did not accept an event.
    Journal,
    /// A refused connect was not counted by destination because the table was full.
    RefusedTable,
    /// A method no longer observed connections.
    Hooks,
    /// The connect table was full, so a connection has no opener.
    OpenerTable,
    /// A process could not be looked up in time, so an event has no arguments of it, or less.
    Lookups,
    /// An event was beyond the rate of its owner.
    Suppressed,
    /// A failed bind was beyond the rate or the share of its owner, or its port may have been held by a TIME_WAIT for
    /// which there was no room.
    Binds,
    /// The share of a self-connection's owner in the tracked connections was full.
    Untracked,
}

/// What kind of thing was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// A record of the eBPF programs: no event was made from it.
    Record,
    /// An event that was made and not written.
    Event,
    /// A field of an event. It is not part of the totals in `stopped.lost`.
    Fact,
}

impl LossCause {
    /// All causes, in the order of the enum.
    pub const ALL: [Self; 12] = [
        Self::Ring,
        Self::Missed,
        Self::Log,
        Self::Stdout,
        Self::Journal,
        Self::RefusedTable,
        Self::Hooks,
        Self::OpenerTable,
        Self::Lookups,
        Self::Suppressed,
        Self::Binds,
        Self::Untracked,
    ];

    /// The name in `lost.where`, in `stopped.lost` and in the label `where` of the metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Missed => "missed",
            Self::Log => "log",
            Self::Stdout => "stdout",
            Self::Journal => "journal",
            Self::RefusedTable => "refused_table",
            Self::Hooks => "hooks",
            Self::OpenerTable => "opener_table",
            Self::Lookups => "lookups",
            Self::Suppressed => "suppressed",
            Self::Binds => "binds",
            Self::Untracked => "untracked",
        }
    }

    #[must_use]
    pub const fn kind(self) -> LossKind {
        match self {
            Self::Ring | Self::Missed | Self::RefusedTable | Self::Hooks | Self::Binds | Self::Untracked => {
                LossKind::Record
            }
            Self::Log | Self::Stdout | Self::Journal | Self::Suppressed => LossKind::Event,
            Self::OpenerTable | Self::Lookups => LossKind::Fact,
        }
    }
}

impl JsonSchema for LossCause {
    fn schema_name() -> Cow<'static, str> {
        "LossCause".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "enum": Self::ALL.map(Self::name) })
    }
}

impl Serialize for LossCause {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.name())
    }
}

/// A number for each cause: the totals of a run, or a part of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses([u64; LossCause::ALL.len()]);

impl Losses {
    #[must_use]
    pub fn get(&self, cause: LossCause) -> u64 {
        self.0[cause as usize]
    }

    pub fn set(&mut self, cause: LossCause, count: u64) {
        self.0[cause as usize] = count;
    }

    /// The sum, cause by cause.
    #[must_use]
    pub fn plus(mut self, other: Self) -> Self {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
        self
    }

    /// The name and the number of each cause of these kinds.
    pub fn of_kinds(&self, kinds: &[LossKind]) -> impl Iterator<Item = (&'static str, u64)> {
        let causes = LossCause::ALL.into_iter().filter(|cause| kinds.contains(&cause.kind()));
        causes.map(|cause| (cause.name(), self.get(cause)))
    }

    /// The losses of records and events. With them, the sums of `stopped` match.
    pub fn of_records_and_events(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.of_kinds(&[LossKind::Record, LossKind::Event])
    }
}

impl<const N: usize> From<[(LossCause, u64); N]> for Losses {
    fn from(counts: [(LossCause, u64); N]) -> Self {
        let mut losses = Self::default();
        for (cause, count) in counts {
            losses.set(cause, count);
        }
        losses
    }
}

impl JsonSchema for Losses {
    fn schema_name() -> Cow<'static, str> {
        "Losses".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let causes: Vec<_> = Self::default().of_records_and_events().map(|(cause, _)| cause).collect();
        let count = generator.subschema_for::<u64>();
        let properties: serde_json::Map<_, _> =
            causes.iter().map(|cause| ((*cause).to_owned(), count.clone().to_value())).collect();
        json_schema!({ "type": "object", "properties": properties, "required": causes })
    }
}

impl Serialize for Losses {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_map(self.of_records_and_events())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_are_of_records_and_events() {
        let losses = Losses::from([(LossCause::Ring, 1), (LossCause::OpenerTable, 2)])
            .plus([(LossCause::Ring, 3), (LossCause::Log, 4)].into());
        assert_eq!(
            serde_json::to_string(&losses).unwrap(),
            r#"{"ring":4,"missed":0,"log":4,"stdout":0,"journal":0,"refused_table":0,"hooks":0,"suppressed":0,"binds":0,"untracked":0}"#
        );
        assert_eq!(
            losses.of_kinds(&[LossKind::Fact]).collect::<Vec<_>>(),
            [("opener_table", 2), ("lookups", 0)]
        );
    }

    #[test]
    fn the_documents_have_every_cause_in_order() {
        let name_and_kind =
            |cause: LossCause| (cause.name().to_owned(), format!("{:?}", cause.kind()).to_lowercase());
        let causes = LossCause::ALL.map(name_and_kind);
        let events = include_str!("../../../docs/events.md");
        let (_, section) = events.split_once("\n## lost\n").expect("events.md has a section about `lost`");
        let (section, _) = section.split_once("\n## ").expect("another section follows");
        // Rows such as: | `ring` | record | transitions for which ... |
        let rows = section.lines().filter_map(|line| {
            let [_, name, kind, meaning, _] = line.split('|').collect::<Vec<_>>()[..] else { return None };
            let name = name.trim().strip_prefix('`')?.strip_suffix('`')?;
            assert!(!meaning.trim().is_empty(), "{name} has no meaning");
            Some((name.to_owned(), kind.trim().to_owned()))
        });
        let rows: Vec<_> =
            rows.filter(|(_, kind)| ["record", "event", "fact"].contains(&&kind[..])).collect();
        assert_eq!(rows, causes, "the table of causes in docs/events.md");
        let metrics = include_str!("../../../docs/metrics.md");
        for (metric, is_fact) in [("events_lost_total", false), ("facts_lost_total", true)] {
            let row = format!("| `selfconn_{metric}{{where}}` | counter | ");
            let row = metrics.lines().find_map(|line| line.strip_prefix(&row)).expect(metric);
            let (_, names) = row.split_once("`where` is ").expect("the row has the values of the label");
            let names: Vec<_> = names.split('`').skip(1).step_by(2).collect();
            let expected = causes.iter().filter(|(_, kind)| (kind == "fact") == is_fact);
            assert_eq!(
                names,
                expected.map(|(name, _)| name).collect::<Vec<_>>(),
                "docs/metrics.md, {metric}"
            );
        }
    }
}
