//! The user space of selfconn: the daemon and the commands. ARCHITECTURE.md describes the modules.

pub mod blocked;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod connection;
pub mod daemon;
pub mod event;
pub mod filter;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod kernel;
pub mod logger;
pub mod memory;
pub mod metrics;
pub mod ports;
pub mod privileges;
pub mod process;
pub mod remedy;
pub mod risk;
pub mod selftest;
pub mod service;
pub mod sink;
pub mod sockets;
pub mod sysctl;
pub mod watchdog;
