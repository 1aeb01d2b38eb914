//! Splits the bytes of a log into lines. Accepts arbitrary bytes.

/// Maximum length of a line. Every event is shorter. A longer line is not kept in memory.
pub(super) const MAX_LINE_BYTES: usize = 1 << 20;

/// Splits blocks of bytes into lines. A line may extend over several blocks.
#[derive(Debug, Default)]
pub(super) struct LineSplitter {
    partial: Vec<u8>,
    /// The current line is too long. The rest of it is dropped.
    is_too_long: bool,
}

impl LineSplitter {
    /// Calls `line` for each line that this block completes, without its newline, or with `None` if it is too
    /// long.
    pub(super) fn feed<E>(
        &mut self,
        block: &[u8],
        mut line: impl FnMut(Option<&[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = block;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = rest.split_at(end);
            rest = &tail[1..];
            if self.is_too_long || self.partial.len() + head.len() > MAX_LINE_BYTES {
                line(None)?;
            } else if self.partial.is_empty() {
                line(Some(head))?;
            } else {
                self.partial.extend_from_slice(head);
                line(Some(&self.partial))?;
            }
            self.reset();
        }
        if self.is_too_long || self.partial.len() + rest.len() > MAX_LINE_BYTES {
            self.reset();
            self.is_too_long = true;
        } else {
            self.partial.extend_from_slice(rest);
        }
        Ok(())
    }

    /// Drops an incomplete line. Returns true if there was one.
    pub(super) fn reset(&mut self) -> bool {
        let had_line = self.is_too_long || !self.partial.is_empty();
        self.is_too_long = false;
        self.partial.clear();
        self.partial.shrink_to(MAX_LINE_BYTES / 16);
        had_line
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn split(blocks: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let (mut lines, mut found) = (LineSplitter::default(), Vec::new());
        for block in blocks {
            let outcome: Result<(), ()> = lines.feed(block, |line| {
                found.push(line.map(<[u8]>::to_vec));
                Ok(())
            });
            outcome.unwrap();
        }
        found
    }

    #[test]
    fn a_line_that_is_too_long_is_dropped_and_affects_no_other_line() {
        let long = vec![b'x'; MAX_LINE_BYTES + 1];
        let found = split(&[b"one\n", &long, b"x\ntwo\nthr", b"ee\n", &long[1..], b"\nfour\nfive"]);
        let text = |line: &Option<Vec<u8>>| line.as_ref().map(|line| line.len().min(9));
        assert_eq!(
            found.iter().map(text).collect::<Vec<_>>(),
            [Some(3), None, Some(3), Some(5), Some(9), Some(4)]
        );
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_block_boundaries(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            cuts in prop::collection::vec(0_usize..200, 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| at.min(bytes.len())).collect();
            cuts.push(0);
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let blocks: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(split(&blocks), split(&[&bytes]));
        }
    }
}
