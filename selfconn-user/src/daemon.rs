//! The daemon: one loop on one thread owns the tracer, the connections and the sinks; nothing is shared, so nothing is
//! locked. What blocks or changes namespace runs on the reader's thread, which owns nothing.

use std::{
    collections::{HashMap, HashSet},
    io,
    time::Duration,
};

use rustix::process::Signal;
use selfconn_ebpf::{ABSENT, Field, Record};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::{Instant, sleep, sleep_until},
};

use crate::{
    blocked::Blocked,
    clock::{self, Offset},
    connection::Connections,
    event::{Losses, Lost, Programs, What},
    kernel::{
        host::Host,
        tracer::{Counters, Tracer},
    },
    memory, metrics,
    process::Processes,
    remedy::Remedy,
    sink::Sinks,
};

pub mod outside;
mod ranges;
mod reader;
mod reading;
mod remedy;
mod risk;
mod started;
mod story;
mod victims;
mod watchdog;

use outside::Outside;
use reader::{Answer, Question, Reader};
use reading::Reading;
use story::Story;
pub use watchdog::Blind;
use watchdog::Guard;

/// So many records are taken before signals get a turn.
const BATCH: usize = 1024;

/// More than any ring buffer of a usual size holds.
const BATCHES: usize = 512;

/// How soon after some activity the programs' counters are looked at, and a refused log is tried again.
const SOON: Duration = Duration::from_secs(1);

/// All that the loop owns.
pub struct Daemon {
    tracer: Tracer,
    reader: Reader,
    risk: risk::Watch,
    outside: Outside,
    story: Story,
    /// How often the socket table is read.
    pace: Duration,
    /// Whether the programs can tell a socket's namespace.
    knows_netns: bool,
    /// Whether the socket table was read in this run.
    has_read: bool,
    counted: Counters,
    told: Losses,
    guard: Guard,
    /// How many methods see nothing any more.
    blind: u64,
}

impl Daemon {
    /// Tells that the hooks are live.
    ///
    /// # Errors
    /// When the reader's thread can't be started.
    pub fn new(
        host: &Host,
        tracer: Tracer,
        outside: Outside,
        mut out: Sinks,
        states: bool,
        pace: Duration,
        remedy: Option<Remedy>,
    ) -> io::Result<Self> {
        out.emit(What::Started(started::started(host, tracer.methods(), tracer.binds())));
        let witnesses = u8::try_from(tracer.methods().live.len()).unwrap_or(u8::MAX);
        Ok(Self {
            tracer,
            reader: Reader::start()?,
            risk: risk::Watch::start()?,
            outside,
            story: Story {
                run: clock::boot_ns(),
                connections: Connections::new(witnesses),
                processes: Processes::new(host.is_initial_pid_ns),
                whos: HashMap::new(),
                states,
                remedy,
                blocked: Blocked::default(),
                out,
                opened: metrics::Connections::default(),
                missed: 0,
            },
            pace,
            knows_netns: host.offsets[Field::NetnsInum as usize] != ABSENT,
            has_read: false,
            counted: Counters::default(),
            told: Losses::default(),
            guard: Guard::new(),
            blind: 0,
        })
    }

