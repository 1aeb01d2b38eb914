//! The socket table's say: what it lists and the hooks missed is opened, what it no longer lists is closed. Pure, too.
//!
//! A table is no snapshot: it is read in pieces, and a socket may be passed over when others of its bucket go between
//! two of them. One reading that has it proves that it is there; that it is gone, only two that don't.

use std::{
    collections::{HashMap, HashSet},
    net::{IpAddr, Ipv6Addr},
};

use selfconn_ebpf::{Opener, Transition, state};

use super::{Connection, Connections, End, Happening, Life, Source, close, rank};

/// What a self-connection is known by in the socket table: its namespace, its address and its port. No two live
/// sockets have the same. Namespace 0: unknown.
pub type Place = (u32, IpAddr, u16);

/// A self-connection in the socket table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Inode of the network namespace.
    pub netns: u32,
    /// As in [`Connection`].
    pub addr: IpAddr,
    /// As in [`Connection`].
    pub port: u16,
    /// As in [`Connection`].
    pub is_ipv6: bool,
    /// As in [`Connection`].
    pub ifindex: Option<u32>,
    /// As in [`Connection`].
    pub cookie: Option<u64>,
    /// As in [`Connection`].
    pub uid: Option<u32>,
    /// One of [`state`].
    pub state: u8,
    /// Its kernel address and who dialled, where the programs remember that.
    pub dial: Option<(u64, Opener)>,
}

impl Listed {
    /// What is known of it, under this number.
    #[must_use]
    pub fn connection(&self, number: u64) -> Connection {
        Connection {
            number,
            source: Source::Scan,
            cookie: self.cookie,
            addr: self.addr,
            port: self.port,
            is_ipv6: self.is_ipv6,
            netns: (self.netns != 0).then_some(self.netns),
            ifindex: self.ifindex,
            uid: self.uid,
            opener: self.dial.map(|(_, opener)| opener),
            isns: None,
            closer: None,
            established_ns: None,
        }
    }

    /// ESTABLISHED or later. A dial is no self-connection yet, and TIME_WAIT none any more.
    fn is_open(&self) -> bool {
        rank(self.state) >= rank(state::ESTABLISHED) && self.state != state::TIME_WAIT
    }
}

impl Connections {
    /// To be called before the socket table is read: from now on, what ends is noted, so that a reading which has it
    /// still doesn't open it again.
    pub fn begin_reading(&mut self) {
        self.ended_since = Some(HashSet::new());
    }

    /// Compares with what the socket table had, when every transition until then is applied. `began_ns` is when reading
    /// began (`CLOCK_BOOTTIME`), and `has_read` says of a namespace whether it was among what was read.
    ///
    /// Gives the number of self-connections that the hooks missed, that is of those opened here.
    pub fn reconcile(
        &mut self,
        listed: &[Listed],
        began_ns: u64,
        has_read: impl Fn(u32) -> bool,
        mut each: impl FnMut(Happening<'_>),
    ) -> u64 {
        let ended_since = self.ended_since.take().unwrap_or_default();
        let known: HashMap<Place, u64> = self
            .lives
            .iter()
            .filter(|(_, life)| life.ended_ns.is_none())
            .map(|(key, life)| (life.connection.place(), *key))
            .collect();
        let mut seen = HashSet::new();
        let mut missed = 0;
        for listed in listed.iter().filter(|listed| listed.is_open()) {
            let place = (listed.netns, listed.addr, listed.port);
            seen.insert(place);
            if let Some(life) = known.get(&place).and_then(|key| self.lives.get_mut(key)) {
                life.connection.cookie = life.connection.cookie.or(listed.cookie);
                // Known by its dial, but the hooks missed that it came to something.
                if !life.is_announced && life.heard_ns < began_ns {
                    life.is_announced = true;
                    missed += 1;
                    each(Happening::Established(&life.connection));
                }
            } else if !ended_since.contains(&place) {
                missed += 1;
                self.numbered += 1;
                let life = Life::found(self.numbered, listed, began_ns);
                each(Happening::Established(&life.connection));
                let key = listed.dial.map_or(self.numbered, |(sock, _)| sock);
                if listed.dial.is_none() {
                    self.unaddressed.insert(place, key);
                }
                self.lives.insert(key, life);
            }
        }
        let mut vanished = Vec::new();
        for (key, life) in self.lives.iter_mut().filter(|(_, life)| life.ended_ns.is_none()) {
            let place = life.connection.place();
            let is_absent = life.heard_ns < began_ns && has_read(place.0) && !seen.contains(&place);
            if is_absent && life.is_absent {
                vanished.push(*key);
            }
            life.is_absent = is_absent;
        }
        for life in vanished.into_iter().filter_map(|key| self.lives.remove(&key)) {
            self.unaddressed.remove(&life.connection.place());
            if life.is_announced {
                close(&mut None, &life.connection, End::default(), &mut each);
            }
        }
        missed
    }

    /// Finds the life of a socket that was known by its place only, now that its kernel address is heard.
    pub(super) fn address(&mut self, t: &Transition) {
        if self.unaddressed.is_empty() {
            return;
        }
        let place = (t.netns, Ipv6Addr::from(t.addr).to_canonical(), t.port);
        if let Some(key) = self.unaddressed.remove(&place)
            && let Some(life) = self.lives.remove(&key)
        {
            self.lives.insert(t.sock, life);
        }
    }
}

impl Life {
    /// One that was found in the socket table, read at `at_ns`.
    fn found(number: u64, listed: &Listed, at_ns: u64) -> Self {
        Self {
            connection: listed.connection(number),
            last: (listed.state, listed.state),
            seen_by: u8::MAX,
            heard_ns: at_ns,
            is_announced: true,
            is_absent: false,
            ended_ns: None,
        }
    }
}
