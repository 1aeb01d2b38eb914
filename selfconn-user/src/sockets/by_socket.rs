//! Which socket something is about: what is known of it, and values by socket. Pure.

use std::collections::HashMap;

use selfconn_ebpf::Endpoint;

/// What is known of a socket that has a file. The cookie identifies it. An inode does not: the numbers have 32 bits and
/// start again (`get_next_ino`, fs/inode.c at v6.12), so a user who makes enough sockets can have the inode of
/// another's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketRef {
    /// `None`: unknown, as in procfs.
    pub cookie: Option<u64>,
    pub inode: u64,
    /// `None`: unknown, as in `/proc/PID/fd`.
    pub endpoint: Option<Endpoint>,
}

impl SocketRef {
    /// A socket of which only the inode is known.
    #[must_use]
    pub fn of_inode(inode: u64) -> Self {
        Self { cookie: None, inode, endpoint: None }
    }

    /// True if nothing shows that these are two sockets.
    #[must_use]
    pub fn may_be(&self, other: &Self) -> bool {
        let is_same_cookie = self.cookie.zip(other.cookie).map(|(one, other)| one == other);
        self.inode == other.inode
            && is_same_cookie.unwrap_or_else(|| match (&self.endpoint, &other.endpoint) {
                (Some(one), Some(other)) => may_be_same(one, other),
                _ => true,
            })
    }
}

/// True if the addresses and ports are equal, and what else is known of both. The tables don't report the namespace,
/// and that of procfs has no devices.
fn may_be_same(one: &Endpoint, other: &Endpoint) -> bool {
    let is_unknown_or_equal = |one, other| one == 0 || other == 0 || one == other;
    (one.addr, one.port) == (other.addr, other.port)
        && is_unknown_or_equal(one.ifindex, other.ifindex)
        && (one.netns == 0 || other.netns == 0 || one.is_in_netns_of(other))
}

/// A value for each socket.
#[derive(Clone, Debug)]
pub struct BySocket<T>(
    /// In the order of the inodes.
    Vec<(SocketRef, T)>,
);

impl<T> Default for BySocket<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> FromIterator<(SocketRef, T)> for BySocket<T> {
    fn from_iter<I: IntoIterator<Item = (SocketRef, T)>>(values: I) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by_key(|(socket, _)| socket.inode);
        Self(values)
    }
}

impl<T> BySocket<T> {
    /// All that may be this socket's.
    pub fn candidates(&self, socket: &SocketRef) -> impl Iterator<Item = &(SocketRef, T)> {
        let first = self.0.partition_point(|(known, _)| known.inode < socket.inode);
        let same_inode = self.0.iter().skip(first).take_while(|(known, _)| known.inode == socket.inode);
        same_inode.filter(|(known, _)| known.may_be(socket))
    }

    /// The value of this socket. `None`: there is none, or it is not certain which one it is.
    #[must_use]
    pub fn get(&self, socket: &SocketRef) -> Option<&T> {
        let has_its_cookie =
            |(known, _): &&(SocketRef, T)| known.cookie.is_some() && known.cookie == socket.cookie;
        let mut candidates = self.candidates(socket);
        let certain = self.candidates(socket).find(has_its_cookie);
        certain.or_else(|| candidates.next().filter(|_| candidates.next().is_none())).map(|(_, value)| value)
    }

    /// True if this socket may have a value.
    #[must_use]
    pub fn may_have(&self, socket: &SocketRef) -> bool {
        self.candidates(socket).next().is_some()
    }
}

/// The inodes of these sockets, without those that two of them have.
pub(super) fn unique_inodes(sockets: impl Iterator<Item = SocketRef>) -> impl Iterator<Item = u64> {
    let mut by_inode: HashMap<u64, Option<SocketRef>> = HashMap::new();
    for socket in sockets {
        let known = by_inode.entry(socket.inode).or_insert(Some(socket));
        // A table that changes while it is read may list a socket twice.
        *known = known.filter(|known| known.may_be(&socket));
    }
    by_inode.into_iter().filter_map(|(inode, socket)| socket.map(|_| inode))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::detect::samples;

    fn socket(cookie: Option<u64>, inode: u64, port: u16) -> SocketRef {
        SocketRef { cookie, inode, endpoint: Some(samples::endpoint("127.0.0.1", port)) }
    }

    #[test]
    fn a_cookie_decides_and_without_one_inode_and_endpoint_together() {
        for (one, other, may_be) in [
            (socket(Some(1), 5, 80), socket(Some(1), 5, 80), true),
            (socket(Some(1), 5, 80), socket(Some(2), 5, 80), false),
            (socket(Some(1), 5, 80), socket(None, 5, 80), true),
            (socket(Some(1), 5, 80), socket(None, 5, 81), false),
            (socket(None, 5, 80), socket(None, 6, 80), false),
            (socket(None, 5, 80), SocketRef::of_inode(5), true),
            (socket(Some(1), 5, 80), SocketRef::of_inode(6), false),
        ] {
            assert_eq!((one.may_be(&other), other.may_be(&one)), (may_be, may_be), "{one:?} {other:?}");
        }
        let at = |netns, ifindex| {
            let endpoint = Endpoint { netns, ifindex, ..samples::endpoint("127.0.0.1", 80) };
            SocketRef { endpoint: Some(endpoint), ..socket(None, 5, 80) }
        };
        for (one, other, may_be) in
            [(at(1, 3), at(0, 0), true), (at(1, 3), at(1, 4), false), (at(1, 0), at(2, 0), false)]
        {
            assert_eq!((one.may_be(&other), other.may_be(&one)), (may_be, may_be), "{one:?} {other:?}");
        }
    }

    #[test]
    fn two_sockets_of_one_inode_have_their_own_values_and_without_a_proof_none() {
        let values: BySocket<&str> = [
            (socket(Some(1), 5, 80), "first"),
            (socket(Some(2), 5, 80), "second"),
            (socket(None, 7, 80), "third"),
            (socket(None, 7, 81), "fourth"),
        ]
        .into_iter()
        .collect();
        for (of, value, may_have) in [
            (socket(Some(1), 5, 80), Some("first"), true),
            (socket(Some(2), 5, 80), Some("second"), true),
            (socket(Some(3), 5, 80), None, false),
            (socket(None, 5, 80), None, true),
            (socket(Some(4), 7, 80), Some("third"), true),
            (socket(None, 7, 81), Some("fourth"), true),
            (socket(None, 7, 82), None, false),
            (SocketRef::of_inode(7), None, true),
            (SocketRef::of_inode(6), None, false),
        ] {
            assert_eq!((values.get(&of).copied(), values.may_have(&of)), (value, may_have), "{of:?}");
        }
    }

    #[test]
    fn an_inode_that_two_sockets_have_is_not_searched_for() {
        let sockets = [
            socket(None, 5, 80),
            socket(None, 5, 81),
            socket(None, 5, 80),
            socket(Some(1), 6, 80),
            socket(Some(2), 6, 80),
            socket(None, 7, 80),
            socket(None, 7, 80),
        ];
        assert_eq!(unique_inodes(sockets.into_iter()).collect::<Vec<_>>(), [7]);
    }
}
