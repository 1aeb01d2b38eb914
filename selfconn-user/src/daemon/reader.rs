//! The thread that does what blocks, walks /proc or changes its network namespace, so that the daemon's loop doesn't. It
//! owns nothing; it is asked, and answers by a message.

use std::{io, sync::mpsc, thread};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::reading::{Reading, read};
use crate::{
    clock, privileges,
    remedy::Asked,
    sockets::{self, Cookie},
};

/// What it can be asked.
pub(super) enum Question {
    /// What the socket table has, also in the namespaces of these threads. One at a time.
    Table(Vec<u32>),
    /// Which socket is at a place.
    LookUp(Asked),
    /// To destroy it.
    Destroy(Asked, Cookie),
}

/// What it says.
pub(super) enum Answer {
    Table(Reading),
    /// The number of the connection.
    LookedUp(u64, Result<Option<Cookie>, String>),
    /// And when it was begun: `CLOCK_BOOTTIME`, nanoseconds.
    Destroyed(u64, u64, Result<bool, String>),
}

/// Asks and hears the thread.
pub(super) struct Reader {
    questions: mpsc::Sender<Question>,
    answers: UnboundedReceiver<Answer>,
}

impl Reader {
    pub(super) fn start() -> io::Result<Self> {
        let (questions, asked) = mpsc::channel();
        let (answer, answers) = unbounded_channel();
        thread::Builder::new().name("reader".to_owned()).spawn(move || {
            if let Err(error) = privileges::keep(privileges::READER) {
                log::error!("the thread that reads the socket table keeps too many privileges: {error}");
            }
            // Ends when the daemon hangs up.
            while let Ok(question) = asked.recv()
                && answer.send(find_out(question)).is_ok()
            {}
        })?;
        Ok(Self { questions, answers })
    }

    /// Asks. The answers come in the order of the questions.
    pub(super) fn ask(&self, question: Question) {
        if self.questions.send(question).is_err() {
            log::error!("the thread that reads the socket table is gone");
        }
    }

    /// The next answer.
    pub(super) async fn answer(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }
}

fn find_out(question: Question) -> Answer {
    match question {
        Question::Table(near) => Answer::Table(read(&near)),
        Question::LookUp(Asked { number, target, near }) => {
            Answer::LookedUp(number, sockets::look_up(&target, &near))
        }
        Question::Destroy(Asked { number, target, near }, cookie) => {
            let began_ns = clock::boot_ns();
            Answer::Destroyed(number, began_ns, sockets::destroy(&target, cookie, &near))
        }
    }
}
