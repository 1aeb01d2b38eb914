//! The command line: the real binary, its exit codes, one-line errors with a hint, and its output. `SELFCONN_BIN` names
//! another build to test, for example a release. Tests that need privileges or a namespace say so.
#![expect(clippy::unwrap_used, reason = "a test panics on an unexpected error")]

#[path = "../live/support/machine.rs"]
pub(crate) mod machine;
pub(crate) mod support;

mod audit;
mod exec;
mod manners;
mod repro;
mod run;
mod tail;
