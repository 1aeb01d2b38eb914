//! Whose a process is, before it is listed: by what no process makes slow by itself.

use std::{
    collections::HashMap,
    fs,
    hash::{BuildHasher as _, RandomState},
    os::unix::fs::MetadataExt as _,
    path::Path,
    sync::LazyLock,
};

use selfconn_ebpf::{Owner, owner::OWNER_CGROUP_LEVEL};

use super::netns_owner::{OutermostUserns, outermost_userns_at};
use crate::budget::{memory, owner_of_user};

/// Maximum number of user namespaces whose outermost one is remembered while a list is made.
const MAX_USER_NAMESPACES: usize = 896;

// A table that grows is there twice.
const _: () = assert!(
    MAX_USER_NAMESPACES * (size_of::<(u64, Option<OutermostUserns>)>() + 1) * 8 / 7 * 3 / 2
        <= memory::USER_NAMESPACES_BYTES
);

/// A process before it is listed, by what no process makes slow by itself.
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundProcess {
    /// The number of its control group in [`Owner`], or of the container. 0: unknown.
    group: u64,
    pub(super) pid: u32,
    /// The effective user, also of a process that can't be traced (`task_dump_owner`, fs/proc/base.c at v6.12).
    /// `u32::MAX`: unknown.
    uid: u32,
    /// True if its real user says nothing of who is charged. In another user namespace than ours a uid is one of many
    /// that the maker of the user namespace has.
    is_mapped: bool,
}

impl FoundProcess {
    pub(super) fn new(pid: u32, user_namespaces: &mut UserNamespaces) -> Self {
        let uid = fs::metadata(format!("/proc/{pid}")).ok().map(|folder| folder.uid());
        let group = fs::read(format!("/proc/{pid}/cgroup")).ok().and_then(|text| owner_group(&text));
        Self::of(pid, uid, group.map(|group| group_id(&group)), user_namespaces.outermost(pid))
    }

    /// `userns` is the outermost user namespace that it is in. `None`: it is in ours, or this is unknown.
    pub(super) fn of(
        pid: u32,
        uid: Option<u32>,
        group: Option<u64>,
        userns: Option<OutermostUserns>,
    ) -> Self {
        let container = userns.and_then(OutermostUserns::container);
        let uid = userns.map(|userns| userns.owner).or(uid).unwrap_or(u32::MAX);
        let group = container.map(|container| container.cgroup).or(group).unwrap_or(0);
        Self { group, pid, uid, is_mapped: userns.is_some() }
    }

    /// A process for which this owner is charged, whoever its real user is.
    pub(super) fn charged_to(pid: u32, owner: Owner) -> Self {
        let Owner { cgroup, uid, .. } = owner;
        // Of a user without a control group this is the number of a block.
        let group = if owner == owner_of_user(Some(uid)) { 0 } else { cgroup };
        Self { group, pid, uid, is_mapped: true }
    }

    /// Who is charged for it.
    pub(super) fn owner(&self) -> Owner {
        match self.group {
            0 => owner_of_user(Some(self.uid)),
            group => Owner::new(self.uid, group),
        }
    }

    /// Who is charged for it if its real user started it.
    pub(super) fn owner_if_started_by(&self, uid: Option<u32>) -> Owner {
        let uid = if self.is_mapped { self.uid } else { uid.unwrap_or(u32::MAX) };
        Self { uid, ..*self }.owner()
    }
}

/// Which user namespaces processes are in.
pub(super) struct UserNamespaces {
    /// The inode of our user namespace. `None`: unknown.
    own: Option<u64>,
    /// The outermost ones of other ones, by inode: of the first [`MAX_USER_NAMESPACES`].
    outermost: HashMap<u64, Option<OutermostUserns>>,
}

impl UserNamespaces {
    pub(super) fn new() -> Self {
        let own = fs::metadata("/proc/self/ns/user").ok().map(|userns| userns.ino());
        Self { own, outermost: HashMap::new() }
    }

    /// The outermost user namespace of a process. `None`: it is in ours, or this is unknown.
    fn outermost(&mut self, pid: u32) -> Option<OutermostUserns> {
        let path = format!("/proc/{pid}/ns/user");
        let inode = fs::metadata(&path).ok()?.ino();
        if self.own.is_none_or(|own| own == inode) {
            return None;
        }
        if let Some(known) = self.outermost.get(&inode) {
            return *known;
        }
        let (opened, outermost) = outermost_userns_at(Path::new(&path)).ok()?;
        if self.outermost.len() < MAX_USER_NAMESPACES {
            self.outermost.insert(opened, outermost);
        }
        outermost
    }
}

