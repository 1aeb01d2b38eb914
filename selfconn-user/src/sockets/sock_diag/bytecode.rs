//! Builds the filter that the kernel runs on each socket of a dump, so that the kernel copies few sockets to
//! user space that are not self-connections.
//!
//! The bytecode can compare a field only with a constant, never with another field (`inet_diag_bc_run`,
//! net/ipv4/inet_diag.c at v5.10). Therefore the ports are divided into ranges, and a socket passes if both
//! of its ports are in the same range. Every self-connection passes. Of other sockets with evenly distributed
//! ports, one in [`RANGES`] passes.

/// The number of port ranges. With more ranges fewer sockets pass, but before each dump the kernel verifies
/// the bytecode, and the cost grows with the square of its length: 64 ranges cost 20 µs, 512 cost 0.9 ms.
/// With 200,000 sockets, 64 ranges are as fast as more.
const RANGES: u32 = 64;

/// `INET_DIAG_BC_*`, include/uapi/linux/inet_diag.h at v5.10.
mod op {
    pub(crate) const JMP: u8 = 1;
    pub(crate) const S_GE: u8 = 2;
    pub(crate) const S_LE: u8 = 3;
    pub(crate) const D_GE: u8 = 4;
    pub(crate) const D_LE: u8 = 5;
}

/// The size of `struct inet_diag_bc_op`. A comparison of ports consists of two of them; the port is in the
/// field `no` of the second one.
const OP: usize = 4;
const COMPARISON: usize = 2 * OP;

/// The size of a leaf of the decision tree: two comparisons and a jump to the end.
const LEAF: usize = 2 * COMPARISON + OP;

/// The bytecode that accepts a socket if both ports are in the same range. A jump to the end of the code
/// accepts the socket; a jump to one instruction past the end rejects it.
pub(crate) fn same_range() -> Vec<u8> {
    let leaves = RANGES as usize;
    let mut code = Vec::with_capacity(leaves * LEAF + (leaves - 1) * COMPARISON);
    emit(&mut code, 0, 1 << 16, RANGES, leaves * LEAF + (leaves - 1) * COMPARISON);
    code
}

/// The bytecode that accepts a socket with this local port.
pub(crate) fn local_port(port: u16) -> Vec<u8> {
    let (mut code, end) = (Vec::with_capacity(2 * COMPARISON), 2 * COMPARISON);
    compare(&mut code, op::S_GE, port.into(), |at| end + OP - at);
    compare(&mut code, op::S_LE, port.into(), |at| end + OP - at);
    code
}

/// Appends the code for source ports in `low..high`, divided into `ranges` ranges. `end` is the length of the
/// whole code.
fn emit(code: &mut Vec<u8>, low: u32, high: u32, ranges: u32, end: usize) {
    if ranges == 1 {
        compare(code, op::D_GE, low, |at| end + OP - at);
        compare(code, op::D_LE, high - 1, |at| end + OP - at);
        let distance_to_end = end - code.len();
        instruction(code, op::JMP, OP, distance_to_end);
        return;
    }
    let middle = low.midpoint(high);
    let half = ranges / 2;
    let upper = half as usize * LEAF + (half as usize - 1) * COMPARISON;
    compare(code, op::S_GE, middle, |_| COMPARISON + upper);
    emit(code, middle, high, half, end);
    emit(code, low, middle, half, end);
}

/// Appends a comparison. If it is true, execution continues with the next instruction. If it is false,
/// execution jumps by the distance that `jump_distance` returns for the position of the comparison.
fn compare(code: &mut Vec<u8>, operation: u8, port: u32, jump_distance: impl Fn(usize) -> usize) {
    let distance = jump_distance(code.len());
    instruction(code, operation, COMPARISON, distance);
    instruction(code, 0, 0, port as usize);
}

fn instruction(code: &mut Vec<u8>, operation: u8, yes: usize, no: usize) {
    debug_assert!(yes <= usize::from(u8::MAX) && no <= usize::from(u16::MAX));
    code.extend([operation, yes as u8]);
    code.extend((no as u16).to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Op {
        code: u8,
        yes: usize,
        no: usize,
    }

    fn at(code: &[u8], position: usize) -> Op {
        let no = u16::from_ne_bytes([code[position + 2], code[position + 3]]);
        Op { code: code[position], yes: code[position + 1].into(), no: no.into() }
    }

    /// Interprets the code as `inet_diag_bc_run` does.
    fn passes(code: &[u8], source: u16, destination: u16) -> bool {
        let mut position = 0;
        while position < code.len() {
            let op = at(code, position);
            let port = || at(code, position + OP).no;
            let holds = match op.code {
                op::JMP => false,
                op::S_GE => usize::from(source) >= port(),
                op::D_GE => usize::from(destination) >= port(),
                op::D_LE => usize::from(destination) <= port(),
                other => panic!("operation {other}"),
            };
            position += if holds { op.yes } else { op.no };
        }
        position == code.len()
    }

    #[test]
    fn every_self_connection_passes() {
        let code = same_range();
        for port in 1..=u16::MAX {
            assert!(passes(&code, port, port), "{port}");
        }
    }

    #[test]
    fn another_socket_passes_only_if_both_ports_are_in_one_range() {
        let code = same_range();
        let width = (1 << 16) / RANGES;
        for (source, destination) in [
            (40_000, 443),
            (443, 40_000),
            (1_023, 1_024),
            (1_024, 1_023),
            (0, 65_535),
            (65_535, 0),
            (40_000, 40_001),
        ] {
            let is_one_range = u32::from(source) / width == u32::from(destination) / width;
            assert_eq!(passes(&code, source, destination), is_one_range, "{source} {destination}");
        }
        let passing = (0..=u16::MAX).filter(|source| passes(&code, *source, 40_000)).count();
        assert_eq!(passing, width as usize);
    }

    /// Checks what `inet_diag_bc_audit` requires: each jump leads to an instruction, to the end of the code,
    /// or to one instruction past the end.
    #[test]
    fn the_code_passes_the_checks_of_the_kernel() {
        let code = same_range();
        let mut starts = vec![];
        let mut position = 0;
        while position < code.len() {
            starts.push(position);
            position += at(&code, position).yes;
        }
        assert_eq!(position, code.len());
        for position in starts.clone() {
            let target = position + at(&code, position).no;
            let is_end = target == code.len() || target == code.len() + OP;
            assert!(is_end || starts.contains(&target), "{position} jumps to {target}");
        }
    }
}
