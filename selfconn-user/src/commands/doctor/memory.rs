//! What the daemon keeps in memory at most, by part.

use std::fmt::Write as _;

use schemars::JsonSchema;
use serde::Serialize;

use crate::budget::memory::{BUDGET_BYTES, PARTS};

#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct MemoryReport {
    /// The limit above the ring buffers and the tables of the eBPF programs.
    budget_bytes: usize,
    parts: Vec<PartReport>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct PartReport {
    name: &'static str,
    bytes: usize,
}

impl MemoryReport {
    pub(super) fn new() -> Self {
        let parts = PARTS.iter().map(|part| PartReport { name: part.name, bytes: part.bytes });
        Self { budget_bytes: BUDGET_BYTES, parts: parts.collect() }
    }

    pub(super) fn text(&self) -> String {
        let mut out = "\n  memory of the daemon, without ring buffers and tables\n".to_owned();
        let parts = self.parts.iter().map(|part| (part.name, part.bytes));
        for (name, bytes) in parts.chain([("budget", self.budget_bytes)]) {
            let tenths = bytes * 10 / (1 << 20);
            let _ = writeln!(out, "       {name:<22} at most {}.{} MiB", tenths / 10, tenths % 10);
        }
        out
    }
}
