//! The user-space part of the eBPF programs: feature probes, loading, attaching, and reading of the maps.
//!
//! `features` probes the kernel, `btf` and `tracefs::format` parse layouts, `tracefs` finds tracefs or
//! mounts it in a private mount namespace, `attach` decides which methods to try, `loader` loads and attaches
//! the programs and reads their maps.
//!
//! Architecture invariant: only `loader` and the files beside it use aya's programs and maps, and only `features` and `tracefs` open
//! files.

pub mod attach;
pub mod bind_programs;
pub mod btf;
pub mod connect_table;
pub mod features;
pub mod loader;
pub mod programs;
pub mod refused_connects;
pub mod tracefs;
