//! What the programs do. One file for each table or concern; `main.rs` has the entry points.

pub(crate) mod bind_failure;
mod connect_table;
mod counters;
pub(crate) mod descriptors;
pub(crate) mod guard;
pub(crate) mod handled;
mod held_ports;
pub(crate) mod kernel_read;
pub(crate) mod namespaces;
pub(crate) mod owners;
mod refused_connects;
pub(crate) mod registers;
mod ring_buffer;
pub(crate) mod sock;
mod task;
pub(crate) mod tcp_state;
pub(crate) mod tracepoint_record;
mod watched_ports;
