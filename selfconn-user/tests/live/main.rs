//! Live tests: real self-connections through the running kernel, watched by the real daemon.
//!
//! Every test works in a network namespace of its own, so that tests running beside each other, and whatever else the
//! host does, can't be mistaken for it. They need root. The same binary runs on other kernels in a VM, where
//! `SELFCONN_BIN` says where the daemon is, and `SELFCONN_SCALE` divides the counts.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on says so by a panic")]

mod accident;
mod accounting;
mod audit;
mod blocked;
mod client;
mod daemon;
mod detection;
mod disk;
mod faults;
mod hands;
mod hostile;
mod kinds;
mod load;
mod log;
mod log_file;
mod methods;
mod metrics;
mod net;
mod not_ours;
mod openers;
mod pool;
mod privileges;
mod remedy;
mod risk;
mod role;
mod scan;
mod service;
mod soak;
mod stdout;
mod steering;
mod table;
mod watchdog;
mod who;
mod withheld;
