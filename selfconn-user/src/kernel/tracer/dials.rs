//! The programs' table of dials in flight and of self-connections, by the socket.

use anyhow::Result;
use aya::{
    Pod,
    maps::{Array, Map, MapData},
};
use selfconn_ebpf::{Dial, DialSet, set_of};

/// The table.
pub(super) struct Dials(Array<MapData, Set>);

/// A value of [`selfconn_ebpf::names::DIALS`].
#[repr(transparent)]
#[derive(Clone, Copy)]
struct Set(DialSet);

// SAFETY: integers and byte arrays without padding, for which every bit pattern is a value.
unsafe impl Pod for Set {}

impl Dials {
    pub(super) fn of(map: Map) -> Result<Self> {
        Ok(Self(Array::try_from(map)?))
    }

    /// What is remembered now, by the socket. Walks the table.
    pub(super) fn all(&self) -> Result<Vec<(u64, Dial)>> {
        let mut remembered = Vec::new();
        for set in self.0.iter() {
            let DialSet { socks, dials } = set?.0;
            let entries = socks.into_iter().zip(dials);
            remembered.extend(entries.filter(|(sock, dial)| *sock != 0 && dial.is_about(*sock as u32)));
        }
        Ok(remembered)
    }

    /// Forgets a socket.
    pub(super) fn forget(&mut self, sock: u64) -> Result<()> {
        let index = set_of(sock as u32, self.0.len());
        // What the programs write into the same set between these two calls is lost, and costs a name.
        let Set(mut set) = self.0.get(&index, 0)?;
        for other in set.socks.iter_mut().filter(|other| **other == sock) {
            *other = 0;
        }
        Ok(self.0.set(index, Set(set), 0)?)
    }
}
