//! This process and the host around it: other processes' facts from /proc, clocks, capabilities, routes, the
//! heap, the service manager's socket, diagnostics on stderr.

pub mod busy;
pub mod capabilities;
pub mod cgroup;
pub mod clock;
pub mod command_line;
pub mod identity;
pub mod interrupt;
pub mod logger;
pub mod memory;
pub mod netns_cookie;
pub mod process;
pub mod route;
pub mod rtnetlink;
pub mod sd_notify;
pub mod sysfs;
pub mod worker;
