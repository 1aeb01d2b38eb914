//! What an operator does with the daemon and what happens to it: audit, remedy, faults, privileges. Runs on
//! the host and on the oldest kernel of the matrix.

pub(crate) mod accounting;
pub(crate) mod attacks;
pub(crate) mod audit;
pub(crate) mod audit_fix;
pub(crate) mod blocked;
pub(crate) mod cgroup;
pub(crate) mod connect_table;
pub(crate) mod delays;
pub(crate) mod faults;
pub(crate) mod guard;
pub(crate) mod hostile;
pub(crate) mod log_budget;
pub(crate) mod many_namespaces;
pub(crate) mod memory;
pub(crate) mod port_risk;
pub(crate) mod privileges;
pub(crate) mod remedy;
pub(crate) mod runbook;
pub(crate) mod scan_many;
pub(crate) mod self_test;
pub(crate) mod soak;
