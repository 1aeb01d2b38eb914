//! The ports that wait for a look into their network namespace. Any user can connect to another's port, and be the
//! first there whose connect is refused. So a port waits for a turn of each owner that is known to connect to it, and
//! the first of these turns serves it. Pure.

use std::collections::HashMap;

use selfconn_ebpf::{Endpoint, Owner};

use crate::{
    budget::{FairQueue, SharedLimit, is_share_taken},
    sockets::NetnsId,
};

/// Maximum number of ports of one owner, in one namespace, that one turn serves.
const MAX_TOGETHER: usize = 8;

/// Maximum number of owners of which a port waits for a turn. A user with many sessions takes all but one of them, and
/// the users of a control group take two.
const MAX_OWNERS: usize = 4;

/// Maximum number of turns of owners beside the first one of each port, which these owners share.
const MAX_OTHER_TURNS: usize = 1_024;

#[derive(Debug)]
pub(super) struct WaitingPorts {
    /// Ports of one namespace each.
    turns: FairQueue<Vec<Endpoint>>,
    /// The owners of which each port waits for a turn. The first one has its entry in the programs' table.
    owners: HashMap<Endpoint, Vec<Owner>>,
    other_turns: SharedLimit,
}

impl Default for WaitingPorts {
    fn default() -> Self {
        let other_turns = SharedLimit::new(MAX_OTHER_TURNS);
        Self { turns: FairQueue::default(), owners: HashMap::new(), other_turns }
    }
}

