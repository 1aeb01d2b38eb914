//! Which records and sockets belong to a self-test, of this daemon or of another one on the host. Pure.
//!
//! Nothing of a self-test is reported, so whoever makes a connection look like one hides it. Our own self-test is
//! known by the cookie of its socket. That of another daemon is at the endpoint of self-tests, and root or the user
//! of this daemon opened it.

use std::collections::VecDeque;

use selfconn_ebpf::Transition;

use super::socket::ENDPOINT;

/// Maximum number of sockets of other daemons that are remembered.
const MAX_OTHERS: usize = 64;

/// How long a socket without a cookie is remembered by its kernel address: longer than the second probe's record
/// comes after the first one's.
const ADDRESS_TTL_NS: u64 = 5_000_000_000;

/// Recognizes self-tests.
#[derive(Debug)]
pub struct Recognition {
    /// The cookie of our own socket. `None`: there are no self-tests of our own.
    own_cookie: Option<u64>,
    /// The user of this daemon.
    uid: u32,
    /// Sockets of other daemons, the last seen at the end: the last record of a self-test may have no opener, because
    /// the first probe has removed the entry.
    others: VecDeque<(SelfTestId, u64)>,
}

/// A socket at the endpoint of self-tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SelfTestId {
    Cookie(u64),
    /// The kernel address: without BTF, and of a socket that has no cookie yet.
    Address(u64),
}

impl Recognition {
    /// `uid` is the user of this daemon.
    #[must_use]
    pub fn new(own_cookie: Option<u64>, uid: u32) -> Self {
        Self { own_cookie, uid, others: VecDeque::new() }
    }

    /// True if the transition is one of our own self-test. Without BTF the probes know no cookies; then the self-test
    /// of another daemon counts as ours.
    pub fn is_ours(&mut self, t: &Transition) -> bool {
        match t.cookie {
            0 => self.is_other(t),
            cookie => self.own_cookie == Some(cookie),
        }
    }

    /// True if the transition is one of a self-test of another daemon. A transition without an opener is one only if
    /// an earlier one of the same socket was.
    pub fn is_other(&mut self, t: &Transition) -> bool {
        if t.endpoint.ip() != *ENDPOINT.ip() || t.endpoint.port != ENDPOINT.port() {
            return false;
        }
        let address = SelfTestId::Address(t.sock);
        let id = if t.cookie == 0 { address } else { SelfTestId::Cookie(t.cookie) };
        if t.opener.at_ns == 0 {
            // The socket may have got its cookie after its last record.
            return self.others.iter().any(|(other, seen_ns)| match other {
                SelfTestId::Cookie(_) => *other == id,
                SelfTestId::Address(_) => {
                    *other == address && t.at_ns.saturating_sub(*seen_ns) < ADDRESS_TTL_NS
                }
            });
        }
        self.others.retain(|(other, _)| *other != id && *other != address);
        if ![0, self.uid].contains(&t.opener.uid) {
            return false;
        }
        if self.others.len() == MAX_OTHERS {
            self.others.pop_front();
        }
        self.others.push_back((id, t.at_ns));
        true
    }

