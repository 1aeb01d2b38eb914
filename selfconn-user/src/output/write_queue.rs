//! A bounded queue of items that wait to be written: lines for a file or for stdout, entries for the journal.
//! The writer may refuse an item or accept only a part of it. This file does no I/O.

use std::collections::VecDeque;

use crate::budget::memory;

/// Memory that an empty queue keeps allocated.
const RETAINED_CAPACITY: usize = 256 << 10;

/// Maximum bytes of written items that are kept before the remaining items are moved to the front. A queue
/// may use this much memory in addition to its limit.
const COMPACTION_THRESHOLD: usize = 512 << 10;

const _: () = assert!(RETAINED_CAPACITY + COMPACTION_THRESHOLD <= memory::QUEUE_REST_BYTES);

/// Items in order, up to a limit of bytes. An item that does not fit is lost as a whole and counted.
#[derive(Debug)]
pub(super) struct WriteQueue {
    /// Whole items, beginning at `start`. The first item is kept whole until all of its bytes are written.
    bytes: Vec<u8>,
    start: usize,
    /// Length of each item.
    lengths: VecDeque<usize>,
    /// Number of bytes of the first item that are already written.
    partial: usize,
    limit: usize,
    completed: u64,
    lost: u64,
}

impl WriteQueue {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            start: 0,
            lengths: VecDeque::new(),
            partial: 0,
            limit,
            completed: 0,
            lost: 0,
        }
    }

    /// Adds an item, unless there is no room.
    pub(super) fn push(&mut self, item: &[u8]) {
        if self.len() + item.len() > self.limit {
            self.lost += 1;
        } else {
            self.bytes.extend_from_slice(item);
            self.lengths.push_back(item.len());
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Bytes in the queue, including the written part of the first item.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// As many whole items as fit into `limit` bytes, but at least one; without the written part of the first
    /// item.
    pub(super) fn chunk(&self, limit: usize) -> &[u8] {
        let mut end = self.lengths.front().copied().unwrap_or(0);
        for length in self.lengths.iter().skip(1) {
            if end + length > limit {
                break;
            }
            end += length;
        }
        &self.bytes[self.start + self.partial..self.start + end]
    }

    /// The unwritten rest of a partially written first item. Empty if no item is partially written.
    pub(super) fn partial_rest(&self) -> &[u8] {
        match self.lengths.front() {
            Some(length) if self.partial > 0 => &self.bytes[self.start + self.partial..self.start + length],
            _ => &[],
        }
    }

    /// Marks `count` more bytes as written.
    pub(super) fn advance(&mut self, count: usize) {
        let mut end = self.partial + count;
        let mut consumed = 0;
        while let Some(length) = self.lengths.front().copied().filter(|length| *length <= end) {
            self.lengths.pop_front();
            (end, consumed) = (end - length, consumed + length);
            self.completed += 1;
        }
        self.partial = end;
        self.start += consumed;
        if self.lengths.is_empty() {
            self.clear();
        } else if self.start > (self.bytes.len() / 2).min(COMPACTION_THRESHOLD) {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        // Release the memory that a burst needed.
        self.bytes.shrink_to(RETAINED_CAPACITY);
        self.lengths.clear();
        self.lengths.shrink_to(RETAINED_CAPACITY / 64);
        (self.start, self.partial) = (0, 0);
    }

    /// Makes the first item unwritten again, because its written part is no longer in the file.
    pub(super) fn rewind(&mut self) {
        self.partial = 0;
    }

    /// Drops all items and counts them as lost.
    pub(super) fn drop_all(&mut self) {
        self.lost += self.lengths.len() as u64;
        self.clear();
    }

    /// Number of items that are completely written.
    pub(super) fn completed(&self) -> u64 {
        self.completed
    }

    /// Number of items that were dropped.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_item_that_does_not_fit_is_dropped_and_counted() {
        let mut queue = WriteQueue::new(12);
        for _ in 0..5 {
            queue.push(b"12345\n");
        }
        assert_eq!((queue.chunk(usize::MAX), queue.lost()), (&b"12345\n12345\n"[..], 3));
        queue.advance(4);
        queue.push(b"12345\n");
        assert_eq!(
            queue.lost(),
            4,
            "a partially written item keeps its room, because it may have to be written again"
        );
        queue.advance(2);
        queue.push(b"12345\n");
        assert_eq!((queue.completed(), queue.lost(), queue.chunk(usize::MAX).len()), (1, 4, 12));
        queue.drop_all();
        assert_eq!((queue.completed(), queue.lost(), queue.is_empty()), (1, 6, true));
    }

    #[test]
    fn a_partial_item_is_completed_or_restarted() {
        let mut queue = WriteQueue::new(100);
        queue.push(b"first\n");
        queue.push(b"second\n");
        assert_eq!(queue.partial_rest(), b"");
        queue.advance(4);
        assert_eq!((queue.partial_rest(), queue.chunk(usize::MAX)), (&b"t\n"[..], &b"t\nsecond\n"[..]));
        queue.rewind();
        assert_eq!((queue.partial_rest(), queue.chunk(usize::MAX)), (&b""[..], &b"first\nsecond\n"[..]));
        queue.advance(8);
        assert_eq!((queue.partial_rest(), queue.completed()), (&b"cond\n"[..], 1));
        queue.advance(5);
        assert!(queue.is_empty() && queue.partial_rest().is_empty());
        assert_eq!(queue.completed(), 2);
    }

    #[test]
    fn a_chunk_is_whole_items_and_never_empty() {
        let mut queue = WriteQueue::new(100);
        for item in ["1234567\n", "12\n", "12\n"] {
            queue.push(item.as_bytes());
        }
        assert_eq!(queue.chunk(4), b"1234567\n");
        assert_eq!(queue.chunk(12), b"1234567\n12\n");
        queue.advance(9);
        assert_eq!(queue.chunk(4), b"2\n");
        assert_eq!(queue.chunk(100), b"2\n12\n");
    }

    proptest! {
        /// For any sequence of partial writes, each item is written once and in order, or counted as lost.
        #[test]
        fn items_are_written_once_in_order_or_counted(
            steps in prop::collection::vec((0_usize..20, 0_usize..40), 1..60),
            limit in 1_usize..80,
        ) {
            let mut queue = WriteQueue::new(limit);
            let (mut written, mut made) = (Vec::new(), 0_u64);
            for (number, (length, count)) in steps.into_iter().enumerate() {
                let item = format!("{number}:{}\n", "x".repeat(length));
                queue.push(item.as_bytes());
                made += 1;
                let count = count.min(queue.chunk(usize::MAX).len());
                written.extend_from_slice(&queue.chunk(usize::MAX)[..count]);
                queue.advance(count);
            }
            written.extend_from_slice(queue.chunk(usize::MAX));
            queue.advance(queue.chunk(usize::MAX).len());
            prop_assert!(queue.is_empty());
            prop_assert_eq!(queue.completed() + queue.lost(), made);
            let text = String::from_utf8(written).unwrap();
            prop_assert_eq!(text.lines().count() as u64, queue.completed());
            let numbers: Vec<usize> =
                text.lines().map(|line| line.split(':').next().unwrap().parse().unwrap()).collect();
            prop_assert!(numbers.is_sorted_by(|one, next| one < next));
        }
    }
}
