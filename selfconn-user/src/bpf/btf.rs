//! Reads the offsets of struct members from the kernel's BTF. Pure: bytes in, offsets out.
//!
//! aya parses BTF too, but does not expose members. General parsers hold every type and string of the kernel
//! in memory (60 MiB, 120 ms). This parser walks the types once and keeps only the position of each type. The
//! format is described in `Documentation/bpf/btf.rst` at v6.12.

use anyhow::{Context as _, Result, bail, ensure};

const MAGIC: u16 = 0xeb9f;

/// The `enum` of kinds in `include/uapi/linux/btf.h`; only the kinds that this parser distinguishes have
/// names.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const ARRAY: u32 = 3;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const ENUM: u32 = 6;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const RESTRICT: u32 = 11;
    pub(super) const FUNC: u32 = 12;
    pub(super) const FUNC_PROTO: u32 = 13;
    pub(super) const VAR: u32 = 14;
    pub(super) const DATASEC: u32 = 15;
    pub(super) const DECL_TAG: u32 = 17;
    pub(super) const TYPE_TAG: u32 = 18;
    pub(super) const ENUM64: u32 = 19;
}

/// The kinds of types that can be looked up by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BtfKind {
    Struct,
    /// A typedef; a tracepoint appears as the typedef `btf_trace_NAME`.
    Typedef,
    Function,
}

impl BtfKind {
    const fn kind(self) -> u32 {
        match self {
            Self::Struct => kind::STRUCT,
            Self::Typedef => kind::TYPEDEF,
            Self::Function => kind::FUNC,
        }
    }
}

/// A kernel's types, borrowed from the bytes of `/sys/kernel/btf/vmlinux`, in this machine's byte order.
pub struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// The offset of each type in `types`; type id n has index n - 1.
    starts: Vec<u32>,
}

#[derive(Clone, Copy)]
struct BtfType {
    name: u32,
    info: u32,
    size_or_type: u32,
    /// The offset of the data that follows the common part.
    rest: usize,
}

impl BtfType {
    fn kind(self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    fn members(self) -> usize {
        (self.info & 0xffff) as usize
    }
}

impl<'a> Btf<'a> {
    /// Checks the header and records the offset of each type.
    ///
    /// # Errors
    /// If the bytes are not BTF of this byte order, if they are truncated, or if they contain a kind that
    /// this parser does not know.
    pub fn parse(bytes: &'a [u8]) -> Result<Self> {
        let header = bytes.get(..24).context("BTF: shorter than its header")?;
        let magic = u16::from_ne_bytes([header[0], header[1]]);
        ensure!(magic == MAGIC, "BTF: magic {magic:#06x} instead of {MAGIC:#06x}");
        let section = |at: usize| -> Result<&'a [u8]> {
            let start =
                word(header, 4)?.checked_add(word(header, at)?).context("BTF: an offset overflows")? as usize;
            let end = start.checked_add(word(header, at + 4)? as usize).context("BTF: a length overflows")?;
            bytes.get(start..end).context("BTF: a section ends beyond the file")
        };
        let mut btf = Self { types: section(8)?, strings: section(16)?, starts: Vec::new() };
        let mut at = 0;
        while at < btf.types.len() {
            btf.starts.push(u32::try_from(at)?);
            let ty = btf.type_at(at)?;
            at = ty.rest + rest_len(ty)?;
        }
        ensure!(at == btf.types.len(), "BTF: the last type ends beyond its section");
        Ok(btf)
    }

    /// True if the kernel has a type of this kind and name.
    #[must_use]
    pub fn has(&self, kind: BtfKind, name: &str) -> bool {
        self.find(kind, name).is_some()
    }

