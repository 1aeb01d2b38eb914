//! Computes how often the kernel chooses each port of a range, by simulating the kernel's walk.
//!
//! A connect starts at the port at which the previous connect to the same destination ended, plus a random
//! step of one to eight ports of the same parity. It skips reserved ports up to the next port that is not
//! reserved (`table_perturb` in `__inet_hash_connect`, net/ipv4/inet_hashtables.c at v6.12). Therefore the
//! port after a wide span of reserved ports is chosen once in each round over the range, which is 4.5 times
//! as often as a port that a round can step over.

use super::LocalPorts;

/// The number of values of the kernel's random step, in ports of one parity.
const STEP_CHOICES: usize = 8;

/// The number of starting points that are simulated before counting begins. After these, the result no longer
/// depends on the start of the walk.
const WARM_UP_STARTS: usize = 2_000;

/// The probability of each port to be chosen as a source port.
#[derive(Debug, Clone)]
pub struct Odds {
    low: u16,
    /// For each port from `low` on: the probability that one `connect()` chooses it, and that one `bind()` to
    /// port 0 chooses it.
    chances: Vec<(f64, f64)>,
}

impl Odds {
    /// Simulates the walks of `connect()` and of `bind()`. All ports except the reserved ones are assumed to
    /// be free.
    #[must_use]
    pub fn of(ports: &LocalPorts) -> Self {
        let Walks { even, odd } = Walks::of(ports);
        let mut chances = vec![(0.0, 0.0); usize::from(ports.range.high - ports.range.low) + 1];
        let (connect, bind) = if even.is_any_free() { (&even, &odd) } else { (&odd, &even) };
        let bind = if bind.is_any_free() { bind } else { connect };
        for (offset, chance) in connect.connect_chances(ports.step_width != 0) {
            chances[offset].0 = chance;
        }
        for (offset, chance) in bind.bind_chances() {
            chances[offset].1 = chance;
        }
        Self { low: ports.range.low, chances }
    }

    /// The mean number of connects to this closed port until one hits itself. `None`: no connect hits itself
    /// while ports that are tried earlier are free.
    #[must_use]
    pub fn expected_connects(&self, port: u16) -> Option<u32> {
        mean_connects(self.at(port).0)
    }

    /// The same for a client that binds to port 0 before each connect. With `SO_REUSEADDR` the number is half
    /// for a port in the lower half of the range, and no connect hits itself for the other ports.
    #[must_use]
    pub fn expected_connects_after_bind(&self, port: u16) -> Option<u32> {
        mean_connects(self.at(port).1)
    }

    fn at(&self, port: u16) -> (f64, f64) {
        let offset = port.checked_sub(self.low).map(usize::from);
        offset.and_then(|offset| self.chances.get(offset)).copied().unwrap_or_default()
    }
}

fn mean_connects(chance: f64) -> Option<u32> {
    (chance > 0.0).then(|| (1.0 / chance).round() as u32)
}

/// The walks over the ports of both parities, as offsets from the range's low bound.
struct Walks {
    /// All ports, if `connect()` does not care for parity.
    even: Walk,
    odd: Walk,
}

/// The ports of one parity in the order in which the kernel tries them.
struct Walk {
    /// The offset of the first port.
    first: usize,
    /// The distance of two neighbours: 2, or 1 if the parity does not matter.
    step: usize,
    /// True for each free port. The starting points come first. They may be followed by one port that is
    /// reached only from the last starting point.
    free: Vec<bool>,
    /// The number of starting points.
    starts: usize,
}

impl Walks {
    fn of(ports: &LocalPorts) -> Self {
        let count = usize::from(ports.range.high - ports.range.low) + 1;
        let walk = |first: usize, step: usize, len: usize, starts: usize| {
            let port = |slot| ports.range.low + (first + step * slot) as u16;
            Walk {
                first,
                step,
                free: (0..len).map(|slot| !ports.reserved.contains(port(slot))).collect(),
                starts: starts.min(len),
            }
        };
        let starts = (count / 2).max(1);
        let even = match ports.ignores_parity {
            true => walk(0, 1, count, count),
            false => walk(0, 2, count.div_ceil(2), starts),
        };
        Self { even, odd: walk(1, 2, count / 2, starts) }
    }
}

