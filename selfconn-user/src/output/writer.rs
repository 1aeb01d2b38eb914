//! Writes queued items to an output that may block forever: a stopped terminal, a pipe whose reader is
//! frozen, the journal's socket. A separate thread does the blocking writes. The event loop keeps the queue,
//! hands over one chunk at a time, and receives the progress of the thread.

use std::{io, sync::mpsc, time::Duration};

use rustix::thread::CapabilitySet;
use tokio::sync::mpsc as async_mpsc;

use super::write_queue::WriteQueue;
use crate::{budget::memory, system::capabilities};

/// Maximum bytes that are handed to the thread at once.
const CHUNK_BYTES: usize = 256 << 10;

/// Default capacity of a pipe. The thread reports its progress each time it has written this much of a chunk.
pub(super) const PIPE_CAPACITY: usize = 64 << 10;

/// A reader that accepts nothing for this long is considered stalled: a flood of events no longer waits for it. A
/// journal that syncs its files to a busy disk, or a reader that has no CPU, accepts nothing for a while.
const STALLED_READER_TIMEOUT: Duration = Duration::from_secs(2);

/// How long the end of a run waits for a reader that accepts nothing.
const END_TIMEOUT: Duration = Duration::from_millis(500);

/// How long the end of a run waits for a slow reader. A pod has ten seconds (`terminationGracePeriodSeconds`).
const MAX_END: Duration = Duration::from_secs(8);

/// How long the end of a run waits at once for a slow reader.
const ROOM_TIMEOUT: Duration = Duration::from_millis(100);

/// A report of the thread: `written` more bytes were written. An error may have followed.
#[derive(Debug)]
struct WriteProgress {
    written: usize,
    error: Option<io::Error>,
    /// No further report comes for this chunk.
    is_last: bool,
}

/// A queue, and the thread that writes its items.
#[derive(Debug)]
pub(super) struct Writer {
    name: &'static str,
    queue: WriteQueue,
    chunks: mpsc::Sender<Vec<u8>>,
    progress: async_mpsc::UnboundedReceiver<WriteProgress>,
    /// The thread is writing a chunk.
    is_busy: bool,
    /// The last write failed. A burst of errors is logged once.
    is_failing: bool,
    /// When the reader last accepted something, or the thread got its first chunk.
    last_progress: tokio::time::Instant,
    end: Option<WriterEnd>,
    /// When the run is over, also for a reader that still accepts something. `None`: it goes on.
    ends_at: Option<tokio::time::Instant>,
}

/// Why no further chunk is handed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WriterEnd {
    /// The reader of the pipe ended, or the terminal was closed. Nobody reads further events, so none counts
    /// as lost.
    ReaderGone,
    /// The run ended while the reader accepted nothing.
    Stuck,
}

