//! When the loop lets records gather instead of waking up for each one.

use std::time::Duration;

use tokio::time::Instant;

/// Reads that follow each other sooner than this belong together. Longer than [`GATHER_TIME`] and what a timer adds.
const TOGETHER: Duration = Duration::from_millis(4);

/// This number of reads waits for nothing. A connection and its end are two or three.
const FREE_READS: u32 = 8;

/// How long records gather. It is added to the time until an event while there is a flood.
const GATHER_TIME: Duration = Duration::from_millis(1);

/// Decides if records come in a flood. A wake-up costs more than a record, the daemon and the processor on which the
/// record is made.
#[derive(Debug, Default)]
pub(super) struct Gathering {
    /// The last read that brought something.
    last: Option<Instant>,
    /// The number of reads before it that belong together with it.
    reads: u32,
    until: Option<Instant>,
}

impl Gathering {
    /// After a read of this many records. `has_more`: the ring buffer may have others.
    pub(super) fn on_read(&mut self, records: usize, has_more: bool, now: Instant) {
        if records == 0 {
            // Another source has woken the loop, or the time is over.
            self.until = self.until.filter(|until| now < *until);
            return;
        }
        let belongs_to_last = self.last.is_some_and(|last| now.saturating_duration_since(last) < TOGETHER);
        self.reads = if belongs_to_last { self.reads.saturating_add(1) } else { 0 };
        self.last = Some(now);
        self.until = (self.reads >= FREE_READS && !has_more).then(|| now + GATHER_TIME);
    }

    /// When to read next, although the ring buffer wakes nobody until then. `None`: when it wakes the loop.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_micros(100);

    #[test]
    fn records_that_come_one_upon_another_gather_and_a_single_one_waits_for_nothing() {
        let (mut gathering, mut now) = (Gathering::default(), Instant::now());
        for _ in 0..FREE_READS {
            gathering.on_read(1, false, now);
            assert_eq!(gathering.until(), None);
            now += STEP;
        }
        gathering.on_read(1, false, now);
        assert_eq!(gathering.until(), Some(now + GATHER_TIME));
        // Another source wakes the loop meanwhile, and then the time is over.
        gathering.on_read(0, false, now + STEP);
        assert_eq!(gathering.until(), Some(now + GATHER_TIME));
        gathering.on_read(0, false, now + GATHER_TIME);
        assert_eq!(gathering.until(), None);
        // The flood goes on, and ends.
        now += GATHER_TIME + STEP;
        gathering.on_read(40, false, now);
        assert_eq!(gathering.until(), Some(now + GATHER_TIME));
        now += TOGETHER;
        gathering.on_read(1, false, now);
        assert_eq!(gathering.until(), None);
    }

    #[test]
    fn nothing_gathers_while_the_ring_buffer_has_more() {
        let (mut gathering, now) = (Gathering::default(), Instant::now());
        for _ in 0..=FREE_READS {
            gathering.on_read(1024, true, now);
            assert_eq!(gathering.until(), None);
        }
    }
}
