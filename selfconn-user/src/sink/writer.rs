//! Hands what waits to something that may block for ever: a terminal that is stopped, a pipe whose reader is frozen,
//! the journal's socket. A thread of its own does the blocking. The loop keeps the backlog, hands over a portion at a
//! time, and hears what became of it.

use std::{io, sync::mpsc, thread, time::Duration};

use rustix::thread::CapabilitySet;
use tokio::sync::mpsc as answers;

use super::backlog::Backlog;
use crate::privileges;

/// As much as waits for a slow reader.
const PENDING_LIMIT: usize = 4 << 20;

/// So much is handed over at once.
const PORTION: usize = 256 << 10;

/// So much of it, what a pipe holds by default, is told as taken before the rest is.
pub(super) const PIECE: usize = 64 << 10;

/// A reader that takes nothing for so long has stopped reading, and a flood no longer waits for it.
const STOPPED: Duration = Duration::from_millis(100);

/// A thread that takes this long over a portion is stuck; at the end of a run nobody waits for it longer.
const STUCK: Duration = Duration::from_secs(2);

/// So many bytes more were taken, and then there may have been an error.
#[derive(Debug)]
struct Answer {
    taken: usize,
    error: Option<io::Error>,
    /// Nothing more comes of this portion.
    is_last: bool,
}

/// A backlog, and the thread that empties it.
#[derive(Debug)]
pub(super) struct Writer {
    name: &'static str,
    backlog: Backlog,
    portions: mpsc::Sender<Vec<u8>>,
    answers: answers::UnboundedReceiver<Answer>,
    /// The thread has a portion.
    is_busy: bool,
    /// In a burst of errors, which is said once.
    is_failing: bool,
    /// The reader has stopped reading, as far as is known.
    has_stopped: bool,
    end: Option<End>,
}

/// Why nothing is handed over any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The reader has gone: of a pipe, or with its terminal. It wants nothing more, so nothing more is lost.
    Gone,
    /// The run is over, and the reader took nothing.
    Stuck,
}

impl Writer {
    /// Starts the thread. `deliver` takes bytes from the beginning of what it is given, and says how many; it may block.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn start(
        name: &'static str,
        mut deliver: impl FnMut(&[u8]) -> io::Result<usize> + Send + 'static,
    ) -> io::Result<Self> {
        let (portions, to_write) = mpsc::channel::<Vec<u8>>();
        let (answer, answers) = answers::unbounded_channel();
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            if let Err(error) = privileges::keep(CapabilitySet::empty()) {
                log::error!("the thread that writes {name} keeps too many privileges: {error}");
            }
            // Ends with the loop.
            for portion in to_write {
                let mut is_heard = true;
                write(&portion, &mut deliver, |one| is_heard = answer.send(one).is_ok());
                if !is_heard {
                    break;
                }
            }
        })?;
        Ok(Self {
            name,
            backlog: Backlog::new(PENDING_LIMIT),
            portions,
            answers,
            is_busy: false,
            is_failing: false,
            has_stopped: false,
            end: None,
        })
    }

    /// Adds an item. It is handed over at the next flush.
    pub(super) fn push(&mut self, item: &[u8]) {
        self.backlog.push(item);
    }

    /// Hands over a portion, unless the thread still has one.
    pub(super) fn flush(&mut self) {
        self.hear();
        if !self.is_busy && self.end.is_none() && !self.backlog.is_empty() {
            self.is_busy = self.portions.send(self.backlog.portion(PORTION).to_owned()).is_ok();
        }
    }

    /// Takes in what the thread has said so far.
    fn hear(&mut self) {
        while let Ok(answer) = self.answers.try_recv() {
            self.heard(answer);
        }
    }

    fn heard(&mut self, Answer { taken, error, is_last }: Answer) {
        self.is_busy = !is_last;
        self.has_stopped = false;
        self.backlog.take(taken);
        match error {
            None => {
                if std::mem::take(&mut self.is_failing) {
                    log::warn!("{} can be written again", self.name);
                }
            }
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => self.end = Some(End::Gone),
            Some(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!("cannot write {}: {error}; events wait", self.name);
                }
            }
        }
    }

    /// Waits until something was taken, and more waits: then it is time to flush. Loses nothing when it is dropped.
    pub(super) async fn ready(&mut self) {
        loop {
            // The thread lives as long as we do.
            let Some(answer) = self.answers.recv().await else { return std::future::pending().await };
            let has_failed = answer.error.is_some();
            self.heard(answer);
            // After an error, the next attempt is made when something wakes the loop, not at once.
            if self.is_gone() || (!has_failed && !self.is_busy && !self.backlog.is_empty()) {
                return;
            }
        }
    }

    /// Waits for a reader that is slow, until there is room for the events of a batch; not for one that has stopped.
    pub(super) async fn make_room(&mut self) {
        while self.backlog.len() > PENDING_LIMIT / 2 {
            self.flush();
            if !self.is_busy || self.is_failing || self.has_stopped {
                break;
            }
            match tokio::time::timeout(STOPPED, self.answers.recv()).await {
                Ok(Some(answer)) => self.heard(answer),
                Ok(None) | Err(_) => self.has_stopped = true,
            }
        }
    }

    /// Hands over all that waits, as long as the reader takes anything; then gives the rest up.
    pub(super) async fn drain(&mut self) {
        loop {
            self.flush();
            if !self.is_busy || self.is_failing {
                break;
            }
            match tokio::time::timeout(STUCK, self.answers.recv()).await {
                Ok(Some(answer)) => self.heard(answer),
                Ok(None) | Err(_) => break,
            }
        }
        if !self.backlog.is_empty() && !self.is_gone() {
            self.backlog.give_up();
            self.end = Some(End::Stuck);
        }
    }

    /// Whether there is no reader any more.
    pub(super) fn is_gone(&self) -> bool {
        self.end == Some(End::Gone)
    }

    /// Whether the run ended with a reader that took nothing.
    pub(super) fn is_stuck(&self) -> bool {
        self.end == Some(End::Stuck)
    }

    /// Whether something waits.
    pub(super) fn is_behind(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Items that never will be.
    pub(super) fn lost(&self) -> u64 {
        self.backlog.lost()
    }
}

/// Until all is taken, or an error comes.
fn write(
    portion: &[u8],
    deliver: &mut impl FnMut(&[u8]) -> io::Result<usize>,
    mut answer: impl FnMut(Answer),
) {
    let (mut done, mut told) = (0, 0);
    while done < portion.len() {
        match deliver(&portion[done..]) {
            Ok(taken @ 1..) => done += taken,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            failed => {
                let error = failed.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                return answer(Answer { taken: done - told, error: Some(error), is_last: true });
            }
        }
        if done - told >= PIECE || done == portion.len() {
            answer(Answer { taken: done - told, error: None, is_last: done == portion.len() });
            told = done;
        }
    }
}
