//! Whose self-connection keeps a server from binding its port, and when that is told. Pure: what failed, what is open and
//! what has ended go in, what is to be told comes out.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv6Addr},
};

use selfconn_ebpf::{COMM_LEN, bind::FailedBind};

use crate::{
    connection::{Connection, Place},
    process::Who,
};

const SECOND_NS: u64 = 1_000_000_000;

/// A server that tries again is told again after this, then after twice as long, and so on.
const AGAIN_NS: u64 = 10 * SECOND_NS;

/// At the latest after this.
const LATEST_NS: u64 = 3_600 * SECOND_NS;

/// How many TIME_WAITs and victims are remembered. The kernel's own TIME_WAITs are bounded, too.
const LIMIT: usize = 4_096;

/// A self-connection in TIME_WAIT.
#[derive(Clone, Debug)]
pub struct Leftover {
    /// What it was. Its number is 0 if it ended before the run.
    pub connection: Connection,
    /// Who was behind it.
    pub who: Who,
    /// When TIME_WAIT ends: `CLOCK_BOOTTIME`, nanoseconds.
    pub until_ns: u64,
}

/// Who has the port.
#[derive(Clone, Copy, Debug)]
pub enum Holder<'a> {
    /// A self-connection that is open.
    Open(&'a Connection),
    /// What is left of one.
    TimeWait(&'a Leftover),
}

/// Failed binds, and what may be to blame.
#[derive(Debug, Default)]
pub struct Blocked {
    /// Boxed, so that the table's own size is next to nothing of what they take.
    leftovers: HashMap<Place, Box<Leftover>>,
    /// When those that are over were last let go.
    swept_ns: u64,
    victims: HashMap<Victim, Told>,
    failures: u64,
}

/// Who wants which port, and which self-connection has it. Not by pid: a server that is started again has another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Victim {
    netns: u32,
    addr: IpAddr,
    port: u16,
    name: [u8; COMM_LEN],
    holder: u64,
}

#[derive(Debug)]
struct Told {
    failures: u64,
    last_ns: u64,
    /// When it may be told again, and how long after that.
    next_ns: u64,
    pause_ns: u64,
}

impl Holder<'_> {
    /// The self-connection.
    #[must_use]
    pub fn connection(&self) -> &Connection {
        match self {
            Self::Open(connection) => connection,
            Self::TimeWait(leftover) => &leftover.connection,
        }
    }
}

/// The address that was wanted; an unspecified one is any.
#[must_use]
pub fn wanted_addr(failed: &FailedBind) -> IpAddr {
    let mut octets = [0; 16];
    for (to, word) in octets.chunks_exact_mut(4).zip(failed.addr) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ipv6Addr::from(octets).to_canonical()
}

/// Whether a socket at one place keeps another from binding this address and port.
fn is_in_the_way(place: &Place, netns: u32, wanted: IpAddr, port: u16) -> bool {
    let is_wanted = match wanted {
        // A socket of IPv6 takes the port of IPv4, too, unless it asks for less.
        IpAddr::V6(any) if any.is_unspecified() => true,
        IpAddr::V4(any) if any.is_unspecified() => place.1.is_ipv4(),
        one => one == place.1,
    };
    place.0 == netns && place.2 == port && is_wanted
}

impl Blocked {
    /// A self-connection ended and left TIME_WAIT behind.
    pub fn left(&mut self, leftover: Leftover, now_ns: u64) {
        // Seldom, for all are looked at.
        if now_ns.saturating_sub(self.swept_ns) >= SECOND_NS {
            self.sweep(now_ns);
        }
        if self.leftovers.len() < LIMIT {
            self.leftovers.insert(leftover.connection.place(), Box::new(leftover));
        }
    }

    /// Lets go what is not in TIME_WAIT any more.
    pub fn sweep(&mut self, now_ns: u64) {
        self.leftovers.retain(|_, leftover| leftover.until_ns > now_ns);
        self.swept_ns = now_ns;
    }

    /// One in TIME_WAIT was found in the socket table.
    pub fn found(&mut self, leftover: Leftover, now_ns: u64) {
        let known = self.leftovers.get(&leftover.connection.place());
        if known.is_none_or(|known| known.until_ns < now_ns) {
            self.left(leftover, now_ns);
        }
    }

