//! What the iterator over network namespaces writes, and where its walk is between two calls of the program.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// One element of the kernel's list of network namespaces. In the host's byte order.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct NamespaceRecord {
    /// As in [`crate::Endpoint::netns_cookie`].
    pub cookie: u64,
    /// The inode of the namespace.
    pub inode: u32,
    /// One of [`element`].
    pub element: u32,
}

const _: () = assert!(size_of::<NamespaceRecord>() == 16);

/// What an element of the list is.
pub mod element {
    /// A network namespace.
    pub const NAMESPACE: u32 = 0;
    /// The namespace of the reader, where the walk began. The walk is complete.
    pub const LAST: u32 = 1;
    /// The head of the list, which is no namespace. A complete walk comes to exactly one.
    pub const HEAD: u32 = 2;
    /// None: the walk can't go on, because the namespace where it stopped has ended.
    pub const LOST: u32 = 3;
    /// A network namespace without references: it has ended, and is in the list until the kernel has cleaned it up.
    pub const ENDED: u32 = 4;
}

/// The maximum number of elements that one call of the program visits. The verifier follows each of them, so that the
/// load takes some 0.2 s with 512. There is a call for each task of the host. The kernel's buffer for a pass (32 KiB)
/// has room for the records of several calls.
pub const ELEMENTS_PER_CALL: u32 = 64;

/// Where a walk stopped. It goes on there, also in the next pass.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct NamespaceCursor {
    /// The address of the last visited element. 0: the walk is over, and the next pass begins another.
    pub at: u64,
    /// The cookie of that element, by which it is known again.
    pub cookie: u64,
}
