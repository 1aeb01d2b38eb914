//! How often BPF programs ran, and for how long, measured by the kernel. Programs are found by the process
//! that holds them, so that no other process's are counted.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramInfo, loaded_programs};
use serde::Serialize;

/// The statistics of a program.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ProgramStats {
    pub(crate) name: String,
    pub(crate) runs: u64,
    pub(crate) ns: u64,
    /// Instructions that the verifier processed, if the kernel reports it.
    pub(crate) verified_insns: Option<u32>,
    pub(crate) jited_bytes: u32,
}

/// The statistics of the programs that a process holds, by id.
pub(crate) fn of_process(pid: u32) -> Result<BTreeMap<u32, ProgramStats>> {
    let mut ids = Vec::new();
    let dir = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&dir).with_context(|| format!("read {dir}"))? {
        // A descriptor may have been closed.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    let mut stats_by_id = BTreeMap::new();
    for info in loaded_programs() {
        // Another process's program may have ended.
        let Ok(info) = info else { continue };
        if ids.contains(&info.id()) {
            stats_by_id.insert(info.id(), stats(&info));
        }
    }
    Ok(stats_by_id)
}

fn stats(info: &ProgramInfo) -> ProgramStats {
    ProgramStats {
        name: info.name_as_str().unwrap_or("?").to_owned(),
        runs: info.run_count(),
        ns: info.run_time().as_nanos() as u64,
        verified_insns: info.verified_instruction_count(),
        jited_bytes: info.size_jitted(),
    }
}

/// The difference of two readings, by program.
pub(crate) fn since(
    before: &BTreeMap<u32, ProgramStats>,
    after: BTreeMap<u32, ProgramStats>,
) -> Vec<ProgramStats> {
    let grown = |(id, stats): (u32, ProgramStats)| {
        let (runs, ns) = before.get(&id).map_or((0, 0), |before| (before.runs, before.ns));
        ProgramStats { runs: stats.runs - runs, ns: stats.ns - ns, ..stats }
    };
    after.into_iter().map(grown).collect()
}