impl Walk {
    fn is_any_free(&self) -> bool {
        self.free.contains(&true)
    }

    /// For each starting point: the free port that the walk reaches from there, and the number of ports
    /// skipped.
    fn reached_ports(&self) -> Vec<Option<(usize, usize)>> {
        // After the highest slot the kernel goes back by the number of starting points.
        let next = |slot: usize| if slot + 1 < self.free.len() { slot + 1 } else { slot + 1 - self.starts };
        let from = |start| {
            let mut slot = start;
            for skipped in 0..self.starts {
                if self.free[slot] {
                    return Some((slot, skipped));
                }
                slot = next(slot);
            }
            None
        };
        let mut reached: Vec<Option<(usize, usize)>> = vec![None; self.starts];
        for start in (0..self.starts).rev() {
            reached[start] = match reached.get(start + 1) {
                // From here the walk reaches the same port as from the next start, one step later.
                Some(next) if !self.free[start] => next
                    .map(|(slot, skipped)| (slot, skipped + 1))
                    .filter(|(_, skipped)| *skipped < self.starts),
                _ => from(start),
            };
        }
        reached
    }

    fn offset(&self, slot: usize) -> usize {
        self.first + self.step * slot
    }

    /// The probability of each port to be chosen by `connect()`.
    fn connect_chances(&self, has_step_width: bool) -> Vec<(usize, f64)> {
        let free = self.free.iter().filter(|free| **free).count();
        if has_step_width || free == self.free.len() {
            return self.even_chances(free);
        }
        let reached = self.reached_ports();
        // The expected number of times that each point is a start, over a long sequence of rounds.
        let begin = WARM_UP_STARTS.next_multiple_of(self.starts);
        let end = begin + self.starts;
        let mut flow = vec![0.0; end];
        flow[0] = 1.0;
        for at in 0..end {
            let Some((_, skipped)) = reached[at % self.starts] else { continue };
            let share = flow[at] / STEP_CHOICES as f64;
            for step in 0..STEP_CHOICES {
                if let Some(next) = flow.get_mut(at + skipped.max(step) + 1) {
                    *next += share;
                }
            }
        }
        let round = &flow[begin..end];
        let total: f64 = round.iter().sum();
        let mut chances = vec![0.0; self.free.len()];
        for (flow, reached) in round.iter().zip(&reached) {
            if let Some((slot, _)) = reached {
                chances[*slot] += flow / total;
            }
        }
        chances.into_iter().enumerate().map(|(slot, chance)| (self.offset(slot), chance)).collect()
    }

    /// Equal probabilities, for the case that no port is reserved or that the share of the reserved ports is
    /// distributed evenly. With a step width, the kernel continues from a reserved port by a random number of
    /// ports of up to that width, which is the same during one connect. If the width covers the range, all
    /// free ports get an equal share of the reserved ports; otherwise this is the mean.
    fn even_chances(&self, free: usize) -> Vec<(usize, f64)> {
        let count = if free == self.free.len() { self.starts } else { free };
        let slots = (0..self.free.len()).filter(|slot| self.free[*slot]);
        // If no port is reserved, a port that is not a starting point is never reached.
        let slots = slots.filter(|slot| free != self.free.len() || *slot < self.starts);
        slots.map(|slot| (self.offset(slot), 1.0 / count as f64)).collect()
    }

