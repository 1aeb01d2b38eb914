//! The user-space part of the eBPF programs: feature probes, loading, attaching, and reading of the maps.
//!
//! Each module uses only modules above it in this list, so that there is no circle:
//! - `attach`, `bind_method`: the methods and hooks, why a method is refused, and which methods to choose;
//! - `btf`, `tracefs`: layouts of the kernel's records; tracefs is mounted privately if it is not mounted;
//! - `features`: probes this kernel and this process;
//! - `object`: the embedded eBPF object; `connect_table`, `refused_connects`, `held_ports`, `owners`: its maps, by
//!   mmap (`mapped`) or by `bpf()` (`plain`);
//! - `programs`, `bind_programs`: attach one method, or say why not; `iterator` with `descriptors` and `namespaces`:
//!   the same for the iterators;
//! - `guard`: the same for the guard; `link`, `map_batch`: links, and calls for many entries, that aya does not make;
//! - `loader`: everything together, for the daemon and the commands.
//!
//! Architecture invariant: only `object` and the modules after it use aya's programs and maps, and only
//! `features`, `tracefs` and `loader` open files.

pub mod attach;
pub mod bind_method;
pub mod bind_programs;
pub mod btf;
pub mod connect_table;
pub mod descriptors;
pub mod features;
pub mod found_guards;
pub mod guard;
mod held_ports;
mod iterator;
mod link;
pub mod loader;
mod map_batch;
mod mapped;
pub mod namespaces;
pub mod object;
mod owners;
mod plain;
pub mod programs;
pub mod refusal;
pub mod refused_connects;
pub mod tracefs;
mod watched_ports;