    /// True if the socket with this cookie is the socket of a self-test.
    #[must_use]
    pub fn is_self_test_socket(&self, cookie: u64) -> bool {
        self.own_cookie == Some(cookie)
            || self.others.iter().any(|(other, _)| *other == SelfTestId::Cookie(cookie))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use selfconn_ebpf::{Endpoint, Opener, state};

    use super::*;
    use crate::detect::samples;

    const OWN_UID: u32 = 65_534;
    const OWN_COOKIE: u64 = 77;

    fn recognition() -> Recognition {
        Recognition::new(Some(OWN_COOKIE), OWN_UID)
    }

    /// A record at the endpoint of self-tests. `uid`: of the opener; `None`: no opener.
    fn record(cookie: u64, sock: u64, at_ns: u64, uid: Option<u32>) -> Transition {
        let opener = uid.map_or(Opener::UNKNOWN, |uid| Opener { at_ns: 1, uid, ..Opener::UNKNOWN });
        Transition {
            endpoint: Endpoint::new(7, (*ENDPOINT.ip()).into(), ENDPOINT.port(), false),
            cookie,
            opener,
            ..samples::transition(sock, at_ns, state::SYN_RECV, state::ESTABLISHED)
        }
    }

    #[test]
    fn our_own_self_test_is_known_by_its_cookie_with_or_without_an_opener() {
        for uid in [None, Some(0), Some(1_000)] {
            assert!(recognition().is_ours(&record(OWN_COOKIE, 1, 1, uid)), "{uid:?}");
            assert!(!recognition().is_ours(&record(OWN_COOKIE + 1, 1, 1, uid)), "{uid:?}");
        }
        assert!(!Recognition::new(None, 0).is_ours(&record(OWN_COOKIE, 1, 1, Some(0))));
    }

    #[test]
    fn only_a_known_opener_that_is_root_or_the_same_user_makes_a_self_test() {
        for (uid, is_self_test) in
            [(Some(0), true), (Some(OWN_UID), true), (Some(1_000), false), (None, false)]
        {
            for cookie in [9, 0] {
                assert_eq!(
                    recognition().is_other(&record(cookie, 1, 1, uid)),
                    is_self_test,
                    "{uid:?} {cookie}"
                );
            }
        }
        let at = |addr: [u8; 4], port| Transition {
            endpoint: Endpoint::new(7, Ipv4Addr::from(addr).into(), port, false),
            ..record(9, 1, 1, Some(0))
        };
        assert!(!recognition().is_other(&at([127, 83, 67, 84], 50_884)));
        assert!(!recognition().is_other(&at([127, 0, 0, 1], 50_883)));
    }

    #[test]
    fn a_last_record_without_an_opener_belongs_to_the_socket_that_was_recognized() {
        let mut recognition = recognition();
        assert!(recognition.is_other(&record(9, 1, 1, Some(0))));
        assert!(recognition.is_other(&record(9, 1, 90_000_000_000, None)));
        assert!(recognition.is_self_test_socket(9) && recognition.is_self_test_socket(OWN_COOKIE));
        assert!(!recognition.is_other(&record(10, 1, 2, None)), "another socket at the same kernel address");
        assert!(!recognition.is_self_test_socket(10));
        // Somebody else connects the socket, which root has passed to him.
        assert!(!recognition.is_other(&record(9, 1, 3, Some(1_000))));
        assert!(!recognition.is_other(&record(9, 1, 4, None)));
    }

    #[test]
    fn without_cookies_a_kernel_address_is_remembered_for_a_moment() {
        let mut recognition = recognition();
        assert!(recognition.is_ours(&record(0, 1, 10, Some(0))));
        assert!(recognition.is_other(&record(0, 1, 11, None)));
        assert!(!recognition.is_other(&record(0, 2, 11, None)));
        assert!(!recognition.is_other(&record(0, 1, 10 + ADDRESS_TTL_NS, None)));
    }

    #[test]
    fn a_socket_that_got_its_cookie_after_its_last_record_is_known_by_its_address() {
        let mut recognition = recognition();
        assert!(recognition.is_other(&record(0, 1, 10, Some(0))));
        assert!(recognition.is_other(&record(9, 1, 11, None)));
        assert!(!recognition.is_other(&record(9, 2, 11, None)));
        // Another user has the address now.
        assert!(!recognition.is_other(&record(10, 1, 12, Some(1_000))));
        assert!(!recognition.is_other(&record(10, 1, 13, None)));
    }

    #[test]
    fn the_number_of_remembered_sockets_is_bounded() {
        let mut recognition = recognition();
        for cookie in 1..=MAX_OTHERS as u64 + 1 {
            assert!(recognition.is_other(&record(cookie, cookie, 1, Some(0))));
        }
        assert_eq!(recognition.others.len(), MAX_OTHERS);
        assert!(!recognition.is_self_test_socket(1) && recognition.is_self_test_socket(2));
    }
}