    /// True if an enum of the kernel has this enumerator.
    #[must_use]
    pub fn has_enumerator(&self, name: &str) -> bool {
        self.starts.iter().any(|start| {
            let Ok(ty) = self.type_at(*start as usize) else { return false };
            let is_named =
                |index| word(self.types, ty.rest + index * 8).is_ok_and(|of| self.is_named(of, name));
            ty.kind() == kind::ENUM && (0..ty.members()).any(is_named)
        })
    }

    /// The offset in bytes of `member` in struct `name`. `a.b` names a member of a member struct. Members of
    /// unnamed structs and unions are found as in C. `None`: there is no such struct or member.
    ///
    /// # Errors
    /// If the BTF is inconsistent, or if the member is a bit field that does not begin a byte.
    pub fn offset(&self, name: &str, member: &str) -> Result<Option<u32>> {
        Ok(self.find_member(name, member)?.map(|(offset, _)| offset))
    }

    /// True if this member is an array. `name` and `member` are as in [`Self::offset`].
    #[must_use]
    pub fn is_array(&self, name: &str, member: &str) -> bool {
        matches!(self.find_member(name, member), Ok(Some((_, ty))) if ty.kind() == kind::ARRAY)
    }

    /// True if the member has the type of a number.
    #[must_use]
    pub fn is_number(&self, name: &str, member: &str) -> bool {
        matches!(self.find_member(name, member), Ok(Some((_, ty))) if ty.kind() == kind::INT)
    }

    /// The offset in bytes and the underlying type of a member.
    fn find_member(&self, name: &str, member: &str) -> Result<Option<(u32, BtfType)>> {
        let Some(mut ty) = self.find(BtfKind::Struct, name) else { return Ok(None) };
        let mut bits = 0_u32;
        for part in member.split('.') {
            let Some((offset, of)) = self.member(ty, part, 0)? else { return Ok(None) };
            bits = bits.checked_add(offset).context("BTF: an offset overflows")?;
            ty = self.resolve(of)?;
        }
        ensure!(bits.is_multiple_of(8), "BTF: {name}.{member} is a bit field within a byte");
        Ok(Some((bits / 8, ty)))
    }

    /// Builds a small BTF in which only these types have names; each has the same type id as in the kernel's
    /// BTF. It is meant for a parser that keeps everything it reads but is needed only for these ids. Types
    /// that the kernel does not have are left out.
    #[must_use]
    pub fn excerpt(&self, requested: &[(BtfKind, &str)]) -> Vec<u8> {
        let found =
            requested.iter().filter_map(|(kind, name)| Some((self.index(*kind, name)?, kind.kind(), *name)));
        let found: Vec<(usize, u32, &str)> = found.collect();
        let last = found.iter().map(|(index, ..)| index + 1).max().unwrap_or(0);
        // The entries between the requested types are pointers to type 0 (void).
        let mut types = vec![[0, kind::PTR << 24, 0]; last];
        let mut strings = vec![0];
        for (index, kind, name) in found {
            types[index] = [strings.len() as u32, kind << 24, 0];
            strings.extend_from_slice(name.as_bytes());
            strings.push(0);
        }
        let types_len = (types.len() * 12) as u32;
        let header = [24, 0, types_len, types_len, strings.len() as u32];
        let mut bytes = MAGIC.to_ne_bytes().to_vec();
        bytes.extend([1, 0]);
        bytes.extend(header.into_iter().chain(types.into_iter().flatten()).flat_map(u32::to_ne_bytes));
        bytes.extend(strings);
        bytes
    }

    fn find(&self, kind: BtfKind, name: &str) -> Option<BtfType> {
        self.type_at(self.starts[self.index(kind, name)?] as usize).ok()
    }

    /// The index in `starts`, which is the type id minus one.
    fn index(&self, kind: BtfKind, name: &str) -> Option<usize> {
        let matches = |ty: BtfType| ty.kind() == kind.kind() && self.is_named(ty.name, name);
        self.starts.iter().position(|start| self.type_at(*start as usize).is_ok_and(matches))
    }