impl WaitingPorts {
    pub(super) fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// All ports, each once.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Endpoint> {
        self.owners.keys()
    }

    /// Each of these ports waits for a turn of this owner, too. If it waits already, that is not repeated.
    pub(super) fn push(&mut self, ports: impl IntoIterator<Item = (Endpoint, Owner)>) {
        let mut turns: Vec<(Owner, Vec<Endpoint>)> = Vec::new();
        // The last turn of each owner in each namespace.
        let mut last: HashMap<(Owner, NetnsId), usize> = HashMap::new();
        for (destination, owner) in ports {
            if !self.add_owner(destination, owner) {
                continue;
            }
            let at = last.entry((owner, NetnsId::from(&destination))).or_insert(turns.len());
            if turns.get(*at).is_some_and(|(_, of_turn)| of_turn.len() == MAX_TOGETHER) {
                *at = turns.len();
            }
            match turns.get_mut(*at) {
                Some((_, of_turn)) => of_turn.push(destination),
                None => turns.push((owner, Vec::from([destination]))),
            }
        }
        for (owner, of_turn) in turns {
            self.turns.push(owner, of_turn);
        }
    }

    /// False: the port waits for a turn of this owner already, or there is no room for one more.
    fn add_owner(&mut self, destination: Endpoint, owner: Owner) -> bool {
        let owners = self.owners.entry(destination).or_default();
        let free = MAX_OWNERS - owners.len();
        let has_room = owners.is_empty()
            || free > 0 && !is_share_taken(owners.iter(), owner, free) && self.other_turns.try_take(owner, 1);
        if has_room {
            owners.push(owner);
        }
        has_room
    }

    /// The ports of the next turn, all in one namespace. They wait for no other turn then.
    pub(super) fn pop(&mut self) -> Option<Vec<Endpoint>> {
        let (_, of_turn) = self.turns.pop()?;
        let mut waits_elsewhere = false;
        for owners in of_turn.iter().filter_map(|destination| self.owners.remove(destination)) {
            for other in owners.into_iter().skip(1) {
                self.other_turns.give_back(other, 1);
                waits_elsewhere = true;
            }
        }
        if waits_elsewhere {
            self.turns.retain(|waiting| {
                waiting.retain(|destination| !of_turn.contains(destination));
                !waiting.is_empty()
            });
        }
        Some(of_turn)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ATTACKER: Owner = Owner::new(1_000, 7);
    const VICTIM: Owner = Owner::new(1_001, 8);

    fn at(netns: u32, port: u16) -> Endpoint {
        Endpoint { netns, port, ..Endpoint::UNKNOWN }
    }

    /// The victim's port.
    fn port() -> Endpoint {
        at(1, 40_000)
    }

    /// Three hundred ports of the attacker, each in a namespace of its own.
    fn with_ports_of_attacker() -> WaitingPorts {
        let mut waiting = WaitingPorts::default();
        waiting.push((0..300).map(|number| (at(100 + number, 40_000), ATTACKER)));
        assert!(waiting.pop().is_some());
        waiting
    }

    /// The number of turns until the port is served. Afterwards it is served no more.
    fn turns_until_served(waiting: &mut WaitingPorts) -> Option<usize> {
        let turns: Vec<_> = std::iter::from_fn(|| waiting.pop()).collect();
        let mut served = turns.iter().enumerate().filter(|(_, of_turn)| of_turn.contains(&port()));
        let first = served.next().map(|(turn, _)| turn + 1);
        assert!(served.next().is_none(), "once");
        assert!(turns.iter().all(|of_turn| !of_turn.is_empty()));
        assert!(waiting.is_empty() && waiting.turns.iter().next().is_none());
        assert_eq!((waiting.other_turns.used(), waiting.other_turns.parties()), (0, 0));
        first
    }

    #[test]
    fn who_was_refused_first_at_a_port_delays_it_by_one_of_his_own() {
        let mut waiting = with_ports_of_attacker();
        waiting.push([(port(), ATTACKER), (port(), VICTIM)]);
        assert!(turns_until_served(&mut waiting).is_some_and(|turns| turns <= 2));
        // The owner of the entry has a turn before the other one.
        let mut waiting = WaitingPorts::default();
        waiting.push([(port(), VICTIM), (port(), ATTACKER)]);
        assert_eq!(turns_until_served(&mut waiting), Some(1));
    }

    #[test]
    fn an_owner_that_is_seen_at_a_waiting_port_gives_it_a_turn() {
        let mut waiting = with_ports_of_attacker();
        waiting.push([(port(), ATTACKER), (port(), ATTACKER)]);
        assert!(waiting.pop().is_some());
        for newest in [ATTACKER, VICTIM, ATTACKER, VICTIM] {
            waiting.push([(port(), newest)]);
        }
        assert!(turns_until_served(&mut waiting).is_some_and(|turns| turns <= 2));
    }

    #[test]
    fn a_port_that_is_served_and_waits_again_keeps_no_old_turn() {
        let mut waiting = WaitingPorts::default();
        let of_both = |port| [(port, ATTACKER), (port, VICTIM)];
        let other = at(1, 40_002);
        waiting.push([(other, ATTACKER), (port(), ATTACKER), (port(), VICTIM)]);
        assert_eq!(waiting.pop(), Some(vec![other, port()]));
        assert_eq!(waiting.pop(), None, "the turn of the other owner is not needed");
        waiting.push(of_both(port()));
        waiting.push([(other, ATTACKER)]);
        assert_eq!(waiting.iter().count(), 2);
        assert_eq!(turns_until_served(&mut waiting), Some(1));
    }

    #[test]
    fn many_sessions_or_users_leave_a_turn_to_another_owner() {
        let sessions = (0..100).map(|session| Owner::new(1_000, 100 + session)).collect();
        let users = (0..100).map(|uid| Owner::new(100_000 + uid, 7)).collect();
        let of_attack: [Vec<Owner>; 2] = [sessions, users];
        for owners in of_attack {
            let mut waiting = with_ports_of_attacker();
            for owner in &owners {
                waiting.push((0..20).map(|number| (at(1_000 + number, owner.uid as u16), *owner)));
            }
            waiting.push(owners.iter().map(|owner| (port(), *owner)));
            assert!(waiting.owners[&port()].len() < MAX_OWNERS);
            waiting.push([(port(), VICTIM)]);
            assert!(turns_until_served(&mut waiting).is_some_and(|turns| turns <= 2), "{:?}", owners[1]);
        }
    }

    #[test]
    fn the_turns_beside_the_first_are_bounded_and_shared() {
        let mut waiting = WaitingPorts::default();
        let ports = (0..3_000).map(|number| at(1_000 + number, 40_000));
        waiting.push(ports.clone().map(|port| (port, VICTIM)));
        waiting.push(ports.map(|port| (port, ATTACKER)));
        assert_eq!(waiting.other_turns.used(), MAX_OTHER_TURNS * 3 / 4);
        waiting.push([(port(), ATTACKER), (port(), Owner::new(5, 5))]);
        assert_eq!(waiting.owners[&port()].len(), 2);
        assert!(turns_until_served(&mut waiting).is_some_and(|turns| turns <= 3));
    }
}
