//! What the programs and user space agree on. Integers and byte arrays only, without implicit padding: the
//! derived `IntoBytes` does not compile otherwise, and every size is asserted.

mod action;
pub mod bind_failure;
mod bind_options;
mod connect_table;
mod counters;
mod descriptor;
mod endpoint;
pub mod guard;
mod held_ports;
mod kernel_fields;
pub mod names;
pub mod namespace;
pub mod owner;
mod port_slot;
mod record;
pub mod refused_connects;
mod task;
mod tcp;

pub use action::{Action, classify, ends_listener, is_ordinary};
pub use bind_options::BindOptions;
pub use connect_table::{ConnectEntry, ConnectSet, WAYS, set_index};
pub use counters::counter;
pub use descriptor::{NSFS_MAGIC, SocketDescriptor, descriptor_kind};
pub use endpoint::{Endpoint, hashed_netns};
pub use held_ports::{ANY_HELD_PORT_SLOT, HELD_PORT_SLOTS, held_port_slot};
pub use kernel_fields::{
    ABSENT, DEATH_ROW, FIELDS, Field, OTHER_NET_REFS, OWN_PORT_RANGE, PORT_RANGE, STATIC_OFFSETS,
    uses_static_offsets,
};
pub use namespace::{NamespaceCursor, NamespaceRecord};
pub use owner::Owner;
pub use port_slot::{PORT_SLOTS, port_slot};
pub use record::{ListenerClosed, Record, Transition, reported, socket_file, tag};
pub use task::{COMM_LEN, Opener, Task, cause, cgroup_access, task_access};
pub use tcp::{IPPROTO_MPTCP, IPPROTO_TCP, family, state};
