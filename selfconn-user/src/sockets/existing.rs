//! The network namespaces that exist, from the kernel's own list. Which of them are not in a list has ended.

use std::{
    collections::{BTreeSet, HashSet},
    io,
};

use selfconn_ebpf::{Endpoint, NamespaceRecord};

use crate::bpf::namespaces::NamespaceIter;

/// The network namespaces that existed at one moment.
#[derive(Debug, Default)]
pub struct ExistingNamespaces {
    inodes: BTreeSet<u32>,
    /// Empty if the cookie of one of them is unknown.
    cookies: HashSet<u64>,
}

/// Lists them.
pub(super) fn list(iter: &NamespaceIter) -> io::Result<ExistingNamespaces> {
    Ok(ExistingNamespaces::new(&iter.list()?))
}

/// What to say if they could not be listed: one line of text for people.
pub(super) fn refusal(error: &io::Error) -> String {
    format!("the list of network namespaces: {error}")
}

/// What to say if there is no list: one line of text for people.
#[must_use]
pub fn no_list(why: &str) -> String {
    format!("network namespaces that no process, descriptor or mount leads to: {why}")
}

impl ExistingNamespaces {
    fn new(records: &[NamespaceRecord]) -> Self {
        let has_cookies = records.iter().all(|record| record.cookie != 0);
        Self {
            inodes: records.iter().map(|record| record.inode).collect(),
            cookies: records.iter().filter(|_| has_cookies).map(|record| record.cookie).collect(),
        }
    }

    /// True if the namespace of this endpoint is not among them. The endpoint must be from before the list, because
    /// the namespace may have begun later. If its namespace is unknown, it has not ended.
    #[must_use]
    pub fn prove_end_of_netns(&self, endpoint: &Endpoint) -> bool {
        if endpoint.netns == 0 || self.inodes.is_empty() {
            return false;
        }
        // The list has the cookies that the programs report, also where user space can't ask for them.
        let is_comparable = endpoint.netns_cookie != 0 && !self.cookies.is_empty();
        !self.inodes.contains(&endpoint.netns)
            || is_comparable && !self.cookies.contains(&endpoint.netns_cookie)
    }

    /// The inodes, in order.
    #[must_use]
    pub fn inodes(&self) -> &BTreeSet<u32> {
        &self.inodes
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::hashed_netns;

    use super::*;
    use crate::detect::samples;

    fn namespaces(ids: &[(u32, u64)]) -> ExistingNamespaces {
        let record =
            |(inode, cookie): &(u32, u64)| NamespaceRecord { inode: *inode, cookie: *cookie, element: 0 };
        ExistingNamespaces::new(&ids.iter().map(record).collect::<Vec<_>>())
    }

    fn has_ended(existing: &ExistingNamespaces, netns: u32, netns_cookie: u64) -> bool {
        existing.prove_end_of_netns(&Endpoint { netns, netns_cookie, ..samples::endpoint("::1", 1) })
    }

    #[test]
    fn a_namespace_has_ended_if_neither_inode_nor_cookie_is_listed() {
        let existing = namespaces(&[(5, 50), (6, 60)]);
        assert!(!has_ended(&existing, 5, 50));
        assert!(has_ended(&existing, 7, 70));
        assert!(has_ended(&existing, 5, 70), "its inode is that of another");
        assert!(!has_ended(&existing, 5, 0), "its cookie is unknown");
        assert!(has_ended(&existing, 7, 0));
        assert!(!has_ended(&existing, 0, 0), "its namespace is unknown");
        let hashed = namespaces(&[(5, hashed_netns(1))]);
        assert!(!has_ended(&hashed, 5, hashed_netns(1)) && has_ended(&hashed, 5, hashed_netns(2)));
        let without_cookies = namespaces(&[(5, 0), (6, 60)]);
        assert!(!has_ended(&without_cookies, 5, 50) && has_ended(&without_cookies, 7, 70));
        assert!(!has_ended(&ExistingNamespaces::default(), 5, 50), "nothing was listed");
    }
}
