//! The ring buffer to user space. Each record is delivered or counted as lost.

use aya_ebpf::{macros::map, maps::RingBuf};
use selfconn_ebpf::counter;
use zerocopy::IntoBytes;

use super::counters::count;

/// Records of all kinds: see [`selfconn_ebpf::Record`]. The loader sets its size.
#[map]
static RECORDS: RingBuf = RingBuf::with_byte_size(8 << 20, 0);

/// Writes a record into the ring buffer. Returns false if the ring buffer is full. The type of the record has no
/// padding, so every byte is written.
#[inline(always)]
pub(crate) fn submit<T: IntoBytes + 'static>(record: impl FnOnce() -> T) -> bool {
    submit_to(&RECORDS, record)
}

/// As [`submit`], into this ring buffer. The counters are those of all ring buffers.
#[inline(always)]
pub(crate) fn submit_to<T: IntoBytes + 'static>(ring: &RingBuf, record: impl FnOnce() -> T) -> bool {
    count(counter::MATCHED);
    let is_submitted = try_submit_to(ring, record);
    if !is_submitted {
        count(counter::RING_FULL);
    }
    is_submitted
}

/// As [`submit_to`], without the counters.
#[inline(always)]
pub(crate) fn try_submit_to<T: IntoBytes + 'static>(ring: &RingBuf, record: impl FnOnce() -> T) -> bool {
    let Some(mut entry) = ring.reserve::<T>(0) else { return false };
    entry.write(record());
    entry.submit(0);
    true
}
