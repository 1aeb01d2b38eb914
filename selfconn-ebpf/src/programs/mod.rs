//! What the programs do. One file for each table or concern; `main.rs` has the entry points.

pub(crate) mod bind_failure;
mod connect_table;
mod refused_connects;
mod ring_buffer;
pub(crate) mod sock;
pub(crate) mod tcp_state;
