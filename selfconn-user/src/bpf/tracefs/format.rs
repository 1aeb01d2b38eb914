//! Compares a tracepoint's `format` file with the record layout that the perf tracepoint program expects.
//! Pure.
//!
//! The program's offsets are constants, because the verifier refuses run-time offsets into the context. A
//! kernel with a different layout must be refused: before v5.6 `protocol` was one byte, and every later field
//! was one byte earlier.

/// A field that a program reads: name, offset in bytes and size in bytes.
type FormatField = (&'static str, u32, u32);

/// The fields of `sys_enter_bind`. Each argument of a system call has eight bytes.
pub const BIND_ENTER: &[FormatField] = &[("fd", 16, 8), ("umyaddr", 24, 8)];
/// The fields of `sys_exit_bind`.
pub const BIND_EXIT: &[FormatField] = &[("ret", 16, 8)];
/// The fields of `inet_sock_set_state`.
pub const SET_STATE: &[FormatField] = &[
    ("skaddr", 8, 8),
    ("oldstate", 16, 4),
    ("newstate", 20, 4),
    ("sport", 24, 2),
    ("dport", 26, 2),
    ("family", 28, 2),
    ("protocol", 30, 2),
    ("saddr_v6", 40, 16),
    ("daddr_v6", 56, 16),
];

/// Checks that the record has the layout that the program expects.
///
/// # Errors
/// If a field is missing, or has another offset or size than expected; the error says which.
pub fn check(format: &str, expected: &[FormatField]) -> Result<(), String> {
    for &(name, offset, size) in expected {
        match format.lines().find_map(|line| field(line, name)) {
            None => return Err(format!("the record has no field {name}")),
            Some((found_offset, found_size)) if (found_offset, found_size) != (offset, size) => {
                return Err(format!(
                    "this kernel has other offsets in the record than the program reads, as with the real-time patches \
                     before Linux 6.12: field {name} has {found_size} bytes at {found_offset}, not {size} at {offset}"
                ));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The offset and the size, if `line` describes the field `name`: `field:__u8 saddr_v6[16];`, `offset:40;`,
/// `size:16;`.
fn field(line: &str, name: &str) -> Option<(u32, u32)> {
    let mut parts = line.trim().split(';').map(str::trim);
    let declaration = parts.next()?.strip_prefix("field:")?;
    let declared = declaration.rsplit([' ', '*']).next()?;
    if declared.split('[').next()? != name {
        return None;
    }
    let mut number = |key: &str| parts.next()?.strip_prefix(key)?.parse().ok();
    Some((number("offset:")?, number("size:")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const V6_18: &str = include_str!("../../../tests/fixtures/inet_sock_set_state-6.18.format");

    #[test]
    fn a_recorded_format_is_accepted() {
        assert_eq!(check(V6_18, SET_STATE), Ok(()));
    }

    #[test]
    fn the_error_names_the_field_that_differs() {
        for (from, to, says) in [
            ("protocol;\toffset:30;\tsize:2", "protocol;\toffset:30;\tsize:1", "protocol has 1 bytes at 30"),
            ("saddr_v6[16];\toffset:40", "saddr_v6[16];\toffset:39", "saddr_v6 has 16 bytes at 39"),
            ("dport", "dpork", "no field dport"),
            ("offset:24", "offset:many", "no field sport"),
        ] {
            let changed = V6_18.replace(from, to);
            assert_ne!(changed, V6_18, "the row must change something: {from}");
            let why = check(&changed, SET_STATE).unwrap_err();
            assert!(why.contains(says), "{why}");
        }
        assert!(check("", SET_STATE).is_err());
        assert!(check("field:;;;\nfield:\n;\n", SET_STATE).is_err());
    }
}
