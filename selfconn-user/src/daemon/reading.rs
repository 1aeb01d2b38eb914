//! A reading of the socket table: what it lists, of every namespace, and who has it open.

use std::{
    collections::{HashMap, HashSet},
    net::Ipv6Addr,
    time::Duration,
};

use selfconn_ebpf::Dial;

use crate::{
    connection::{Connection, Listed, Place},
    process::Holder,
    sockets::{self, Survey},
};

/// The socket table of every namespace, and who has the self-connections in it open.
pub(super) struct Reading {
    survey: Survey,
    holders: HashMap<Place, Vec<Holder>>,
}

/// Reads; it takes a while. `near` are threads that may be alone in a namespace.
pub(super) fn read(near: &[u32]) -> Reading {
    let options = sockets::Options { dials: true, ..Default::default() };
    let survey = sockets::survey(options, near).unwrap_or_else(|error| {
        // Nothing was read, and so nothing is taken for gone.
        log::error!("the socket table can't be read: {error}");
        Survey::default()
    });
    for why in &survey.unseen {
        log::info!("the socket table can't be read everywhere: {why}");
    }
    let inodes: HashSet<u64> =
        survey.found.iter().map(|found| found.inode).filter(|inode| *inode != 0).collect();
    // The walk over every process's descriptors is for the rare host that has a self-connection.
    let by_inode = if inodes.is_empty() {
        HashMap::new()
    } else {
        sockets::holders(&inodes, sockets::Search::Complete).of
    };
    let of = |found: &sockets::Found| {
        by_inode.get(&found.inode).map(|holders| ((found.netns, found.addr, found.port), holders.clone()))
    };
    Reading { holders: survey.found.iter().filter_map(of).collect(), survey }
}

impl Reading {
    /// When the reading began: `CLOCK_BOOTTIME`, nanoseconds.
    pub(super) fn began_ns(&self) -> u64 {
        self.survey.began_ns
    }

    /// Whether this namespace was read.
    pub(super) fn has_read(&self, netns: u32) -> bool {
        self.survey.namespaces.contains(&netns)
    }

    /// Who has a self-connection open. `None`: nobody that could be found.
    pub(super) fn holders(&self, connection: &Connection) -> Option<Vec<Holder>> {
        let place = connection.place();
        let holders = match place {
            // Without BTF the programs can't tell the namespace.
            (0, addr, port) => self.holders.iter().find(|((_, a, p), _)| (*a, *p) == (addr, port))?.1,
            _ => self.holders.get(&place)?,
        };
        Some(holders.clone())
    }

    /// What was found, with what the programs remember of it.
    pub(super) fn listed(&self, remembered: &[(u64, Dial)], knows_netns: bool) -> Vec<Listed> {
        let dials: HashMap<Place, (u64, &Dial)> =
            remembered.iter().map(|(sock, dial)| (place(dial), (*sock, dial))).collect();
        let listed = |found: &sockets::Found| {
            let netns = if knows_netns { found.netns } else { 0 };
            let dial = dials.get(&(netns, found.addr, found.port)).map(|(sock, dial)| (*sock, dial.opener));
            Listed {
                netns,
                addr: found.addr,
                port: found.port,
                is_ipv6: found.is_ipv6,
                ifindex: found.ifindex,
                cookie: found.cookie,
                uid: found.uid,
                state: found.state,
                dial,
            }
        };
        self.survey.found.iter().map(listed).collect()
    }

    /// Those of `listed` that are in TIME_WAIT, and for how long.
    pub(super) fn time_waits<'a>(
        &'a self,
        listed: &'a [Listed],
    ) -> impl Iterator<Item = (&'a Listed, Duration)> {
        // `listed` is made of what was found, in this order.
        listed
            .iter()
            .zip(&self.survey.found)
            .filter_map(|(listed, found)| Some((listed, found.time_wait_left?)))
    }

    /// Dials that are remembered, and whose socket the table no longer has: older than the reading, in a namespace that
    /// was read, and neither a self-connection nor on their way.
    pub(super) fn stale(&self, remembered: &[(u64, Dial)]) -> Vec<u64> {
        let alive: HashSet<Place> = self
            .survey
            .found
            .iter()
            .map(|found| (found.netns, found.addr, found.port))
            .chain(self.survey.dials.iter().map(|dial| (dial.netns, dial.addr, dial.dport)))
            .collect();
        let is_stale = |dial: &Dial| {
            dial.opener.at_ns < self.survey.began_ns
                && self.has_read(dial.tuple.netns)
                && !alive.contains(&place(dial))
        };
        remembered.iter().filter(|(_, dial)| is_stale(dial)).map(|(sock, _)| *sock).collect()
    }
}

fn place(dial: &Dial) -> Place {
    let mut octets = [0; 16];
    for (to, word) in octets.chunks_exact_mut(4).zip(dial.tuple.addr) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    (dial.tuple.netns, Ipv6Addr::from(octets).to_canonical(), dial.tuple.dport)
}
