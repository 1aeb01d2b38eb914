//! How often each port of a range is chosen: the kernel's walk, followed step by step.
//!
//! A dial begins where the last one to the same destination ended, and a random step of one to eight ports of the same
//! parity further on; what it finds reserved it passes over, to the next that isn't (`table_perturb` in
//! `__inet_hash_connect`, net/ipv4/inet_hashtables.c at v6.12). So the port behind a wide span of reserved ones is
//! chosen once in each round, which is 4.5 times as often as a port that a round may step over.

use super::LocalPorts;

/// The kernel's random step: one of so many, in ports of one parity.
const STEPS: usize = 8;

/// As many starting points are followed before any is counted; by then it doesn't matter where the walk began.
const WARM_UP: usize = 2_000;

/// How likely each port is to be chosen as a source.
#[derive(Debug, Clone)]
pub struct Odds {
    low: u16,
    /// By port, from `low` on: the chance that one `connect()` takes it, and that one `bind()` to port 0 does.
    chances: Vec<(f64, f64)>,
}

impl Odds {
    /// Follows both walks. All but the reserved ports are taken to be free.
    #[must_use]
    pub fn of(ports: &LocalPorts) -> Self {
        let Walks { even, odd } = Walks::of(ports);
        let mut chances = vec![(0.0, 0.0); usize::from(ports.range.high - ports.range.low) + 1];
        let (connect, bind) = if even.is_any_free() { (&even, &odd) } else { (&odd, &even) };
        let bind = if bind.is_any_free() { bind } else { connect };
        for (offset, chance) in connect.by_connect(ports.step_width != 0) {
            chances[offset].0 = chance;
        }
        for (offset, chance) in bind.by_bind() {
            chances[offset].1 = chance;
        }
        Self { low: ports.range.low, chances }
    }

    /// The mean number of dials of this closed port until one hits itself. `None`: no dial ever does, as long as ports
    /// that are tried before it are free.
    #[must_use]
    pub fn dials(&self, port: u16) -> Option<u32> {
        expected(self.at(port).0)
    }

    /// The same for a client that binds port 0 before each dial. With `SO_REUSEADDR` it is half as many for a port in
    /// the range's lower half, and none for the others.
    #[must_use]
    pub fn dials_after_bind(&self, port: u16) -> Option<u32> {
        expected(self.at(port).1)
    }

    fn at(&self, port: u16) -> (f64, f64) {
        let offset = port.checked_sub(self.low).map(usize::from);
        offset.and_then(|offset| self.chances.get(offset)).copied().unwrap_or_default()
    }
}

fn expected(chance: f64) -> Option<u32> {
    (chance > 0.0).then(|| (1.0 / chance).round() as u32)
}

/// The ports of either parity, as offsets from the range's low bound.
struct Walks {
    even: Walk,
    odd: Walk,
}

/// Ports of one parity in the order in which they are tried.
struct Walk {
    /// The offset of the first.
    first: usize,
    /// Whether each is free. Starting points, and behind them maybe one that can only be come by from the last.
    free: Vec<bool>,
    starts: usize,
}

impl Walks {
    fn of(ports: &LocalPorts) -> Self {
        let count = usize::from(ports.range.high - ports.range.low) + 1;
        let starts = (count / 2).max(1);
        let walk = |first: usize, len: usize| {
            let port = |slot| ports.range.low + (first + 2 * slot) as u16;
            Walk {
                first,
                free: (0..len).map(|slot| !ports.reserved.contains(port(slot))).collect(),
                starts: starts.min(len),
            }
        };
        Self { even: walk(0, count.div_ceil(2)), odd: walk(1, count / 2) }
    }
}

impl Walk {
    fn is_any_free(&self) -> bool {
        self.free.contains(&true)
    }

