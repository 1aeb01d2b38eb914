//! Keys and values of maps.

use aya::Pod;
use zerocopy::{FromBytes, IntoBytes};

/// A key or a value of a map.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Plain<T>(pub(super) T);

// SAFETY: `IntoBytes` says that the type has no padding, and `FromBytes` that every bit pattern is a valid value.
unsafe impl<T: Copy + FromBytes + IntoBytes + 'static> Pod for Plain<T> {}
