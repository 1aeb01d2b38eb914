//! The thread that reads what a network namespace may choose ports from. The reader of the socket table can be busy for
//! longer than a port at risk may go untold, so this is a thread of its own. It owns nothing, too.

use std::{collections::HashMap, io, sync::mpsc, thread};

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::{ports::LocalPorts, privileges, sockets, sysctl};

/// What each namespace may choose from, or why that is unknown.
pub(super) type Answer = HashMap<u32, Result<LocalPorts, String>>;

/// Namespaces, each with a process that may be in it.
type Question = HashMap<u32, u32>;

/// Asks and hears the thread.
pub(super) struct Ranges {
    questions: mpsc::Sender<Question>,
    answers: UnboundedReceiver<Answer>,
}

impl Ranges {
    pub(super) fn start() -> io::Result<Self> {
        let (questions, asked) = mpsc::channel::<Question>();
        let (answer, answers) = unbounded_channel();
        thread::Builder::new().name("ranges".to_owned()).spawn(move || {
            if let Err(error) = privileges::keep(privileges::RANGES) {
                log::error!("the thread that reads port ranges keeps too many privileges: {error}");
            }
            // Ends when the daemon hangs up.
            while let Ok(question) = asked.recv() {
                if answer.send(question.into_iter().map(read).collect()).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { questions, answers })
    }

    pub(super) fn ask(&self, question: Question) {
        if self.questions.send(question).is_err() {
            log::error!("the thread that reads port ranges is gone");
        }
    }

    pub(super) async fn answer(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }
}

fn read((netns, near): (u32, u32)) -> (u32, Result<LocalPorts, String>) {
    let ports = || sysctl::local_ports().map_err(|error| io::Error::other(format!("{error:#}")));
    (netns, sockets::within(netns, &[near], ports).map_err(|error| error.to_string()))
}
