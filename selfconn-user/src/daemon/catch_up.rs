//! What the loop does only after every record from before it is applied. It waits without a loop of its own: a
//! flood of records never ends, and everything else must get its turn meanwhile.

use std::collections::VecDeque;

use selfconn_ebpf::bind_failure::BindFailure;
use tokio::time::Instant;

use crate::sockets::{Cookie, SocketSnapshot};

/// What waits for records.
pub(super) enum AfterRecords {
    Reconcile(Box<SocketSnapshot>),
    /// Number of the connection, and the cookie of the socket that was found.
    LookedUp(u64, Result<Option<Cookie>, String>),
    EvaluateSelfTest,
    /// They may be about self-connections of records from before them.
    BindFailures(Vec<BindFailure>),
}

/// In order, each with the number of records that must have been delivered.
pub(super) struct CatchUp<T>(VecDeque<Waiting<T>>);

struct Waiting<T> {
    delivered: u64,
    until: Instant,
    then: T,
}

impl<T> Default for CatchUp<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<T> CatchUp<T> {
    /// `then` waits for this number of delivered records. A probe may count a record that it never writes. So
    /// after `until` it waits no longer than until the ring buffer is empty.
    pub(super) fn push(&mut self, delivered: u64, until: Instant, then: T) {
        self.0.push_back(Waiting { delivered, until, then });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many wait for which `matches` is true.
    pub(super) fn count(&self, matches: impl Fn(&T) -> bool) -> usize {
        self.0.iter().filter(|waiting| matches(&waiting.then)).count()
    }

    /// All that wait. From now on none does.
    pub(super) fn take_all(&mut self) -> impl Iterator<Item = T> {
        std::mem::take(&mut self.0).into_iter().map(|waiting| waiting.then)
    }

    /// The next one that waits no longer.
    pub(super) fn next(&mut self, delivered: u64, is_ring_empty: bool, now: Instant) -> Option<T> {
        let first = self.0.front()?;
        let is_caught_up = delivered >= first.delivered || (is_ring_empty && now > first.until);
        if is_caught_up { self.0.pop_front().map(|waiting| waiting.then) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn nothing_is_done_before_the_records_from_before_it() {
        let now = Instant::now();
        let later = now + Duration::from_secs(1);
        let mut catch_up = CatchUp::default();
        catch_up.push(10, now, 'a');
        catch_up.push(20, later, 'b');
        assert_eq!(catch_up.next(9, true, now), None, "a record is still being written");
        assert_eq!(catch_up.next(9, false, later), None, "a flood: the ring buffer has more");
        assert_eq!(catch_up.next(10, false, now), Some('a'));
        assert_eq!(catch_up.count(|then| *then == 'b'), 1);
        assert_eq!(catch_up.next(19, true, later), None);
        assert_eq!(
            catch_up.next(19, true, later + Duration::from_nanos(1)),
            Some('b'),
            "it is never written"
        );
        assert!(catch_up.is_empty() && catch_up.next(20, true, later).is_none());
    }
}
