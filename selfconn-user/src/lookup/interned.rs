//! The facts of processes that something uses: a connection, a TIME_WAIT, the cache. Each process has them
//! once, and all of them have no more bytes than the memory budget says. What finds no room is unknown, and
//! counted.

use std::{
    collections::HashMap,
    rc::{Rc, Weak},
};

use selfconn_ebpf::Owner;

use super::ProcessKey;
use crate::{
    budget::{SharedLimit, memory},
    system::process::ProcessInfo,
};

/// What is kept beside the facts: the entry of the table, and the counts of `Rc`.
const ENTRY_BYTES: usize = 128;

/// Maximum number of owners whose facts found no room and who are remembered.
const MAX_OWNERS_WITHOUT_ROOM: usize = 1_024;

#[derive(Debug)]
struct Interned {
    owner: Owner,
    bytes: usize,
    facts: Weak<ProcessInfo>,
}

impl Interned {
    fn is_used(&self) -> bool {
        self.facts.strong_count() > 0
    }
}

#[derive(Debug)]
pub(super) struct InternedFacts {
    newest: HashMap<ProcessKey, Interned>,
    /// Facts of processes that have others by now: the program was replaced, or changed its arguments.
    older: Vec<Interned>,
    bytes: SharedLimit,
    /// Number of facts that were new since unused ones were removed.
    since_sweep: usize,
    /// What is left of facts that found no room: whose they are.
    without_room: HashMap<Owner, Rc<ProcessInfo>>,
    refused: u64,
}

impl Default for InternedFacts {
    fn default() -> Self {
        Self::new(memory::PROCESS_FACTS_BYTES)
    }
}

impl InternedFacts {
    fn new(max_bytes: usize) -> Self {
        Self {
            newest: HashMap::new(),
            older: Vec::new(),
            bytes: SharedLimit::new(max_bytes),
            since_sweep: 0,
            without_room: HashMap::new(),
            refused: 0,
        }
    }

    /// Number of times that facts found no room.
    pub(super) fn refused(&self) -> u64 {
        self.refused
    }

    /// The one copy of these facts. If there is no room for them, only who pays for the process is known.
    pub(super) fn intern(
        &mut self,
        key: ProcessKey,
        owner: Owner,
        mut facts: ProcessInfo,
    ) -> Rc<ProcessInfo> {
        if let Some(same) = self.newest.get(&key).and_then(|known| known.facts.upgrade()) {
            // Only a holder's user is read. Nobody asks for the user of another process.
            let uid = facts.uid;
            facts.uid = uid.or(same.uid);
            if *same == facts {
                return same;
            }
            facts.uid = uid;
        }
        let bytes = facts.kept_bytes() + ENTRY_BYTES;
        self.since_sweep += 1;
        // A sweep visits all entries, so it follows as many new ones.
        let has_room = self.bytes.try_take(owner, bytes)
            || self.sweep_if_worthwhile() && self.bytes.try_take(owner, bytes);
        if !has_room {
            self.refused += 1;
            return self.without_room(owner, facts);
        }
        let facts = Rc::new(facts);
        let interned = Interned { owner, bytes, facts: Rc::downgrade(&facts) };
        if let Some(older) = self.newest.insert(key, interned) {
            self.older.push(older);
        }
        facts
    }

    fn without_room(&mut self, owner: Owner, facts: ProcessInfo) -> Rc<ProcessInfo> {
        if self.without_room.len() >= MAX_OWNERS_WITHOUT_ROOM && !self.without_room.contains_key(&owner) {
            self.without_room.clear();
        }
        let ProcessInfo { owner_cgroup, .. } = facts;
        let rest = || Rc::new(ProcessInfo { owner_cgroup, ..ProcessInfo::default() });
        Rc::clone(self.without_room.entry(owner).or_insert_with(rest))
    }

    /// Removes what nothing uses any more. Returns false if it was done a moment ago.
    fn sweep_if_worthwhile(&mut self) -> bool {
        const FEW: usize = 256;
        let entries = self.newest.len() + self.older.len();
        if entries > FEW && self.since_sweep <= entries / 4 {
            return false;
        }
        self.since_sweep = 0;
        let bytes = &mut self.bytes;
        let mut keep = |interned: &Interned| {
            let is_used = interned.is_used();
            if !is_used {
                bytes.give_back(interned.owner, interned.bytes);
            }
            is_used
        };
        self.older.retain(&mut keep);
        self.newest.retain(|_, interned| keep(interned));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: usize = 1_024;

    fn facts(exe: &str) -> ProcessInfo {
        ProcessInfo { exe: Some(exe.into()), owner_cgroup: Some("/a".into()), ..ProcessInfo::default() }
    }

    fn key(pid: u32) -> ProcessKey {
        ProcessKey { pid, start_ticks: 1, arg_start: 1 }
    }

    #[test]
    fn a_process_has_one_copy_of_its_facts() {
        let mut interned = InternedFacts::new(64 * KIB);
        let owner = Owner::new(1, 1);
        let first = interned.intern(key(1), owner, facts("/a"));
        assert!(Rc::ptr_eq(&first, &interned.intern(key(1), owner, facts("/a"))));
        let replaced = interned.intern(key(1), owner, facts("/b"));
        assert_eq!(replaced.exe.as_deref(), Some("/b"), "another program");
        assert_eq!(first.exe.as_deref(), Some("/a"));
        assert_eq!(interned.older.len(), 1);
        let of_user = |uid| ProcessInfo { uid, ..facts("/b") };
        let held = interned.intern(key(1), owner, of_user(Some(5)));
        assert_eq!((held.uid, interned.older.len()), (Some(5), 2));
        assert!(Rc::ptr_eq(&held, &interned.intern(key(1), owner, of_user(None))), "looked up as an opener");
        assert_eq!(interned.intern(key(1), owner, of_user(Some(6))).uid, Some(6));
        assert_eq!(interned.intern(key(1), owner, facts("/c")).uid, None, "another program");
    }

    #[test]
    fn who_has_no_room_loses_his_own_facts_and_gets_room_when_others_are_unused() {
        let mut interned = InternedFacts::new(64 * KIB);
        let (storm, victim) = (Owner::new(1, 1), Owner::new(2, 2));
        let long = "/x".repeat(KIB);
        let used: Vec<_> =
            (0..1_000).map(|pid| interned.intern(key(pid), storm, facts(&format!("{long}{pid}")))).collect();
        let known = used.iter().filter(|facts| facts.exe.is_some()).count();
        assert_eq!(interned.refused(), 1_000 - known as u64);
        assert!((15..25).contains(&known), "{known}: three quarters of the bytes");
        assert!(interned.bytes.used() <= 48 * KIB);
        let last = used.last().unwrap();
        assert_eq!((last.exe.as_deref(), last.owner_cgroup.as_deref()), (None, Some("/a")));
        assert_eq!(Rc::strong_count(last), 1_000 - known + 1, "one for all that found no room");
        assert!(interned.intern(key(2_000), victim, facts("/usr/bin/victim")).exe.is_some());
        drop(used);
        assert!(interned.intern(key(2_001), storm, facts(&long)).exe.is_some());
        assert!(interned.bytes.used() < 4 * KIB);
    }
}
