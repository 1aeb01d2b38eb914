//! What the live tests share: namespaces, clients, daemons under test, helper processes. No tests.

pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod daemon_pool;
pub(crate) mod disk;
pub(crate) mod fd_injection;
pub(crate) mod helper_process;
pub(crate) mod kernel_gaps;
pub(crate) mod netns;
pub(crate) mod scan_output;
pub(crate) mod socket_crowd;