    /// For each starting point the free port that is found from there, and how many were passed over.
    fn found(&self) -> Vec<Option<(usize, usize)>> {
        // Past the topmost slot the kernel goes back by the number of starting points.
        let next = |slot: usize| if slot + 1 < self.free.len() { slot + 1 } else { slot + 1 - self.starts };
        let from = |start| {
            let mut slot = start;
            for passed in 0..self.starts {
                if self.free[slot] {
                    return Some((slot, passed));
                }
                slot = next(slot);
            }
            None
        };
        let mut found: Vec<Option<(usize, usize)>> = vec![None; self.starts];
        for start in (0..self.starts).rev() {
            found[start] = match found.get(start + 1) {
                // What is found from the next one is found from here, too, one step later.
                Some(next) if !self.free[start] => {
                    next.map(|(slot, passed)| (slot, passed + 1)).filter(|(_, passed)| *passed < self.starts)
                }
                _ => from(start),
            };
        }
        found
    }

    fn offset(&self, slot: usize) -> usize {
        self.first + 2 * slot
    }

    /// Each chosen port's chance under `connect()`.
    fn by_connect(&self, is_spread: bool) -> Vec<(usize, f64)> {
        let free = self.free.iter().filter(|free| **free).count();
        if is_spread || free == self.free.len() {
            return self.evenly(free);
        }
        let found = self.found();
        // How often each point of a long line of rounds is a start.
        let begin = WARM_UP.next_multiple_of(self.starts);
        let end = begin + self.starts;
        let mut flow = vec![0.0; end];
        flow[0] = 1.0;
        for at in 0..end {
            let Some((_, passed)) = found[at % self.starts] else { continue };
            let share = flow[at] / STEPS as f64;
            for step in 0..STEPS {
                if let Some(next) = flow.get_mut(at + passed.max(step) + 1) {
                    *next += share;
                }
            }
        }
        let round = &flow[begin..end];
        let total: f64 = round.iter().sum();
        let mut chances = vec![0.0; self.free.len()];
        for (flow, found) in round.iter().zip(&found) {
            if let Some((slot, _)) = found {
                chances[*slot] += flow / total;
            }
        }
        chances.into_iter().enumerate().map(|(slot, chance)| (self.offset(slot), chance)).collect()
    }

    /// Where nothing is passed over, and where what is passed over falls to all alike. With a step width, the kernel
    /// goes on from a reserved port by a random number of ports of up to that width, the same for one dial. If it is as
    /// wide as the range, all alike get what falls to reserved ones; if not, this is the mean.
    fn evenly(&self, free: usize) -> Vec<(usize, f64)> {
        let count = if free == self.free.len() { self.starts } else { free };
        let slots = (0..self.free.len()).filter(|slot| self.free[*slot]);
        // What is no starting point is not come by.
        let slots = slots.filter(|slot| free != self.free.len() || *slot < self.starts);
        slots.map(|slot| (self.offset(slot), 1.0 / count as f64)).collect()
    }

