//! The user space of selfconn: the daemon and the commands. ARCHITECTURE.md describes the modules.

pub mod bpf;
pub mod budget;
pub mod cli;
pub mod commands;
pub mod daemon;
pub mod detect;
pub mod event;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod guard;
pub mod lookup;
pub mod metrics;
pub mod output;
pub mod ports;
pub mod sockets;
pub mod system;
