//! What the programs and user space agree on. Integers and byte arrays only, without implicit padding: the
//! derived `IntoBytes` does not compile otherwise, and every size is asserted.

mod action;
pub mod bind_failure;
mod connect_table;
mod counters;
mod descriptor;
mod endpoint;
mod held_ports;
mod kernel_fields;
pub mod names;
pub mod namespace;
pub mod owner;
mod record;
pub mod refused_connects;
mod task;
mod tcp;

pub use action::{Action, classify, is_ordinary};
pub use connect_table::{ConnectEntry, ConnectSet, WAYS, set_index};
pub use counters::counter;
pub use descriptor::SocketDescriptor;
pub use endpoint::{Endpoint, hashed_netns};
pub use held_ports::{HELD_PORT_SLOTS, held_port_slot};
pub use kernel_fields::{
    ABSENT, DEATH_ROW, FIELDS, Field, OTHER_NET_REFS, PORT_RANGE, STATIC_OFFSETS, uses_static_offsets,
};
pub use namespace::{NamespaceCursor, NamespaceRecord};
pub use owner::Owner;
pub use record::{Record, Transition, reported, socket_file, tag};
pub use task::{COMM_LEN, Opener, Task, cause, cgroup_access, task_access};
pub use tcp::{IPPROTO_TCP, family, state};
