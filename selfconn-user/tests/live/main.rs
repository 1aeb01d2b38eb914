//! Live tests: real self-connections through the running kernel, watched by the real daemon.
//!
//! Every test works in a network namespace of its own, so that concurrent tests and other activity on the
//! host cannot be confused with it. The tests need root. The same binary runs on other kernels in a VM. There
//! `SELFCONN_BIN` names the daemon's binary and `SELFCONN_SCALE` divides the counts.
#![expect(clippy::unwrap_used, reason = "a test that cannot continue panics")]

pub(crate) mod files;
pub(crate) mod kernel;
mod load;
pub(crate) mod operations;
pub(crate) mod support;
