//! What a kernel can do in its own way: what it shows, which task it names, what its socket table has. Runs on every
//! kernel of the matrix.

pub(crate) mod accounting;
pub(crate) mod bound_ports;
pub(crate) mod by_method;
pub(crate) mod connect_table;
pub(crate) mod descriptors;
pub(crate) mod exec;
pub(crate) mod identity;
pub(crate) mod kernel_socket;
pub(crate) mod namespaces;
pub(crate) mod negative;
pub(crate) mod reconcile;
pub(crate) mod rps;
pub(crate) mod scan;
pub(crate) mod scan_destroy;
pub(crate) mod unseen;