    /// How many binds failed for a self-connection.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.failures
    }

    /// Which self-connection has what was wanted. `None`: none that is known; something else has it.
    pub fn holder<'a>(
        &'a self,
        failed: &FailedBind,
        mut open: impl Iterator<Item = &'a Connection>,
    ) -> Option<Holder<'a>> {
        let wanted = wanted_addr(failed);
        let is_it = |place: &Place| is_in_the_way(place, failed.netns, wanted, failed.port);
        if let Some(connection) = open.find(|connection| is_it(&connection.place())) {
            return Some(Holder::Open(connection));
        }
        let is_there = |leftover: &&Leftover| leftover.until_ns > failed.at_ns;
        // The one that goes last.
        let leftovers =
            self.leftovers.iter().filter(|(place, _)| is_it(place)).map(|(_, leftover)| &**leftover);
        leftovers.filter(is_there).max_by_key(|leftover| leftover.until_ns).map(Holder::TimeWait)
    }

    /// Takes in a bind that failed for this self-connection; if it is to be told, how often the same server has failed
    /// for it by now.
    pub fn count(&mut self, failed: &FailedBind, holder: u64) -> Option<u64> {
        let (now_ns, failures) = (failed.at_ns, u64::from(failed.failures));
        self.failures += failures;
        if self.victims.len() >= LIMIT {
            self.victims.retain(|_, told| now_ns.saturating_sub(told.last_ns) < told.pause_ns);
        }
        if self.victims.len() >= LIMIT {
            self.victims.clear();
        }
        let name = if failed.task.leader[0] == 0 { failed.task.comm } else { failed.task.leader };
        let (netns, port) = (failed.netns, failed.port);
        let victim = Victim { netns, addr: wanted_addr(failed), port, name, holder };
        let told = self.victims.entry(victim).or_insert(Told {
            failures: 0,
            last_ns: 0,
            next_ns: 0,
            pause_ns: AGAIN_NS,
        });
        told.failures += failures;
        told.last_ns = now_ns;
        if now_ns < told.next_ns {
            return None;
        }
        told.next_ns = now_ns.saturating_add(told.pause_ns);
        told.pause_ns = (told.pause_ns * 2).min(LATEST_NS);
        Some(told.failures)
    }
}

#[cfg(test)]
mod tests {
    use selfconn_ebpf::Task;

    use super::*;
    use crate::connection::Source;

    fn connection(number: u64, addr: &str, port: u16) -> Connection {
        Connection {
            number,
            source: Source::Live,
            cookie: None,
            addr: addr.parse().unwrap(),
            port,
            is_ipv6: false,
            netns: Some(7),
            ifindex: None,
            uid: None,
            opener: None,
            isns: None,
            closer: None,
            established_ns: None,
        }
    }

