//! The kernel side of user space: what this kernel offers, and our programs in it.
//!
//! `host` asks what is there, `btf` and `format` read layouts, `tracefs` finds it or mounts it where nobody sees,
//! `attach` decides which methods to try and what a refusal means, `tracer` loads, attaches and reads.
//! Architecture invariant: only `tracer` talks to aya's programs and maps, and only `host` and `tracefs` open files.

pub mod attach;
pub mod btf;
pub mod format;
pub mod host;
pub mod tracefs;
pub mod tracer;
