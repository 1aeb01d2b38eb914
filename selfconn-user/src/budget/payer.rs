//! Who pays for a connection.

use std::sync::Arc;

/// The owner of a self-connection: a user, in a control group that only root makes. Connections of unknown users
/// are one owner's.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Payer {
    /// The real user id of the opener or, if the opener is unknown, the socket's.
    pub uid: Option<u32>,
    /// The container, the unit or the slice. `None`: unknown, or the root of the hierarchy.
    pub cgroup: Option<Arc<str>>,
}