    /// The offset in bits and the type id of a member.
    fn member(&self, of: BtfType, name: &str, depth: u32) -> Result<Option<(u32, u32)>> {
        ensure!(depth < 16, "BTF: structs nested without end");
        if of.kind() != kind::STRUCT && of.kind() != kind::UNION {
            return Ok(None);
        }
        // If the kind flag is set, the lower 24 bits are the offset and the upper 8 bits are the width of a
        // bit field.
        let has_widths = of.info >> 31 == 1;
        for index in 0..of.members() {
            let at = of.rest + index * 12;
            let (member_name, ty, offset) =
                (word(self.types, at)?, word(self.types, at + 4)?, word(self.types, at + 8)?);
            let bits = if has_widths { offset & 0x00ff_ffff } else { offset };
            if self.is_named(member_name, name) {
                return Ok(Some((bits, ty)));
            }
            if member_name == 0
                && let Some((inner, ty)) = self.member(self.resolve(ty)?, name, depth + 1)?
            {
                return Ok(Some((bits.checked_add(inner).context("BTF: an offset overflows")?, ty)));
            }
        }
        Ok(None)
    }

    /// Follows typedefs and qualifiers to the underlying type.
    fn resolve(&self, mut id: u32) -> Result<BtfType> {
        for _ in 0..32 {
            let index = (id as usize).checked_sub(1).context("BTF: a member of type void")?;
            let ty = self.type_at(*self.starts.get(index).context("BTF: no such type id")? as usize)?;
            match ty.kind() {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = ty.size_or_type;
                }
                _ => return Ok(ty),
            }
        }
        bail!("BTF: typedefs nested without end")
    }

    fn type_at(&self, at: usize) -> Result<BtfType> {
        Ok(BtfType {
            name: word(self.types, at)?,
            info: word(self.types, at + 4)?,
            size_or_type: word(self.types, at + 8)?,
            rest: at + 12,
        })
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        self.strings
            .get(offset as usize..)
            .and_then(|rest| rest.strip_prefix(name.as_bytes()))
            .is_some_and(|rest| rest.first() == Some(&0))
    }
}

