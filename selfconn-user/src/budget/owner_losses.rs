//! What owners have lost, until it is reported. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Owner;

/// Maximum number of owners that are counted apart.
const MAX_OWNERS: usize = 64;

#[derive(Debug, Default)]
pub struct OwnerLosses {
    total: u64,
    unreported: HashMap<Owner, u64>,
}

impl OwnerLosses {
    pub fn count(&mut self, owner: Owner, count: u64) {
        self.total += count;
        let is_counted_apart = self.unreported.contains_key(&owner) || self.unreported.len() < MAX_OWNERS;
        let owner = if is_counted_apart { owner } else { Owner::UNKNOWN };
        *self.unreported.entry(owner).or_default() += count;
    }

    /// The losses of the run so far.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// The losses since the last call, by owner.
    pub fn take_unreported(&mut self) -> Vec<(Owner, u64)> {
        let mut unreported: Vec<_> = std::mem::take(&mut self.unreported).into_iter().collect();
        unreported.sort_unstable();
        unreported
    }
}
