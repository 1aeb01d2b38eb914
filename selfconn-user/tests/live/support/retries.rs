//! Retries. There are two reasons to repeat a test: a transition that no program could see, because the forced
//! method can be preempted, and a look-up that a busy host did not make before its deadline. A test says so by
//! [`for_each_variant_retrying`] and returns [`Missed`], or by [`until_looked_up`]. A failed assertion ends a test at
//! once: a wrong value is never retried. Tests of what must not be reported have no retries.

use std::io::Write as _;

use serde_json::Value;

use super::daemon::{HookVariant, hook_variants};

/// A program misses a transition when it is preempted and another task enters it on the same CPU.
pub(crate) const PREEMPTED: &str = "the program of this method can be preempted";

/// What was not reported, or not completely, and how that shows.
#[derive(Debug)]
pub(crate) struct Missed(pub(crate) String);

/// An attempt of a test.
pub(crate) type Attempt = Result<(), Missed>;

impl Missed {
    /// An error if one of these fields of an event is null, because no program saw its transition.
    pub(crate) fn if_null(event: &Value, fields: &[&str]) -> Attempt {
        match fields.iter().find(|field| event[**field].is_null()) {
            Some(field) => Err(Self(format!("{field} is null: {event}"))),
            None => Ok(()),
        }
    }

    /// An error if no program saw how this self-connection was opened.
    pub(crate) fn if_opener_unseen(event: &Value) -> Attempt {
        match event["owner"].as_str() {
            Some("holder") | None => Err(Self(format!("no program saw the opener: {event}"))),
            Some(_) => Self::if_null(event, &["pid"]),
        }
    }
}

/// Repeats an attempt that missed something, at most `max` times in all. Prints each retry, so that a report
/// can count them.
fn with_retries(reason: &str, method: &str, max: usize, attempt: impl Fn() -> Attempt) {
    for number in 1..=max {
        let Err(Missed(what)) = attempt() else { return };
        assert!(number < max, "{method}, attempt {number} of {max}: {what}");
        let test = std::thread::current().name().unwrap_or_default().to_owned();
        // Not `println!`, whose text libtest hides if the test passes.
        let line =
            format!("RETRY test={test} method={method} attempt={number} reason={reason:?} missed={what:?}\n");
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

/// Runs a test with the default and with each method alone. A method that can be preempted on this kernel gets
/// three attempts, as does a default of such methods only, and every other variant gets one.
pub(crate) fn for_each_variant_retrying(reason: &str, test: impl Fn(&HookVariant) -> Attempt) {
    for variant in hook_variants() {
        let max = if variant.may_lose_both() { 3 } else { 1 };
        with_retries(reason, variant.method(), max, || test(&variant));
    }
}

/// Repeats what needs the look-up of a process, at most five times in all. False: its deadline had passed, as a busy
/// host may let it.
pub(crate) fn until_looked_up(mut is_looked_up: impl FnMut() -> Result<bool, Missed>) -> Attempt {
    for _ in 0..5 {
        if is_looked_up()? {
            return Ok(());
        }
    }
    Err(Missed("no process was looked up in time".to_owned()))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn attempts_until(success: usize, max: usize) -> usize {
        let count = Cell::new(0);
        with_retries("a test of retries", "none", max, || {
            count.set(count.get() + 1);
            if count.get() == success { Ok(()) } else { Err(Missed("nothing".into())) }
        });
        count.get()
    }

    #[test]
    fn an_attempt_is_repeated_until_it_misses_nothing() {
        assert_eq!(attempts_until(1, 3), 1);
        assert_eq!(attempts_until(3, 3), 3);
    }

    #[test]
    #[should_panic(expected = "attempt 3 of 3: nothing")]
    fn the_last_attempt_that_misses_something_fails() {
        attempts_until(4, 3);
    }
}
