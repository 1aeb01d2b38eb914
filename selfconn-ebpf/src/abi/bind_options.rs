//! The options of a socket that decide whether it shares its port with another one.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The byte of `struct sock_common` that has `skc_reuse` (4 bits), `skc_reuseport` and `skc_ipv6only`
/// (include/net/sock.h at v5.10 and v7.0), with a mark that it was read. The kernel fills the bits of a byte from the
/// lowest on little-endian machines, which are the only ones that the programs are built for.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct BindOptions(u8);

impl BindOptions {
    const REUSE: u8 = 0x0f;
    const REUSEPORT: u8 = 0x10;
    const IPV6ONLY: u8 = 0x20;
    const KNOWN: u8 = 0x80;

    /// The options are unknown.
    pub const UNKNOWN: Self = Self(0);

    /// `byte` is the kernel's.
    #[inline(always)]
    #[must_use]
    pub const fn from_kernel(byte: u8) -> Self {
        Self(byte & (Self::REUSE | Self::REUSEPORT | Self::IPV6ONLY) | Self::KNOWN)
    }

    /// The options of a socket with SO_REUSEADDR, SO_REUSEPORT and IPV6_V6ONLY as given.
    #[must_use]
    pub const fn new(reuse: bool, reuseport: bool, ipv6only: bool) -> Self {
        Self::from_kernel(reuse as u8 | (reuseport as u8) << 4 | (ipv6only as u8) << 5)
    }

    /// False: nothing is known.
    #[must_use]
    pub const fn is_known(self) -> bool {
        self.0 & Self::KNOWN != 0
    }

    /// SO_REUSEADDR. False if it is unknown.
    #[must_use]
    pub const fn has_reuse(self) -> bool {
        self.0 & Self::REUSE != 0
    }

    /// SO_REUSEPORT. False if it is unknown.
    #[must_use]
    pub const fn has_reuseport(self) -> bool {
        self.0 & Self::REUSEPORT != 0
    }

    /// IPV6_V6ONLY, which `bind()` to an IPv6 address that is neither unspecified nor v4-mapped sets, too
    /// (`__inet6_bind`, net/ipv6/af_inet6.c at v5.10). `None`: unknown.
    #[must_use]
    pub fn is_ipv6only(self) -> Option<bool> {
        self.is_known().then_some(self.0 & Self::IPV6ONLY != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_options_are_the_bits_of_the_kernel() {
        for (byte, reuse, reuseport, ipv6only) in [
            (0x40, false, false, false),
            (0x41, true, false, false),
            // SK_FORCE_REUSE.
            (0x02, true, false, false),
            (0x50, false, true, false),
            (0x60, false, false, true),
            (0x71, true, true, true),
        ] {
            let options = BindOptions::from_kernel(byte);
            let got = (options.has_reuse(), options.has_reuseport(), options.is_ipv6only());
            assert_eq!(got, (reuse, reuseport, Some(ipv6only)), "{byte:#x}");
            if byte & 0x0f != 2 {
                assert_eq!(options, BindOptions::new(reuse, reuseport, ipv6only));
            }
        }
        let unknown = BindOptions::UNKNOWN;
        assert!(!unknown.is_known() && !unknown.has_reuse() && !unknown.has_reuseport());
        assert_eq!(unknown.is_ipv6only(), None);
    }
}
