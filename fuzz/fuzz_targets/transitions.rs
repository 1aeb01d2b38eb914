//! Fuzzes connection tracking with arbitrary records of the ring buffer: no self-connection may be
//! established twice, closed twice, or closed without having been established.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use selfconn::detect::connection::{ConnectionEvent, Connections};
use selfconn_ebpf::{Transition, names::PROGRAMS};
use zerocopy::FromBytes as _;

fuzz_target!(|bytes: &[u8]| {
    let Some((probe_count, records)) = bytes.split_first() else { return };
    let mut connections = Connections::new(1 + probe_count % 2);
    let (mut established, mut closed) = (HashSet::new(), HashSet::new());
    for record in records.chunks(size_of::<Transition>()) {
        let Ok(mut transition) = Transition::read_from_bytes(record) else { break };
        transition.probe_id %= PROGRAMS.len() as u8;
        connections.apply(&transition, |event| match event {
            ConnectionEvent::Established(connection) => assert!(established.insert(connection.number)),
            ConnectionEvent::State(..) => {}
            ConnectionEvent::Closed(connection, _) => {
                assert!(established.contains(&connection.number));
                assert!(closed.insert(connection.number));
            }
        });
    }
    assert_eq!(connections.iter().count(), established.len() - closed.len());
});
