//! Reads the kernel's socket tables: the self-connections that exist now in every network namespace, and
//! their holders.
//!
//! This module does not emit events; the caller compares snapshots. The kernel does not dump a table
//! atomically: a socket that is hashed or unhashed while its bucket is read may be missing, so one absence
//! proves nothing.
//!
//! Where the iterator over descriptors is attached, one pass of it lists what processes hold in every
//! namespace, and who holds it. Without it, some namespaces are not found: a namespace that only non-main
//! threads are in, unless the caller passes one of these threads as a hint (reading `/proc/PID/task/*/ns/net`
//! for every thread of the host is too expensive), a namespace that is kept alive only by an open descriptor,
//! and a namespace that is mounted only in another mount namespace.

mod by_process;
mod by_socket;
mod connect_match;
mod current_holders;
mod descriptor_pass;
mod destroy;
mod devices;
mod entry;
mod existing;
mod found_process;
mod held;
mod holders;
mod limit;
mod listeners;
mod netns;
mod netns_enter;
mod netns_owner;
mod netns_search;
mod netns_selection;
mod netns_turns;
mod on_port;
mod port_use;
mod process_list;
mod procfs;
mod snapshot;
mod sock_diag;
mod table;
mod walk_cost;

pub use by_socket::{BySocket, SocketRef};
pub use connect_match::ConnectMatch;
pub use current_holders::{CurrentHolders, find_current_holders};
pub use destroy::TargetSocket;
pub use destroy::can_destroy;
pub use destroy::can_enter;
pub use destroy::destroy;
pub use destroy::destroy_all;
pub use destroy::destroy_if;
pub use destroy::look_up;
pub use devices::NetDevices;
pub use entry::Coverage;
pub use entry::SocketEntry;
pub use existing::ExistingNamespaces;
pub use existing::no_list;
pub use holders::HolderSearch;
pub use holders::Holders;
pub use holders::find_holders;
pub use limit::LeftOut;
pub use listeners::InspectOptions;
pub use listeners::ListenerInspection;
pub use listeners::inspect;
pub use netns::Namespace;
pub use netns::NetnsId;
pub use netns::VisitResult;
pub use netns_enter::run_in_namespace;
pub use netns_owner::{owner as netns_owner, owner_at as netns_owner_at, visit_namespace, visit_namespaces};
pub use netns_selection::{CURRENT_NETNS, NamespaceSelection};
pub use netns_turns::{VisitHistory, VisitTurns};
pub use on_port::PortSocket;
pub use on_port::on_port;
pub use port_use::PortUse;
pub use port_use::port_uses;
#[cfg(any(test, fuzzing))]
pub(crate) use procfs::parse_anything;
pub use snapshot::SnapshotOptions;
pub use snapshot::SocketSnapshot;
pub use snapshot::snapshot;
pub use sock_diag::exact::Cookie;
