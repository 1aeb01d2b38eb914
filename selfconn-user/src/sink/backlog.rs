//! What waits to be taken by something that may refuse it, or take only half: lines for a file, entries for the journal.
//! Pure: who takes it is somebody else's business.

use std::collections::VecDeque;

/// Memory that an empty backlog keeps.
const KEPT: usize = 256 << 10;

/// Memory of what was taken that is kept before the rest is moved there: a backlog takes as much more than its limit.
const GONE: usize = 512 << 10;

/// Items in order, up to a limit of bytes. What comes after that is lost whole, and counted.
#[derive(Debug)]
pub(super) struct Backlog {
    /// Whole items, from `start` on. The first is kept whole until all of it was taken.
    bytes: Vec<u8>,
    start: usize,
    /// How long each is.
    lengths: VecDeque<usize>,
    /// How much of the first was taken already.
    torn: usize,
    limit: usize,
    taken: u64,
    lost: u64,
}

impl Backlog {
    pub(super) fn new(limit: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, lengths: VecDeque::new(), torn: 0, limit, taken: 0, lost: 0 }
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

    /// Bytes that wait.
    pub(super) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// All that is still to be taken.
    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.start + self.torn..]
    }

    /// As many whole items as fit into so many bytes, but one at least; less what was taken of the first.
    pub(super) fn portion(&self, limit: usize) -> &[u8] {
        let mut end = self.lengths.front().copied().unwrap_or(0);
        for length in self.lengths.iter().skip(1) {
            if end + length > limit {
                break;
            }
            end += length;
        }
        &self.bytes[self.start + self.torn..self.start + end]
    }

    /// The rest of a first item that was taken in part; empty when none was.
    pub(super) fn torn_rest(&self) -> &[u8] {
        match self.lengths.front() {
            Some(length) if self.torn > 0 => &self.bytes[self.start + self.torn..self.start + length],
            _ => &[],
        }
    }

    /// So many bytes of the rest were taken.
    pub(super) fn take(&mut self, count: usize) {
        let mut end = self.torn + count;
        let mut gone = 0;
        while let Some(length) = self.lengths.front().copied().filter(|length| *length <= end) {
            self.lengths.pop_front();
            (end, gone) = (end - length, gone + length);
            self.taken += 1;
        }
        self.torn = end;
        self.start += gone;
        if self.lengths.is_empty() {
            self.clear();
        } else if self.start > (self.bytes.len() / 2).min(GONE) {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    fn clear(&mut self) {
        self.bytes.clear();
        // What a burst needed is given back.
        self.bytes.shrink_to(KEPT);
        self.lengths.clear();
        self.lengths.shrink_to(KEPT / 64);
        (self.start, self.torn) = (0, 0);
    }

    /// What was taken of the first item is no more: it is to be taken from its beginning.
    pub(super) fn restart(&mut self) {
        self.torn = 0;
    }

    /// Nothing of it will ever be taken.
    pub(super) fn give_up(&mut self) {
        self.lost += self.lengths.len() as u64;
        self.clear();
    }

    /// Items that were taken.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Items that never will be.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_does_not_fit_is_lost_whole_and_counted() {
        let mut backlog = Backlog::new(12);
        for _ in 0..5 {
            backlog.push(b"12345\n");
        }
        assert_eq!((backlog.rest(), backlog.lost()), (&b"12345\n12345\n"[..], 3));
        backlog.take(4);
        backlog.push(b"12345\n");
        assert_eq!(backlog.lost(), 4, "a torn item keeps its room, for it may have to be taken again");
        backlog.take(2);
        backlog.push(b"12345\n");
        assert_eq!((backlog.taken(), backlog.lost(), backlog.rest().len()), (1, 4, 12));
        backlog.give_up();
        assert_eq!((backlog.taken(), backlog.lost(), backlog.is_empty()), (1, 6, true));
    }

    #[test]
    fn a_torn_item_is_completed_or_begun_again() {
        let mut backlog = Backlog::new(100);
        backlog.push(b"first\n");
        backlog.push(b"second\n");
        assert_eq!(backlog.torn_rest(), b"");
        backlog.take(4);
        assert_eq!((backlog.torn_rest(), backlog.rest()), (&b"t\n"[..], &b"t\nsecond\n"[..]));
        backlog.restart();
        assert_eq!((backlog.torn_rest(), backlog.rest()), (&b""[..], &b"first\nsecond\n"[..]));
        backlog.take(8);
        assert_eq!((backlog.torn_rest(), backlog.taken()), (&b"cond\n"[..], 1));
        backlog.take(5);
        assert!(backlog.is_empty() && backlog.torn_rest().is_empty());
        assert_eq!(backlog.taken(), 2);
    }

    #[test]
    fn a_portion_is_whole_items_and_never_nothing() {
        let mut backlog = Backlog::new(100);
        for item in ["1234567\n", "12\n", "12\n"] {
            backlog.push(item.as_bytes());
        }
        assert_eq!(backlog.portion(4), b"1234567\n");
        assert_eq!(backlog.portion(12), b"1234567\n12\n");
        backlog.take(9);
        assert_eq!(backlog.portion(4), b"2\n");
        assert_eq!(backlog.portion(100), b"2\n12\n");
    }

    proptest! {
        /// However it is taken, everything is taken once, in order, or counted as lost.
        #[test]
        fn items_are_taken_once_in_order_or_counted(
            steps in prop::collection::vec((0_usize..20, 0_usize..40), 1..60),
            limit in 1_usize..80,
        ) {
            let mut backlog = Backlog::new(limit);
            let (mut taken, mut made) = (Vec::new(), 0_u64);
            for (number, (length, take)) in steps.into_iter().enumerate() {
                let item = format!("{number}:{}\n", "x".repeat(length));
                backlog.push(item.as_bytes());
                made += 1;
                let take = take.min(backlog.rest().len());
                taken.extend_from_slice(&backlog.rest()[..take]);
                backlog.take(take);
            }
            taken.extend_from_slice(backlog.rest());
            backlog.take(backlog.rest().len());
            prop_assert!(backlog.is_empty());
            prop_assert_eq!(backlog.taken() + backlog.lost(), made);
            let text = String::from_utf8(taken).unwrap();
            prop_assert_eq!(text.lines().count() as u64, backlog.taken());
            let numbers: Vec<usize> =
                text.lines().map(|line| line.split(':').next().unwrap().parse().unwrap()).collect();
            prop_assert!(numbers.is_sorted_by(|one, next| one < next));
        }
    }
}
