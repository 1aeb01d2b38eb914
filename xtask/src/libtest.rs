//! What libtest prints: how many tests ran, and why some failed.

/// Part of the first line of a panic.
const PANIC: &str = " panicked at ";

/// Number of lines shown of each panic.
const PANIC_LINES: usize = 4;

/// The passed and failed tests in a line `test result: ok. 3 passed; 0 failed; ...`.
pub(crate) fn tests_in(line: &str) -> usize {
    let Some(counts) = line.strip_prefix("test result: ") else { return 0 };
    let words: Vec<_> = counts.split([' ', ';']).collect();
    let counted = words.windows(2).filter(|pair| ["passed", "failed"].contains(&pair[1]));
    counted.filter_map(|pair| pair[0].parse::<usize>().ok()).sum()
}

/// Finds the beginning of each panic in an output that is read line by line.
#[derive(Default)]
pub(crate) struct PanicFinder {
    /// Lines of the last panic that are still to come.
    to_come: usize,
}

impl PanicFinder {
    /// True if this line belongs to the beginning of a panic.
    pub(crate) fn is_shown(&mut self, line: &str) -> bool {
        if line.contains(PANIC) {
            self.to_come = PANIC_LINES;
        }
        let is_shown = self.to_come > 0;
        self.to_come = self.to_come.saturating_sub(1);
        is_shown
    }
}

/// The beginning of each panic in the output.
pub(crate) fn panics(output: &str) -> String {
    let mut finder = PanicFinder::default();
    output.lines().filter(|line| finder.is_shown(line)).map(|line| format!("{line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_shown_with_its_message() {
        let panic = "thread 'a' (7) panicked at a.rs:1:2:\nassertion failed\n  left: 1\n right: 2\n";
        let output = format!("test a ... \n{panic}FAILED\n");
        assert_eq!(panics(&output), panic);
        assert_eq!(panics("test a ... ok\n"), "");
    }

    #[test]
    fn tests_are_counted_in_results_only() {
        for (line, count) in [
            ("test result: ok. 3 passed; 1 failed; 2 ignored; 0 measured; 9 filtered out", 4),
            ("test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 44 filtered out", 0),
            ("test a ... 3 passed", 0),
        ] {
            assert_eq!(tests_in(line), count, "{line}");
        }
    }
}