impl Writer {
    /// Starts the thread. `deliver` writes bytes from the beginning of its argument and returns their number.
    /// It may block.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(super) fn start(
        name: &'static str,
        mut deliver: impl FnMut(&[u8]) -> io::Result<usize> + Send + 'static,
    ) -> io::Result<Self> {
        let (chunks, to_write) = mpsc::channel::<Vec<u8>>();
        let (sender, progress) = async_mpsc::unbounded_channel();
        capabilities::spawn_restricted(name, CapabilitySet::empty(), move || {
            // The channel is closed when the event loop ends.
            for chunk in to_write {
                let mut is_received = true;
                write(&chunk, &mut deliver, |message| is_received = sender.send(message).is_ok());
                if !is_received {
                    break;
                }
            }
        })?;
        Ok(Self {
            name,
            queue: WriteQueue::new(memory::STDOUT_QUEUE_BYTES),
            chunks,
            progress,
            is_busy: false,
            is_failing: false,
            last_progress: tokio::time::Instant::now(),
            end: None,
            ends_at: None,
        })
    }

    /// The run ends: from now on a reader is waited for less.
    pub(super) fn begin_end(&mut self) {
        self.ends_at = Some(tokio::time::Instant::now() + MAX_END);
    }

    /// Adds an item. It is handed to the thread at the next flush.
    pub(super) fn push(&mut self, item: &[u8]) {
        self.queue.push(item);
    }

    /// Hands a chunk to the thread, unless the thread is still writing one.
    pub(super) fn flush(&mut self) {
        self.receive_progress();
        if !self.is_busy && self.end.is_none() && !self.queue.is_empty() {
            self.is_busy = self.chunks.send(self.queue.chunk(CHUNK_BYTES).to_owned()).is_ok();
            self.last_progress = tokio::time::Instant::now();
        }
    }

    /// Applies all reports that the thread has sent so far.
    fn receive_progress(&mut self) {
        while let Ok(progress) = self.progress.try_recv() {
            self.apply(progress);
        }
    }

    fn apply(&mut self, WriteProgress { written, error, is_last }: WriteProgress) {
        self.is_busy = !is_last;
        self.last_progress = tokio::time::Instant::now();
        self.queue.advance(written);
        match error {
            None => {
                if std::mem::take(&mut self.is_failing) {
                    log::warn!("{} can be written again", self.name);
                }
            }
            Some(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.end = Some(WriterEnd::ReaderGone);
            }
            Some(error) => {
                if !std::mem::replace(&mut self.is_failing, true) {
                    log::error!("cannot write {}: {error}; events wait", self.name);
                }
            }
        }
    }

    /// Waits until a chunk is written and more items wait, so that the caller should flush. Cancel safe.
    pub(super) async fn ready(&mut self) {
        loop {
            // The thread does not end before this writer is dropped.
            let Some(progress) = self.progress.recv().await else { return std::future::pending().await };
            let has_failed = progress.error.is_some();
            self.apply(progress);
            // After an error, do not retry immediately: the next attempt comes with the next wake-up of the
            // loop.
            if self.is_gone() || (!has_failed && !self.is_busy && !self.queue.is_empty()) {
                return;
            }
        }
    }

    /// True if a quarter of the queue is used, and the reader takes its items: there will be room soon.
    pub(super) fn is_filling(&self) -> bool {
        self.queue.len() > memory::STDOUT_QUEUE_BYTES / 4 && self.is_taken()
    }

    /// True if the reader has accepted something a moment ago, or all of the last chunk.
    fn is_taken(&self) -> bool {
        let is_stalled = self.is_busy && self.last_progress.elapsed() >= self.timeout();
        let is_over = self.ends_at.is_some_and(|at| at <= tokio::time::Instant::now());
        !is_stalled && !is_over && !self.is_failing && self.end.is_none()
    }

    /// After how long without progress a reader is stalled.
    fn timeout(&self) -> Duration {
        if self.ends_at.is_some() { END_TIMEOUT } else { STALLED_READER_TIMEOUT }
    }

    /// Waits for a slow reader until there is room for the events of a batch, at most [`ROOM_TIMEOUT`]. Does not wait
    /// for a stalled reader.
    pub(super) async fn make_room(&mut self) {
        let until = tokio::time::Instant::now() + ROOM_TIMEOUT;
        loop {
            self.flush();
            if !self.is_filling() {
                break;
            }
            match tokio::time::timeout_at(until, self.progress.recv()).await {
                Ok(Some(progress)) => self.apply(progress),
                Ok(None) | Err(_) => break,
            }
        }
    }

    /// Hands over all items while the reader accepts them, then drops the rest: the run ends.
    pub(super) async fn drain(&mut self) {
        let ends_at = *self.ends_at.get_or_insert(tokio::time::Instant::now() + MAX_END);
        loop {
            self.flush();
            if !self.is_busy || !self.is_taken() {
                break;
            }
            let until = ends_at.min(self.last_progress + END_TIMEOUT);
            match tokio::time::timeout_at(until, self.progress.recv()).await {
                Ok(Some(progress)) => self.apply(progress),
                Ok(None) | Err(_) => break,
            }
        }
        if !self.queue.is_empty() && !self.is_gone() {
            self.queue.drop_all();
            self.end = Some(WriterEnd::Stuck);
        }
    }

    /// True if the reader has ended.
    pub(super) fn is_gone(&self) -> bool {
        self.end == Some(WriterEnd::ReaderGone)
    }

    /// True if the run ended while the reader accepted nothing.
    pub(super) fn is_stuck(&self) -> bool {
        self.end == Some(WriterEnd::Stuck)
    }

    /// True if items wait.
    pub(super) fn has_pending(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Number of items that were dropped.
    pub(super) fn lost(&self) -> u64 {
        self.queue.lost()
    }
}

