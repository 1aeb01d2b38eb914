//! The offsets of the kernel's fields, from its BTF.

use selfconn_ebpf::{ABSENT, DEATH_ROW, FIELDS, Field, OTHER_NET_REFS, OWN_PORT_RANGE, PORT_RANGE};

use crate::{bpf::btf::Btf, system::netns_cookie};

/// The offset of every field, and an error text if a field is missing that every BTF-based program needs.
pub(super) fn read_offsets(btf: &Btf<'_>) -> ([u32; FIELDS], Option<String>) {
    let mut offsets = [ABSENT; FIELDS];
    let mut missing = None;
    for (field, struct_name, member, is_needed) in Field::ALL {
        match btf.offset(struct_name, member) {
            Ok(Some(offset)) => offsets[field as usize] = offset,
            Ok(None) if is_needed => {
                missing = Some(format!("the kernel's BTF has no {struct_name}.{member}"));
            }
            Ok(None) => {}
            Err(error) if is_needed => missing = Some(error.to_string()),
            Err(_) => {}
        }
    }
    let refs = &mut offsets[Field::NetRefs as usize];
    for other in OTHER_NET_REFS {
        if *refs == ABSENT
            && let Ok(Some(offset)) = btf.offset("net", other)
        {
            *refs = offset;
        }
    }
    let unused = if btf.is_array("net", PORT_RANGE) { Field::PortRangePacked } else { Field::PortRangePair };
    offsets[unused as usize] = ABSENT;
    if !btf.is_number("inet_sock", OWN_PORT_RANGE) {
        offsets[Field::OwnPortRange as usize] = ABSENT;
    }
    let unused = if netns_cookie::current().is_some() { Field::NetnsHashMix } else { Field::NetnsCookie };
    offsets[unused as usize] = ABSENT;
    let offset = |of, member| btf.offset(of, member).ok().flatten();
    // A plain count before v5.19.
    if let Some(count) = offset(DEATH_ROW, "tw_count.counter") {
        offsets[Field::TimeWaitCount as usize] = count;
    }
    // The struct is a part of `struct net`, but for v6.0 and v6.1, where a pointer to it is.
    if let Some(max) = offset("net", "ipv4.tcp_death_row.sysctl_max_tw_buckets") {
        let row = std::mem::replace(&mut offsets[Field::DeathRow as usize], ABSENT);
        offsets[Field::TimeWaitMax as usize] = max;
        if offsets[Field::TimeWaitCount as usize] != ABSENT {
            offsets[Field::TimeWaitCount as usize] += row;
        }
    }
    (offsets, missing)
}