    /// Runs until SIGINT or SIGTERM, or until nobody reads stdout any more; or until the hooks are dead.
    ///
    /// # Errors
    /// When signals or the ring buffer can't be waited for.
    pub async fn watch(mut self) -> io::Result<Option<Blind>> {
        let (mut interrupt, mut terminate) =
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
        // Without anything to reopen it keeps its default, which ends the run with its terminal.
        let mut hangup = self.story.out.can_reopen().then(|| signal(SignalKind::hangup())).transpose()?;
        // A limit on the log's size is an error of writing, not the end.
        let _too_large = signal(SignalKind::from_raw(Signal::XFSZ.as_raw()))?;
        let mut is_read = self.story.out.flush().is_ok();
        self.outside.ready(self.tracer.methods());
        let mut has_more = false;
        let mut look_at: Option<Instant> = None;
        // What is there already, now that nothing new can come without being seen.
        let mut read_at: Option<Instant> = None;
        self.read_table();
        let mut blind = None;
        while is_read && blind.is_none() {
            let (remedy_at, watch_at) = (self.remedy_at(), self.watch_at());
            let idle = self.risk.idle();
            tokio::select! {
                biased;
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                () = next(&mut hangup) => {
                    self.outside.reloading();
                    if self.story.out.reopen().is_err() {
                        break;
                    }
                    self.outside.ready(self.tracer.methods());
                }
                // Before the records, whose stream may never end; they come a few times a second.
                question = self.outside.question() => {
                    // Nobody waits any more: then nobody needs it.
                    let _ = question.send(self.numbers());
                }
                () = std::future::ready(()), if has_more => {}
                readable = self.tracer.readable() => readable?,
                // What waits behind it is handed over below.
                () = self.story.out.ready() => {}
                Some(answer) = self.reader.answer() => match answer {
                    Answer::Table(reading) => {
                        self.take_all().await;
                        self.reconcile(&reading);
                        read_at = Some(Instant::now() + self.pace);
                    }
                    Answer::LookedUp(number, found) => self.looked_up(number, found),
                    Answer::Destroyed(number, began_ns, outcome) => self.destroyed(number, began_ns, outcome),
                },
                () = sleep_until(remedy_at.unwrap_or_else(Instant::now)), if remedy_at.is_some() => {}
                Some(answer) = self.risk.answer() => self.judge_risks(&answer),
                () = sleep(idle.unwrap_or_default()), if idle.is_some() => {}
                () = sleep_until(watch_at.unwrap_or_else(Instant::now)), if watch_at.is_some() => {}
                () = sleep_until(read_at.unwrap_or_else(Instant::now)), if read_at.is_some() => {
                    read_at = None;
                    self.read_table();
                }
                () = sleep_until(look_at.unwrap_or_else(Instant::now)), if look_at.is_some() => {
                    self.tell_losses();
                    look_at = self.story.out.behind().any().then(|| Instant::now() + SOON);
                }
            }
            let taken = self.take();
            has_more = taken == BATCH;
            self.look_at_risks();
            if !has_more {
                self.remedy();
            }
            blind = self.watch_hooks();
            is_read = self.story.out.make_room().await.is_ok();
            if taken > 0 && look_at.is_none() {
                look_at = Some(Instant::now() + SOON);
            }
        }
        self.outside.stopping();
        self.end_remedy().await;
        // What happened before the signal is told; what happens from here on isn't seen.
        self.tracer.detach();
        let programs = self.take_the_rest().await;
        let (losses, open) = (self.losses(), self.story.connections.iter().count());
        self.story.out.stop(losses, open as u64, programs).await;
        Ok(blind)
    }