    /// The probability of each port to be chosen by `bind()` to port 0, which starts at a random point each
    /// time.
    fn bind_chances(&self) -> Vec<(usize, f64)> {
        let mut chances = vec![0.0; self.free.len()];
        for (slot, _) in self.reached_ports().into_iter().flatten() {
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
    fn expected_connects_follow_from_the_position_in_the_walk() {
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
            // The highest of an odd number of ports is not a starting point; it is reached if the port below
            // is reserved.
            ("40000 40004", "", 40004, None, None),
            ("40000 40004", "40002", 40004, Some(2), None),
            // If all ports of one parity are reserved, connect() and bind() both use the other parity.
            ("40000 40003", "40000,40002", 40001, Some(2), Some(2)),
            ("40000 40003", "40001,40003", 40002, Some(2), Some(2)),
            // bind() starts at a random port, so the port after 49 reserved ports also has their share.
            ("40000 40199", "40000-40098", 40099, None, Some(2)),
            ("40000 40199", "40000-40098", 40101, None, Some(100)),
        ];
        for (range, reserved, port, connects, after_bind) in rows {
            let odds = odds(range, reserved);
            let got = (odds.expected_connects(port), odds.expected_connects_after_bind(port));
            assert_eq!(got, (connects, after_bind), "{range} less {reserved:?}: {port}");
        }
    }

    #[test]
    fn the_port_after_a_wide_reserved_span_is_hit_once_a_round() {
        // 4.5 times as often as a port that a round can step over: 22.2 connects with 100 ports, 222.2 with
        // 1,000.
        let odds = odds("40000 41999", "40100-40198");
        let (after_span, ordinary) =
            (odds.expected_connects(40200).unwrap(), odds.expected_connects(41000).unwrap());
        assert!((205..=220).contains(&after_span), "{after_span}");
        assert!((930..=990).contains(&ordinary), "{ordinary}");
    }

    #[test]
    fn a_step_width_distributes_the_reserved_share_evenly() {
        let ports = LocalPorts::parse("40000 41999", "40100-40198").unwrap();
        let odds = Odds::of(&LocalPorts { step_width: 2_000, ..ports });
        assert_eq!((odds.expected_connects(40200), odds.expected_connects(41000)), (Some(950), Some(950)));
        assert_eq!(odds.expected_connects(40198), None);
    }

    /// Simulates `__inet_hash_connect` with a pseudo-random number generator.
    fn simulated_connect(ports: &LocalPorts, perturb: &mut u64, random: &mut u64) -> u16 {
        let (low, high) = (u64::from(ports.range.low), u64::from(ports.range.high) + 1);
        let step = if ports.ignores_parity { 1 } else { 2 };
        let mut remaining = high - low;
        if remaining > 1 && step == 2 {
            remaining &= !1;
        }
        let mut offset = (*perturb + 12_345) % remaining;
        if step == 2 {
            offset &= !1;
        }
        loop {
            let mut port = low + offset;
            let mut i = 0;
            while i < remaining {
                if port >= high {
                    port -= remaining;
                }
                if !ports.reserved.contains(port as u16) {
                    *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *perturb += i.max((*random >> 33) % 8 * step) + step;
                    return port as u16;
                }
                i += step;
                port += step;
            }
            offset += 1;
            assert!(step == 2 && offset & 1 == 1 && remaining > 1, "nothing is free");
        }
    }

    #[test]
    fn the_odds_match_a_simulation_of_the_kernel_loop() {
        const CONNECTS: u32 = 400_000;
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
            let shared = LocalPorts::parse(range, reserved).unwrap();
            for ports in [shared.for_socket(shared.range), shared] {
                let odds = Odds::of(&ports);
                let (mut perturb, mut random) = (7, 4_711);
                let mut hits = [0_u32; 300];
                for _ in 0..CONNECTS {
                    hits[usize::from(simulated_connect(&ports, &mut perturb, &mut random) - 40_000)] += 1;
                }
                for (offset, hits) in hits.into_iter().enumerate() {
                    let port = 40_000 + offset as u16;
                    let chance = odds.at(port).0;
                    let measured = f64::from(hits) / f64::from(CONNECTS);
                    assert!(
                        (chance - measured).abs() <= 0.001 + chance * 0.1,
                        "{ports:?}: {port}: {chance}, {measured}"
                    );
                }
            }
        }
    }
}