/// The number of a control group in [`Owner`]. Two groups have the same number only by chance.
fn group_id(group: &[u8]) -> u64 {
    static KEY: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    // 0 is no group, and the highest bit is a block of users.
    KEY.hash_one(group) >> 1 | 1
}

/// The control group of an owner, as in [`Owner`]: below its level users make groups as they like. `None`: the process
/// is in the root group, or the host does not have the unified hierarchy.
fn owner_group(text: &[u8]) -> Option<Vec<u8>> {
    let path = text.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
    let names = path.split(|byte| *byte == b'/').take(OWNER_CGROUP_LEVEL as usize);
    Some(names.collect::<Vec<_>>().join(&b'/')).filter(|group| !group.is_empty())
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_group_that_a_user_can_make_is_none_of_its_own() {
        let group = |text: &str| owner_group(text.as_bytes()).map(|group| String::from_utf8(group).unwrap());
        for (text, expected) in [
            (
                "0::/user.slice/user-1000.slice/user@1000.service/a/b\n",
                Some("user.slice/user-1000.slice/user@1000.service"),
            ),
            ("1:name=systemd:/x\n0::/system.slice/ssh.service\n", Some("system.slice/ssh.service")),
            ("0::/\n", None),
            ("4:cpu:/a\n", None),
        ] {
            assert_eq!(group(text).as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn a_process_in_a_user_namespace_counts_for_the_user_that_owns_it() {
        use std::{os::unix::process::CommandExt as _, process::Command};
        // From another one than the initial one an owner can't be found.
        const INITIAL: Option<u64> = Some(0xefff_fffd);
        let userns = |pid| fs::metadata(format!("/proc/{pid}/ns/user")).ok().map(|userns| userns.ino());
        let own = userns(std::process::id());
        let mut user_namespaces = UserNamespaces::new();
        assert_eq!(user_namespaces.outermost(std::process::id()), None, "it is ours");
        let mut command = Command::new("unshare");
        command.args(["--user", "sleep", "60"]);
        let mut uid = rustix::process::geteuid().as_raw();
        if uid == 0 {
            uid = 65_534;
            command.uid(uid);
        }
        let spawned = command.spawn().inspect_err(|error| println!("FACT unshare={error}"));
        let Ok(mut child) = spawned else { return };
        let until = Instant::now() + Duration::from_secs(10);
        while own == INITIAL
            && userns(child.id()) == own
            && child.try_wait().unwrap().is_none()
            && Instant::now() < until
        {
            std::thread::sleep(Duration::from_millis(1));
        }
        let is_in_another = userns(child.id()).is_some_and(|userns| Some(userns) != own);
        let outermost = user_namespaces.outermost(child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        println!("FACT is_in_another_user_namespace={is_in_another}");
        if own == INITIAL && is_in_another {
            assert_eq!(outermost.map(|userns| userns.owner), Some(uid));
        }
    }

    #[test]
    fn a_process_counts_for_its_user_in_its_control_group() {
        let started_by = |uid, group| FoundProcess::of(1, Some(6), group, None).owner_if_started_by(uid);
        assert_eq!(started_by(Some(5), Some(7)), Owner::new(5, 7));
        assert_eq!(started_by(None, Some(7)), Owner::new(u32::MAX, 7));
        assert_eq!(started_by(Some(5), None), owner_of_user(Some(5)));
        assert_eq!(started_by(Some(100_005), None), owner_of_user(Some(100_005)));
        assert_eq!(FoundProcess::of(1, None, None, None).owner(), owner_of_user(None));
        let in_userns = |owner, group| {
            let userns = Some(OutermostUserns { inode: 0xf000_0001, owner });
            let found = FoundProcess::of(1, Some(100_006), group, userns);
            let owner = found.owner_if_started_by(Some(100_005));
            assert_eq!(found.owner(), owner);
            owner
        };
        assert_eq!(in_userns(5, Some(7)), Owner::new(5, 7), "the maker of the user namespace");
        let of_container = Owner::new(0, Owner::of_container(0xf000_0001));
        assert_eq!([in_userns(0, Some(7)), in_userns(0, Some(8))], [of_container; 2]);
        for owner in [Owner::new(5, 7), of_container, owner_of_user(Some(5)), owner_of_user(Some(100_005))] {
            let found = FoundProcess::charged_to(1, owner);
            assert_eq!([found.owner(), found.owner_if_started_by(Some(9))], [owner; 2], "{owner:?}");
        }
        assert_eq!(group_id(b"a"), group_id(b"a"));
        assert_ne!(group_id(b"a"), group_id(b"b"));
    }
}
