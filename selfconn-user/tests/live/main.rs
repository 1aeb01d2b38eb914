//! Live tests: real self-connections through the running kernel, watched by the real daemon.
//!
//! Every test works in a network namespace of its own, so that concurrent tests and other activity on the
//! host cannot be confused with it. The tests need root. The same binary runs on other kernels in a VM. There
//! `SELFCONN_BIN` names the daemon's binary and `SELFCONN_SCALE` divides the counts.
#![expect(clippy::unwrap_used, reason = "a test that cannot continue panics")]

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