/// The number of bytes that follow the common part of a type.
fn rest_len(ty: BtfType) -> Result<usize> {
    Ok(match ty.kind() {
        kind::INT | kind::VAR | kind::DECL_TAG => 4,
        kind::ARRAY => 12,
        kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => ty.members() * 12,
        kind::ENUM | kind::FUNC_PROTO => ty.members() * 8,
        // FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
        kind::PTR | 7..=12 | 16 | 18 => 0,
        unknown => bail!("BTF: kind {unknown} is newer than this program"),
    })
}

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let bytes =
        at.checked_add(4).and_then(|end| bytes.get(at..end)).context("BTF: ends in the middle of a type")?;
    Ok(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Builds BTF as a compiler does: `types` are the words of all types, `strings` follow the empty string.
    fn btf(types: &[u32], strings: &str) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut out = MAGIC.to_ne_bytes().to_vec();
        out.extend([1, 0]);
        for word in [24, 0, types.len(), types.len(), strings.len() + 1] {
            out.extend(u32::try_from(word).unwrap().to_ne_bytes());
        }
        out.extend(types);
        out.push(0);
        out.extend(strings.as_bytes());
        out
    }

    const fn info(kind: u32, members: u32, flag: bool) -> u32 {
        kind << 24 | members | (flag as u32) << 31
    }

    /// `struct outer { int a; union { int b; struct inner in; }; int flag:3; }; struct inner { int x; int y;
    /// };`
    fn sample() -> Vec<u8> {
        // offsets of strings: 1 int, 5 outer, 11 a, 13 b, 15 in, 18 flag, 23 inner, 29 x, 31 y, 33
        // btf_trace_t
        let strings = "int\0outer\0a\0b\0in\0flag\0inner\0x\0y\0btf_trace_t\0";
        btf(
            &[
                // 1: int
                1,
                info(kind::INT, 0, false),
                4,
                32,
                // 2: struct outer, with bit field widths
                5,
                info(kind::STRUCT, 3, true),
                16,
                11,
                1,
                0,
                0,
                3,
                32,
                18,
                1,
                3 << 24 | 96,
                // 3: the union
                0,
                info(kind::UNION, 2, false),
                8,
                13,
                1,
                0,
                15,
                5,
                0,
                // 4: struct inner
                23,
                info(kind::STRUCT, 2, false),
                8,
                29,
                1,
                0,
                31,
                1,
                32,
                // 5: const struct inner
                0,
                info(kind::CONST, 0, false),
                4,
                // 6: typedef
                33,
                info(kind::TYPEDEF, 0, false),
                5,
            ],
            strings,
        )
    }

    #[test]
    fn members_are_found_through_unnamed_unions_qualifiers_and_paths() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        for (of, member, offset) in [
            ("outer", "a", Some(0)),
            ("outer", "b", Some(4)),
            ("outer", "in", Some(4)),
            ("outer", "in.y", Some(8)),
            ("inner", "y", Some(4)),
            ("outer", "nothing", None),
            ("outer", "a.b", None),
            ("nothing", "a", None),
            ("inne", "x", None),
        ] {
            assert_eq!(btf.offset(of, member).unwrap(), offset, "{of}.{member}");
        }
        assert!(btf.has(BtfKind::Typedef, "btf_trace_t"));
        assert!(!btf.has(BtfKind::Typedef, "btf_trace"));
        assert!(!btf.has(BtfKind::Function, "outer"));
    }

    #[test]
    fn an_excerpt_has_the_requested_types_under_their_original_ids() {
        let bytes = sample();
        let btf = Btf::parse(&bytes).unwrap();
        let requested = [
            (BtfKind::Typedef, "btf_trace_t"),
            (BtfKind::Struct, "inner"),
            (BtfKind::Function, "inner"),
            (BtfKind::Struct, "nothing"),
        ];
        let excerpt = btf.excerpt(&requested);
        let excerpt = Btf::parse(&excerpt).unwrap();
        for (kind, name) in requested {
            assert_eq!(excerpt.index(kind, name), btf.index(kind, name), "{name}");
        }
        assert_eq!(excerpt.index(BtfKind::Typedef, "btf_trace_t"), Some(5));
        assert!(!excerpt.has(BtfKind::Struct, "outer"));
        assert_eq!(Btf::parse(&btf.excerpt(&[])).unwrap().starts.len(), 0);
        assert!(
            aya::Btf::parse(&btf.excerpt(&requested), aya::Endianness::default()).is_ok(),
            "aya reads it"
        );
    }

    #[test]
    fn a_bit_field_has_an_offset_if_it_begins_a_byte() {
        let mut bytes = sample();
        assert_eq!(Btf::parse(&bytes).unwrap().offset("outer", "flag").unwrap(), Some(12));
        let word = (3_u32 << 24 | 96).to_ne_bytes();
        let at = bytes.windows(4).position(|bytes| bytes == word).unwrap();
        bytes[at..at + 4].copy_from_slice(&(3_u32 << 24 | 97).to_ne_bytes());
        let error = Btf::parse(&bytes).unwrap().offset("outer", "flag").unwrap_err();
        assert!(error.to_string().contains("bit field"), "{error}");
    }

    #[test]
    fn damaged_btf_is_an_error_and_never_a_panic() {
        let bytes = sample();
        for cut in 0..bytes.len() {
            let _ = Btf::parse(&bytes[..cut]).map(|btf| btf.offset("outer", "in.y"));
        }
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0xff;
            let _ = Btf::parse(&bytes).map(|btf| btf.offset("outer", "in.y"));
        }
        assert!(Btf::parse(b"").is_err());
        assert!(Btf::parse(&[0; 64]).is_err());
    }
}
