//! What the kernel accounts to each BPF program: how often it ran, and for how long. Programs are found by the process
//! that holds them, so that nobody else's is ever counted.

use std::{collections::BTreeMap, fs};

use anyhow::{Context as _, Result};
use aya::programs::{ProgramInfo, loaded_programs};
use serde::Serialize;

/// One program's account.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Account {
    pub(crate) name: String,
    pub(crate) runs: u64,
    pub(crate) ns: u64,
    /// What the verifier went through, and what became of it in machine code.
    pub(crate) verified_insns: Option<u32>,
    pub(crate) jited_bytes: u32,
}

/// The accounts of the programs that a process holds, by id.
pub(crate) fn of_process(pid: u32) -> Result<BTreeMap<u32, Account>> {
    let mut ids = Vec::new();
    let dir = format!("/proc/{pid}/fdinfo");
    for entry in fs::read_dir(&dir).with_context(|| format!("read {dir}"))? {
        // A descriptor may be closed meanwhile.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    let mut accounts = BTreeMap::new();
    for info in loaded_programs() {
        // A program of somebody else may end meanwhile.
        let Ok(info) = info else { continue };
        if ids.contains(&info.id()) {
            accounts.insert(info.id(), account(&info));
        }
    }
    Ok(accounts)
}

fn account(info: &ProgramInfo) -> Account {
    Account {
        name: info.name_as_str().unwrap_or("?").to_owned(),
        runs: info.run_count(),
        ns: info.run_time().as_nanos() as u64,
        verified_insns: info.verified_instruction_count(),
        jited_bytes: info.size_jitted(),
    }
}

/// What came on top between two looks, by program.
pub(crate) fn since(before: &BTreeMap<u32, Account>, after: BTreeMap<u32, Account>) -> Vec<Account> {
    let grown = |(id, account): (u32, Account)| {
        let (runs, ns) = before.get(&id).map_or((0, 0), |before| (before.runs, before.ns));
        Account { runs: account.runs - runs, ns: account.ns - ns, ..account }
    };
    after.into_iter().map(grown).collect()
}
