//! Who looks at the daemon from outside: the service manager, whose watchdog wants to be fed, and whoever scrapes the
//! metrics. Both are served by the loop itself, in its turn, so that their silence means that the loop is stuck.

use tokio::{
    sync::mpsc::Receiver,
    time::{Instant, sleep_until},
};

use super::Daemon;
use crate::{
    kernel::attach::{Choice, Method},
    metrics::{Numbers, server::Question},
    service::Manager,
};

/// What the loop has to do with them.
pub struct Outside {
    manager: Option<Manager>,
    questions: Option<Receiver<Question>>,
    feed_at: Option<Instant>,
}

impl Outside {
    /// `None`: nobody there.
    #[must_use]
    pub fn new(manager: Option<Manager>, questions: Option<Receiver<Question>>) -> Self {
        Self { manager, questions, feed_at: None }
    }

    /// The hooks are live, and everybody was told.
    pub(super) fn ready(&mut self, methods: &Choice<()>) {
        if let Some(manager) = &self.manager {
            let names: Vec<_> = methods.live.iter().map(|(method, ())| method.name()).collect();
            manager.ready(&format!("watching by {}", names.join(" and ")));
            // Who reloads it again and again must not starve it.
            self.feed_at = self.feed_at.or(manager.feed_every().map(|pace| Instant::now() + pace));
        }
    }

    /// The log is opened anew; [`Self::ready`] ends it.
    pub(super) fn reloading(&self) {
        if let Some(manager) = &self.manager {
            manager.reloading();
        }
    }

    /// The run ends.
    pub(super) fn stopping(&self) {
        if let Some(manager) = &self.manager {
            manager.stopping();
        }
    }

    /// The next question for our numbers. While it is waited for, the watchdog is fed. Nothing is lost when the wait is
    /// given up.
    pub(super) async fn question(&mut self) -> Question {
        loop {
            let Self { questions, feed_at, manager } = self;
            let asked = async {
                match questions {
                    Some(questions) => questions.recv().await,
                    None => std::future::pending().await,
                }
            };
            let hungry = async {
                match *feed_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = hungry => {
                    if let Some(manager) = manager {
                        manager.feed();
                        *feed_at = manager.feed_every().map(|pace| Instant::now() + pace);
                    }
                }
                question = asked => match question {
                    Some(question) => return question,
                    // The thread that asks is gone, and has said why.
                    None => self.questions = None,
                }
            }
        }
    }
}

impl Daemon {
    /// All that is exported, as it is now. Whatever is to be told to Prometheus is filled in here.
    pub(super) fn numbers(&mut self) -> Numbers {
        self.count();
        let mut ailments = Vec::new();
        if !self.tracer.is_attached() {
            ailments.push("hooks: none is attached");
        }
        if !self.hooks_see() {
            ailments.push("hooks: the last self-test failed");
        }
        if !self.story.out.can_write_log() {
            ailments.push("log: it can't be written");
        }
        let told = |(method, ()): &(Method, ())| (method.hook().name(), method.name());
        Numbers {
            connections: self.story.opened,
            connections_open: self.story.connections.iter().count() as u64,
            refused_self_dials: Some(self.counted.refused),
            ports_at_risk: Some(self.risk.at_risk() as u64),
            self_tests: self
                .self_tests()
                .map_or_else(Vec::new, |counts| vec![("passed", counts.passed), ("failed", counts.failed)]),
            blocked_binds: Some(self.blocked_binds()),
            remedies: self.remedies().map(|(outcome, count)| (outcome.name(), count)).collect(),
            lost: self.losses().plus(self.story.out.lost()),
            transitions_not_examined: self.tracer.not_examined(),
            openers_not_remembered: self.counted.not_remembered,
            log_write_errors: self.story.out.log_write_errors(),
            hooks: self.tracer.methods().live.iter().map(told).collect(),
            ailments,
        }
    }
}
