//! What the transitions and the socket table mean. Everything here is pure: input in, decision out. No clock,
//! no kernel, no I/O, so each decision has a test without a kernel.

pub mod bind_conflict;
pub mod connection;
pub mod filter;
pub mod port_risk;
pub mod port_set;
pub mod probe_health;
pub mod remediation;
#[cfg(test)]
pub(crate) mod samples;
