//! Who pays for a connection.

use std::{
    hash::{BuildHasher as _, RandomState},
    sync::{Arc, LazyLock},
};

use selfconn_ebpf::Owner;

use super::party::{is_group, owner_of_user};

/// Who paid for a self-connection, as reports name it: a user, in a control group that only root makes. Connections of
/// unknown users are one owner's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Payer {
    /// The real user id of the opener or, if the opener is unknown, the socket's.
    pub uid: Option<u32>,
    /// The container, the unit or the slice. `None`: unknown, or the root of the hierarchy.
    pub cgroup: Option<Arc<str>>,
}

impl Payer {
    /// The owner whose share this one takes. A path distinguishes the containers of a pod, and control groups of
    /// version 1. `cgroup_id`: the kernel's id of the control group at the third level, which is known of a process
    /// that has ended, too. 0: unknown.
    #[must_use]
    pub fn owner(&self, cgroup_id: u64) -> Owner {
        match (&self.cgroup, cgroup_id) {
            (Some(path), _) => Owner::new(self.uid.unwrap_or(u32::MAX), id_of_path(path)),
            (None, id) if !is_group(id) => owner_of_user(self.uid),
            (None, id) => Owner::new(self.uid.unwrap_or(u32::MAX), id),
        }
    }
}

/// A number for a path. Nobody can choose a path that has the number of another one.
fn id_of_path(path: &str) -> u64 {
    static HASHER: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    // No id of the kernel is so large. The bits above and below are those of a block of uids and of a container.
    const PATH: u64 = 1 << 62;
    HASHER.hash_one(path) >> 3 | PATH
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_a_user_in_a_path_or_in_a_group_that_only_the_kernel_knows() {
        let payer = |uid, cgroup: Option<&str>| Payer { uid: Some(uid), cgroup: cgroup.map(Into::into) };
        let container = payer(0, Some("/docker/a"));
        assert_eq!(container.owner(7), container.owner(0), "the path comes first");
        assert_ne!(container.owner(7), payer(0, Some("/docker/b")).owner(7));
        assert_ne!(container.owner(7).cgroup, payer(0, None).owner(7).cgroup);
        assert_eq!(payer(1_000, None).owner(7), Owner::new(1_000, 7), "its process has ended");
        assert_eq!(payer(1_000, None).owner(0), Owner::new(1_000, 0));
        assert_eq!(payer(100_000, None).owner(0), owner_of_user(Some(100_000)));
        assert_eq!(Payer::default().owner(0), owner_of_user(None));
    }
}
