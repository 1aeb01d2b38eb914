//! A filter that the kernel runs over each socket of a dump, so that most of those that are not ours never leave it.
//!
//! Its bytecode compares a field with a constant only, never two fields (`inet_diag_bc_run`, net/ipv4/inet_diag.c at
//! v5.10). So the ports are cut into ranges, and a socket passes when both of its ports are in the same one: every
//! self-connection is, and of the others whose ports are all over the place one in [`RANGES`].

/// More of them let fewer pass, but before each dump the kernel checks the code, at a cost that grows with the square
/// of its length: 64 ranges cost 20 µs, 512 cost 0.9 ms. Over 200,000 sockets 64 are as good as more.
const RANGES: u32 = 64;

/// `INET_DIAG_BC_*`, include/uapi/linux/inet_diag.h at v5.10.
mod op {
    pub(super) const JMP: u8 = 1;
    pub(super) const S_GE: u8 = 2;
    pub(super) const D_GE: u8 = 4;
    pub(super) const D_LE: u8 = 5;
}

/// `struct inet_diag_bc_op`; a comparison of ports is two of them, the port in the second one's `no`.
const OP: usize = 4;
const COMPARISON: usize = 2 * OP;

/// A leaf of the tree: two comparisons and a jump to the end.
const LEAF: usize = 2 * COMPARISON + OP;

/// The code. A jump to its end accepts a socket, one to just behind the end rejects it.
pub(super) fn same_range() -> Vec<u8> {
    let leaves = RANGES as usize;
    let mut code = Vec::with_capacity(leaves * LEAF + (leaves - 1) * COMPARISON);
    emit(&mut code, 0, 1 << 16, RANGES, leaves * LEAF + (leaves - 1) * COMPARISON);
    code
}

/// Appends the code for source ports in `low..high`, cut into `ranges`. The whole code is `end` long.
fn emit(code: &mut Vec<u8>, low: u32, high: u32, ranges: u32, end: usize) {
    if ranges == 1 {
        compare(code, op::D_GE, low, |at| end + OP - at);
        compare(code, op::D_LE, high - 1, |at| end + OP - at);
        let to_the_end = end - code.len();
        instruction(code, op::JMP, OP, to_the_end);
        return;
    }
    let middle = low.midpoint(high);
    let half = ranges / 2;
    let upper = half as usize * LEAF + (half as usize - 1) * COMPARISON;
    compare(code, op::S_GE, middle, |_| COMPARISON + upper);
    emit(code, middle, high, half, end);
    emit(code, low, middle, half, end);
}

/// Goes on behind itself where the comparison holds, else as far as `otherwise` says of where it stands.
fn compare(code: &mut Vec<u8>, operation: u8, port: u32, otherwise: impl Fn(usize) -> usize) {
    let distance = otherwise(code.len());
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

    /// As `inet_diag_bc_run` does.
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
    fn no_self_connection_is_rejected() {
        let code = same_range();
        for port in 1..=u16::MAX {
            assert!(passes(&code, port, port), "{port}");
        }
    }

    #[test]
    fn others_pass_only_within_one_range() {
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

    /// What `inet_diag_bc_audit` asks for: each step stays on an instruction, or ends at the end or just behind it.
    #[test]
    fn the_kernel_finds_nothing_wrong_with_it() {
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
            let is_verdict = target == code.len() || target == code.len() + OP;
            assert!(is_verdict || starts.contains(&target), "{position} jumps to {target}");
        }
    }
}