    /// `bind()` to port 0 starts anywhere, each time anew.
    fn by_bind(&self) -> Vec<(usize, f64)> {
        let mut chances = vec![0.0; self.free.len()];
        for (slot, _) in self.found().into_iter().flatten() {
            chances[slot] += 1.0 / self.starts as f64;
        }
        chances.into_iter().enumerate().map(|(slot, chance)| (self.offset(slot), chance)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn odds(range: &str, reserved: &str) -> Odds {
        Odds::of(&LocalPorts::parse(range, reserved).unwrap())
    }

    #[test]
    fn a_port_is_hit_once_in_as_many_dials_as_its_place_in_the_walk_says() {
        let rows = [
            ("32768 60999", "", 44446, Some(14_116), None),
            ("32768 60999", "", 44445, None, Some(14_116)),
            ("32769 60999", "", 44445, Some(14_115), None),
            ("40000 40199", "", 40000, Some(100), None),
            ("40000 40199", "", 40199, None, Some(100)),
            ("40000 40199", "40100", 40100, None, None),
            ("40000 40199", "", 39999, None, None),
            ("40000 40199", "", 40200, None, None),
            ("40000 40199", "40000-40199", 40100, None, None),
            ("40000 40000", "", 40000, Some(1), Some(1)),
            ("40000 40001", "", 40000, Some(1), None),
            ("40000 40001", "", 40001, None, Some(1)),
            // The topmost of an odd number is no starting point; with the one below reserved it is come by.
            ("40000 40004", "", 40004, None, None),
            ("40000 40004", "40002", 40004, Some(2), None),
            // Where one parity is all reserved, both take the other.
            ("40000 40003", "40000,40002", 40001, Some(2), Some(2)),
            ("40000 40003", "40001,40003", 40002, Some(2), Some(2)),
            // bind() starts anywhere: the port behind 49 reserved ones has their share, too.
            ("40000 40199", "40000-40098", 40099, None, Some(2)),
            ("40000 40199", "40000-40098", 40101, None, Some(100)),
        ];
        for (range, reserved, port, dials, after_bind) in rows {
            let odds = odds(range, reserved);
            let got = (odds.dials(port), odds.dials_after_bind(port));
            assert_eq!(got, (dials, after_bind), "{range} less {reserved:?}: {port}");
        }
    }

    #[test]
    fn the_port_behind_a_wide_span_is_hit_once_a_round() {
        // 4.5 times as often as one that a round may step over: 100 ports make 22.2 dials, 1,000 make 222.2.
        let odds = odds("40000 41999", "40100-40198");
        let (behind, ordinary) = (odds.dials(40200).unwrap(), odds.dials(41000).unwrap());
        assert!((205..=220).contains(&behind), "{behind}");
        assert!((930..=990).contains(&ordinary), "{ordinary}");
    }

    #[test]
    fn what_is_spread_falls_to_all_alike() {
        let ports = LocalPorts::parse("40000 41999", "40100-40198").unwrap();
        let odds = Odds::of(&LocalPorts { step_width: 2_000, ..ports });
        assert_eq!((odds.dials(40200), odds.dials(41000)), (Some(950), Some(950)));
        assert_eq!(odds.dials(40198), None);
    }

    /// `__inet_hash_connect` with a random number generator of its own.
    fn dial(ports: &LocalPorts, perturb: &mut u64, random: &mut u64) -> u16 {
        let (low, high) = (u64::from(ports.range.low), u64::from(ports.range.high) + 1);
        let mut remaining = high - low;
        if remaining > 1 {
            remaining &= !1;
        }
        let mut offset = ((*perturb + 12_345) % remaining) & !1;
        loop {
            let mut port = low + offset;
            let mut i = 0;
            while i < remaining {
                if port >= high {
                    port -= remaining;
                }
                if !ports.reserved.contains(port as u16) {
                    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *perturb += i.max((*random >> 33) % 8 * 2) + 2;
                    return port as u16;
                }
                i += 2;
                port += 2;
            }
            offset += 1;
            assert!(offset & 1 == 1 && remaining > 1, "nothing is free");
        }
    }

    #[test]
    fn the_odds_are_those_of_the_kernels_own_loop() {
        const DIALS: u32 = 400_000;
        for (range, reserved) in [
            ("40000 40199", ""),
            ("40000 40199", "40100"),
            ("40000 40199", "40000-40098"),
            ("40000 40199", "40010-40030,40040,40044,40090-40120,40199"),
            ("40000 40200", "40190-40199"),
            ("40001 40201", "40003,40199"),
            ("40000 40011", "40000,40002,40004,40006,40008,40010"),
            ("40000 40007", "40002"),
        ] {
            let ports = LocalPorts::parse(range, reserved).unwrap();
            let odds = Odds::of(&ports);
            let (mut perturb, mut random) = (7, 4_711);
            let mut hits = [0_u32; 300];
            for _ in 0..DIALS {
                hits[usize::from(dial(&ports, &mut perturb, &mut random) - 40_000)] += 1;
            }
            for (offset, hits) in hits.into_iter().enumerate() {
                let port = 40_000 + offset as u16;
                let chance = odds.at(port).0;
                let seen = f64::from(hits) / f64::from(DIALS);
                assert!(
                    (chance - seen).abs() <= 0.001 + chance * 0.1,
                    "{range} less {reserved:?}: {port}: {chance}, {seen}"
                );
            }
        }
    }
}