/// Writes a chunk until all of it is written or an error occurs.
fn write(
    chunk: &[u8],
    deliver: &mut impl FnMut(&[u8]) -> io::Result<usize>,
    mut report: impl FnMut(WriteProgress),
) {
    let (mut written, mut reported) = (0, 0);
    while written < chunk.len() {
        match deliver(&chunk[written..]) {
            Ok(count @ 1..) => written += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            failed => {
                let error = failed.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                return report(WriteProgress {
                    written: written - reported,
                    error: Some(error),
                    is_last: true,
                });
            }
        }
        if written - reported >= PIPE_CAPACITY || written == chunk.len() {
            report(WriteProgress {
                written: written - reported,
                error: None,
                is_last: written == chunk.len(),
            });
            reported = written;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A writer with more than a quarter of its queue used. Its reader accepts a part of the pipe for each message.
    fn filling() -> (Writer, mpsc::Sender<()>) {
        let (accept, accepted) = mpsc::channel();
        let mut writer = Writer::start("stdout", move |bytes| {
            let _ = accepted.recv();
            Ok(bytes.len().min(PIPE_CAPACITY))
        })
        .unwrap();
        for _ in 0..=memory::STDOUT_QUEUE_BYTES / 4 / 1_000 {
            writer.push(&[b'x'; 1_000]);
        }
        writer.flush();
        (writer, accept)
    }

    #[tokio::test]
    async fn a_slow_reader_is_waited_for_and_a_stalled_one_is_not() {
        let (mut writer, accept) = filling();
        let begin = tokio::time::Instant::now();
        writer.make_room().await;
        assert!(begin.elapsed() >= ROOM_TIMEOUT, "the end of a run waits for room");
        assert!(writer.is_filling(), "records wait for a reader that is slow for that long");
        tokio::time::sleep(STALLED_READER_TIMEOUT).await;
        assert!(!writer.is_filling(), "records don't wait for ever");
        writer.drain().await;
        assert!(writer.is_stuck() && writer.lost() > 0, "the end of a run counts the rest as lost");
        drop(accept);
    }

    #[tokio::test]
    async fn a_reader_that_accepts_something_again_is_waited_for_again() {
        let (mut writer, accept) = filling();
        tokio::time::sleep(STALLED_READER_TIMEOUT).await;
        assert!(!writer.is_filling());
        accept.send(()).unwrap();
        let progress = writer.progress.recv().await.unwrap();
        writer.apply(progress);
        writer.push(&[b'x'; 2 * CHUNK_BYTES]);
        assert!(writer.is_filling());
        // Everything is accepted from now on.
        drop(accept);
        while writer.is_busy {
            let progress = writer.progress.recv().await.unwrap();
            writer.apply(progress);
        }
        assert!(writer.is_filling(), "records wait before the next chunk too");
        writer.drain().await;
        assert_eq!((writer.has_pending(), writer.lost()), (false, 0));
    }

    #[tokio::test]
    async fn the_end_of_a_run_waits_less_for_a_stalled_reader_and_not_for_ever_for_a_slow_one() {
        let (mut writer, accept) = filling();
        writer.begin_end();
        assert!(writer.is_filling(), "records wait for a reader");
        tokio::time::sleep(END_TIMEOUT).await;
        assert!(!writer.is_filling(), "records wait for a stalled reader");
        accept.send(()).unwrap();
        let progress = writer.progress.recv().await.unwrap();
        writer.apply(progress);
        writer.push(&[b'x'; 2 * PIPE_CAPACITY]);
        assert!(writer.is_filling(), "records don't wait for a slow reader");
        writer.ends_at = Some(tokio::time::Instant::now());
        assert!(!writer.is_filling(), "the end waits for ever");
        writer.drain().await;
        assert!(writer.is_stuck() && writer.lost() > 0);
        drop(accept);
    }
}
