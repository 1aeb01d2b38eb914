//! What the live tests share: namespaces, clients, daemons under test, helper processes. No tests.

pub(crate) mod accounting;
pub(crate) mod another_program;
pub(crate) mod attacker;
pub(crate) mod bind_methods;
pub(crate) mod cgroup;
pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod daemon_pool;
pub(crate) mod dedicated;
pub(crate) mod devices;
pub(crate) mod direct_tracer;
pub(crate) mod disk;
#[cfg(target_arch = "x86_64")]
pub(crate) mod fd_injection;
pub(crate) mod guard;
pub(crate) mod helper_process;
pub(crate) mod kernel_gaps;
#[expect(dead_code, reason = "only the tests of the command line share the machine")]
pub(crate) mod machine;
pub(crate) mod mount_namespace;
pub(crate) mod netns;
pub(crate) mod nobody;
pub(crate) mod pid_namespace;
pub(crate) mod preempted_calls;
pub(crate) mod privileges;
pub(crate) mod refused_connects;
pub(crate) mod retries;
pub(crate) mod scan_output;
pub(crate) mod schema;
pub(crate) mod socket_crowd;
pub(crate) mod watchdog;
