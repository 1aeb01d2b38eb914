//! Bytes of a log to its lines, whatever the bytes are.

/// Longer than any event; a line beyond that is garbage, and is not kept.
pub(super) const LONGEST: usize = 1 << 20;

/// Cuts lines out of what comes in pieces.
#[derive(Debug, Default)]
pub(super) struct Lines {
    begun: Vec<u8>,
    /// The line at hand is too long: what comes of it is dropped up to its end.
    is_too_long: bool,
}

impl Lines {
    /// Hands on each line that a piece completes, without its newline; `None` for one that is too long.
    pub(super) fn feed<E>(
        &mut self,
        piece: &[u8],
        mut line: impl FnMut(Option<&[u8]>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = piece;
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            let (head, tail) = rest.split_at(end);
            rest = &tail[1..];
            if self.is_too_long || self.begun.len() + head.len() > LONGEST {
                line(None)?;
            } else if self.begun.is_empty() {
                line(Some(head))?;
            } else {
                self.begun.extend_from_slice(head);
                line(Some(&self.begun))?;
            }
            self.reset();
        }
        if self.is_too_long || self.begun.len() + rest.len() > LONGEST {
            self.reset();
            self.is_too_long = true;
        } else {
            self.begun.extend_from_slice(rest);
        }
        Ok(())
    }

    /// What was begun will not be completed. Says whether there was something.
    pub(super) fn reset(&mut self) -> bool {
        let had = self.is_too_long || !self.begun.is_empty();
        self.is_too_long = false;
        self.begun.clear();
        self.begun.shrink_to(LONGEST / 16);
        had
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cut(pieces: &[&[u8]]) -> Vec<Option<Vec<u8>>> {
        let (mut lines, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            let outcome: Result<(), ()> = lines.feed(piece, |line| {
                found.push(line.map(<[u8]>::to_vec));
                Ok(())
            });
            outcome.unwrap();
        }
        found
    }

    #[test]
    fn a_line_that_is_too_long_is_left_out_and_spoils_no_other() {
        let long = vec![b'x'; LONGEST + 1];
        let found = cut(&[b"one\n", &long, b"x\ntwo\nthr", b"ee\n", &long[1..], b"\nfour\nfive"]);
        let text = |line: &Option<Vec<u8>>| line.as_ref().map(|line| line.len().min(9));
        assert_eq!(
            found.iter().map(text).collect::<Vec<_>>(),
            [Some(3), None, Some(3), Some(5), Some(9), Some(4)]
        );
    }

    proptest! {
        #[test]
        fn how_it_comes_in_pieces_does_not_matter(
            bytes in prop::collection::vec(prop_oneof![Just(b'\n'), any::<u8>()], 0..200),
            cuts in prop::collection::vec(0_usize..200, 0..8),
        ) {
            let mut cuts: Vec<_> = cuts.into_iter().map(|at| at.min(bytes.len())).collect();
            cuts.push(0);
            cuts.push(bytes.len());
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|pair| &bytes[pair[0]..pair[1]]).collect();
            prop_assert_eq!(cut(&pieces), cut(&[&bytes]));
        }
    }
}