    /// Takes what is left in the ring buffer when the programs are off their hooks. One may still be running on another
    /// CPU: what it counts as matched is waited for, as long as any program can take.
    async fn take_the_rest(&mut self) -> Programs {
        let until = Instant::now() + Duration::from_millis(100);
        loop {
            self.take_all().await;
            self.tell_losses();
            let Counters { matched, ring_full, not_remembered, .. } = self.counted;
            let delivered = self.tracer.delivered();
            if matched == delivered + ring_full || Instant::now() > until {
                return Programs {
                    matched,
                    delivered,
                    not_examined: self.tracer.not_examined(),
                    not_remembered,
                };
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Takes all that has happened so far, and what comes meanwhile, within bounds: a flood would never end. Not only until
    /// a batch isn't full, for a record that is still being written holds up those behind it.
    async fn take_all(&mut self) {
        let until = Instant::now() + Duration::from_millis(100);
        for _ in 0..BATCHES {
            if self.take() == 0 {
                self.count();
                let Counters { matched, ring_full, .. } = self.counted;
                if matched <= self.tracer.delivered() + ring_full || Instant::now() > until {
                    break;
                }
                sleep(Duration::from_millis(1)).await;
            }
            // Whether anybody reads is seen to at the next flush.
            let _ = self.story.out.make_room().await;
        }
    }

    /// Takes a batch of transitions; says how many.
    fn take(&mut self) -> usize {
        let clock = Offset::now();
        let Self { tracer, story, risk, guard, .. } = self;
        tracer.drain(BATCH, |record| match record {
            Record::Transition(transition) if guard.takes(transition) => {}
            Record::Transition(transition) => story.apply(transition, clock),
            Record::Dialled(target) => risk.heed(*target),
            Record::FailedBind(failed) => story.blame(failed, clock),
        })
    }

    /// Looks at the ports that are dialled often, if it is time to.
    fn look_at_risks(&mut self) {
        if self.risk.idle().is_some_and(|idle| idle.is_zero()) {
            let Self { tracer, story: Story { processes, out, .. }, risk, .. } = self;
            risk.look(tracer.refusals(), risk::Teller { processes, out });
        }
    }

    /// Takes in the ranges of the namespaces that were asked about.
    fn judge_risks(&mut self, answer: &ranges::Answer) {
        let Self { tracer, story: Story { processes, out, connections, .. }, risk, .. } = self;
        let is_taken = |place: &_| connections.iter().any(|connection| connection.place() == *place);
        risk.judge(answer, tracer.refusals(), is_taken, risk::Teller { processes, out });
    }

    /// Asks for the socket table.
    fn read_table(&mut self) {
        self.story.connections.begin_reading();
        let near = if self.story.processes.can_look_up() { self.openers() } else { Vec::new() };
        self.reader.ask(Question::Table(near));
    }

    /// The threads that the programs remember as openers. One may be in a namespace that no process is in.
    fn openers(&self) -> Vec<u32> {
        let remembered = self.tracer.remembered().unwrap_or_default();
        let threads: HashSet<u32> = remembered.iter().map(|(_, dial)| dial.opener.task.tid).collect();
        threads.into_iter().collect()
    }

    /// Compares with the socket table. Everything that happened before the table was read must be known by now.
    fn reconcile(&mut self, reading: &Reading) {
        let remembered = self.tracer.remembered().unwrap_or_else(|error| {
            log::error!("the table of dials can't be read: {error:#}");
            Vec::new()
        });
        let listed = reading.listed(&remembered, self.knows_netns);
        let missed = self.story.reconcile(reading, &listed, self.knows_netns);
        // What was there before us was not missed.
        if self.has_read {
            self.story.missed += missed;
        }
        self.has_read = true;
        self.story.remember_time_wait(reading, &listed);
        for sock in reading.stale(&remembered) {
            self.tracer.forget(sock);
        }
        self.risk.sweep(self.tracer.refusals());
        self.story.blocked.sweep(reading.began_ns());
        self.tell_losses();
        // A burst since the last reading is over, more often than not.
        memory::give_back();
        log::debug!("read the socket table: {} self-connections, {missed} of them new", listed.len());
    }

    /// Looks at the programs' counters, and tells what was lost since the last time.
    fn tell_losses(&mut self) {
        self.count();
        let now = self.losses().plus(self.story.out.lost());
        let behind = self.story.out.behind();
        for (place, is_behind, now, told) in [
            ("ring", false, now.ring, &mut self.told.ring),
            ("missed", false, now.missed, &mut self.told.missed),
            ("log", behind.log, now.log, &mut self.told.log),
            ("stdout", behind.stdout, now.stdout, &mut self.told.stdout),
            ("journal", behind.journal, now.journal, &mut self.told.journal),
            ("dials", false, now.dials, &mut self.told.dials),
        ] {
            // What a place refused is told once it takes events again; else the telling would be lost, too.
            if now > *told && !is_behind {
                self.story.out.emit(What::Lost(Lost { r#where: place, count: now - *told, method: None }));
                *told = now;
            }
        }
    }

    fn count(&mut self) {
        match self.tracer.counters() {
            Ok(counters) => self.counted = counters,
            Err(error) => log::error!("the programs' counters can't be read: {error:#}"),
        }
    }

    /// What never became an event.
    fn losses(&self) -> Losses {
        Losses {
            ring: self.counted.ring_full,
            missed: self.story.missed,
            dials: self.counted.not_tallied,
            hooks: self.blind,
            ..Losses::default()
        }
    }
}

/// The next of a signal that may not be waited for.
async fn next(signal: &mut Option<tokio::signal::unix::Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}