    fn failed(addr: &str, port: u16, at_s: u64) -> FailedBind {
        let octets = match addr.parse().unwrap() {
            IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
            IpAddr::V6(addr) => addr.octets(),
        };
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes(bytes.try_into().unwrap());
        }
        let mut task = Task::UNKNOWN;
        task.leader[..5].copy_from_slice(b"nginx");
        FailedBind {
            at_ns: at_s * SECOND_NS,
            start_ns: 0,
            addr: words,
            netns: 7,
            port,
            family: 2,
            task,
            failures: 1,
            uid: 0,
        }
    }

    fn leftover(number: u64, addr: &str, port: u16, until_s: u64) -> Leftover {
        let connection = connection(number, addr, port);
        Leftover { connection, who: Who::default(), until_ns: until_s * SECOND_NS }
    }

    fn number(holder: Option<Holder<'_>>) -> Option<u64> {
        holder.map(|holder| holder.connection().number)
    }

    #[test]
    fn an_address_is_held_by_itself_and_by_what_is_in_it() {
        let open = [connection(1, "127.0.0.1", 80), connection(2, "::1", 80), connection(3, "10.0.0.1", 81)];
        for (wanted, port, holder) in [
            ("127.0.0.1", 80, Some(1)),
            ("127.0.0.2", 80, None),
            ("127.0.0.1", 81, None),
            ("0.0.0.0", 80, Some(1)),
            ("0.0.0.0", 81, Some(3)),
            ("0.0.0.0", 82, None),
            ("::1", 80, Some(2)),
            ("::", 80, Some(1)),
            ("::", 81, Some(3)),
            ("::ffff:10.0.0.1", 81, Some(3)),
        ] {
            let blocked = Blocked::default();
            let got = number(blocked.holder(&failed(wanted, port, 0), open.iter()));
            assert_eq!(got, holder, "{wanted}:{port}");
        }
        let elsewhere = FailedBind { netns: 8, ..failed("127.0.0.1", 80, 0) };
        assert!(Blocked::default().holder(&elsewhere, open.iter()).is_none());
        let v6 = [connection(2, "::1", 80)];
        assert!(Blocked::default().holder(&failed("0.0.0.0", 80, 0), v6.iter()).is_none());
    }

    #[test]
    fn time_wait_holds_until_it_ends() {
        let mut blocked = Blocked::default();
        blocked.left(leftover(1, "127.0.0.1", 80, 60), 0);
        blocked.left(leftover(2, "127.0.0.2", 80, 70), 0);
        for (wanted, at_s, holder) in [
            ("127.0.0.1", 59, Some(1)),
            ("127.0.0.1", 60, None),
            ("0.0.0.0", 59, Some(2)),
            ("0.0.0.0", 69, Some(2)),
            ("0.0.0.0", 70, None),
        ] {
            let got = number(blocked.holder(&failed(wanted, 80, at_s), std::iter::empty()));
            assert_eq!(got, holder, "{wanted} at {at_s}");
        }
        // The next life of the same place.
        let open = [connection(3, "127.0.0.1", 80)];
        assert_eq!(number(blocked.holder(&failed("127.0.0.1", 80, 59), open.iter())), Some(3));
        // What the table has is no news.
        blocked.found(leftover(0, "127.0.0.1", 80, 61), 59 * SECOND_NS);
        assert_eq!(number(blocked.holder(&failed("127.0.0.1", 80, 59), std::iter::empty())), Some(1));
        blocked.found(leftover(0, "127.0.0.1", 80, 90), 61 * SECOND_NS);
        assert_eq!(number(blocked.holder(&failed("127.0.0.1", 80, 62), std::iter::empty())), Some(0));
    }

    #[test]
    fn a_server_that_retries_is_told_at_growing_intervals_and_its_failures_are_counted() {
        let mut blocked = Blocked::default();
        let told: Vec<_> = (0..200)
            .filter_map(|at_s| Some((at_s, blocked.count(&failed("127.0.0.1", 80, at_s), 1)?)))
            .collect();
        assert_eq!(told, [(0, 1), (10, 11), (30, 31), (70, 71), (150, 151)]);
        // Another port, another name, another self-connection.
        let again = failed("127.0.0.1", 80, 200);
        assert_eq!(blocked.count(&failed("127.0.0.1", 81, 200), 1), Some(1));
        assert_eq!(blocked.count(&again, 2), Some(1));
        let mut other = again;
        other.task.leader[0] = b'N';
        assert_eq!(blocked.count(&other, 1), Some(1));
        // What the programs kept back counts, too.
        let burst = FailedBind { failures: 40, ..failed("127.0.0.1", 82, 200) };
        assert_eq!(blocked.count(&burst, 1), Some(40));
        assert_eq!(blocked.failures(), 243);
    }

    #[test]
    fn what_is_over_is_let_go_long_before_there_is_no_room() {
        let mut blocked = Blocked::default();
        for second in 0..600_u64 {
            let port = u16::try_from(second).unwrap() + 1;
            blocked.left(leftover(second, "127.0.0.1", port, second + 60), second * SECOND_NS);
            assert!(blocked.leftovers.len() <= 60, "{} after {second} s", blocked.leftovers.len());
        }
        blocked.sweep(700 * SECOND_NS);
        assert!(blocked.leftovers.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut blocked = Blocked::default();
        for port in 1..=u16::try_from(LIMIT).unwrap() + 9 {
            blocked.left(leftover(1, "127.0.0.1", port, 60), 0);
            blocked.count(&failed("127.0.0.1", port, 0), 1);
        }
        assert!(blocked.leftovers.len() <= LIMIT && blocked.victims.len() <= LIMIT);
        blocked.left(leftover(2, "127.0.0.1", 9_999, 120), 61 * SECOND_NS);
        assert_eq!(blocked.leftovers.len(), 1, "those that are over make room");
    }
}
