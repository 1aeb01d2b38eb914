//! The user-space part of the eBPF programs: feature probes, loading, attaching, and reading of the maps.
//!
//! `host` probes the features of the kernel, `btf` and `format` parse layouts, `tracefs` finds tracefs or
//! mounts it in a private mount namespace, `attach` decides which methods to try, `tracer` loads and attaches
//! the programs and reads their maps.
//!
//! Architecture invariant: only `tracer` uses aya's programs and maps, and only `host` and `tracefs` open
//! files.

pub mod attach;
pub mod btf;
pub mod format;
pub mod host;
pub mod tracefs;
pub mod tracer;
