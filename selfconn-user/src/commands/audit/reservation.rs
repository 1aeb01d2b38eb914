//! The list of reserved ports that removes the risks of one namespace, and the part of it that one write sets.
//! Pure.
//!
//! The kernel takes a page less a byte from one write, up to the last whole number (`proc_do_large_bitmap`,
//! kernel/sysctl.c at v6.12), and returns how much it took. A program that writes the rest on the same
//! descriptor adds to the list; one that stops there, as sysctl(8) does, leaves ports out in silence.

use super::assess::{PortAssessment, Risk};
use crate::ports::ReservedPorts;

/// The most bytes of a list that one write takes where a page has 4,096 bytes: that, without the last number's
/// end and a newline.
pub(super) const WRITE_BYTES: usize = 4_092;

/// The ports to reserve in one namespace.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reservation {
    /// All of them: those reserved already, and those at risk.
    pub(super) all: ReservedPorts,
    /// The part that fits in one write: what is reserved already comes first, then the highest risk.
    pub(super) fitting: ReservedPorts,
    /// The ports of `all` that are not in `fitting`.
    pub(super) left_out: ReservedPorts,
}

impl Reservation {
    /// `rows` begin with the highest risk.
    pub(super) fn new(reserved: &ReservedPorts, rows: &[PortAssessment]) -> Self {
        let at_risk = rows.iter().filter(|row| row.risk != Risk::None).map(|row| row.port);
        let all = reserved.with(at_risk.clone());
        if fits(&all) {
            return Self { fitting: all.clone(), all, left_out: ReservedPorts::default() };
        }
        let ports: Vec<_> = reserved.ports().chain(at_risk).collect();
        let first = |count: usize| ReservedPorts::default().with(ports[..count].iter().copied());
        // Another port can make the text shorter, so this finds one of the counts that fit, not always the
        // largest one.
        let (mut fit, mut too_many) = (0, ports.len());
        while too_many - fit > 1 {
            let middle = fit.midpoint(too_many);
            if fits(&first(middle)) {
                fit = middle;
            } else {
                too_many = middle;
            }
        }
        let fitting = first(fit);
        let left_out = all.ports().filter(|&port| !fitting.contains(port));
        Self { left_out: ReservedPorts::default().with(left_out), fitting, all }
    }

    pub(super) fn fits_one_write(&self) -> bool {
        self.left_out.is_empty()
    }
}

fn fits(ports: &ReservedPorts) -> bool {
    ports.to_string().len() <= WRITE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::audit::{
        assess::{
            assess,
            tests::{audited, namespace},
        },
        collect::RouteSource,
    };

    fn reservation(range: &str, reserved: &str, ports: impl Iterator<Item = u16>) -> Reservation {
        let audited = ports.map(|port| audited(None, port, RouteSource::Same, None)).collect();
        let info = namespace(range, reserved, audited);
        Reservation::new(&info.local_ports.reserved, &assess(&info))
    }

    #[test]
    fn neighbouring_ports_are_one_range_and_fit() {
        let reservation = reservation("1024 65535", "8080", 30_000..=32_767);
        assert!(reservation.fits_one_write(), "{reservation:?}");
        assert_eq!(reservation.fitting.to_string(), "8080,30000-32767");
    }

    #[test]
    fn what_does_not_fit_is_the_lowest_risk() {
        // 700 even ports, at high risk, and 100 odd ports far from each other, at low risk: 800 numbers of six
        // bytes, of which 682 fit.
        let even = (30_000..).step_by(20).take(700);
        let odd = (45_001..).step_by(20).take(100);
        let reservation = reservation("20000 60999", "", even.chain(odd));
        let Reservation { all, fitting, left_out } = &reservation;
        let count = |ports: &ReservedPorts| ports.ports().count();
        assert_eq!((count(all), count(fitting), count(left_out)), (800, 682, 118), "{reservation:?}");
        assert_eq!(fitting.to_string().len(), WRITE_BYTES - 1);
        assert_eq!(fitting.with(left_out.ports()), *all);
        assert!(left_out.contains(45_001) && fitting.contains(30_000), "{reservation:?}");
        assert!(!reservation.fits_one_write());
    }

    #[test]
    fn the_ports_reserved_already_come_first() {
        let reserved: Vec<_> = (1..2_000).step_by(2).map(|port: u16| port.to_string()).collect();
        let reservation = reservation("20000 60999", &reserved.join(","), [30_000].into_iter());
        assert!(reservation.left_out.contains(30_000) && reservation.fitting.contains(1), "{reservation:?}");
    }
}
