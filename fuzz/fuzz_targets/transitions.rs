//! Bytes as they come out of the ring buffer: whatever they say, no self-connection is opened twice, closed twice, or
//! closed without having been opened.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use selfconn::connection::{Connections, Happening};
use selfconn_ebpf::Transition;

fuzz_target!(|bytes: &[u8]| {
    let Some((witnesses, records)) = bytes.split_first() else { return };
    let mut connections = Connections::new(1 + witnesses % 2);
    let (mut opened, mut closed) = (HashSet::new(), HashSet::new());
    for record in records.chunks(size_of::<Transition>()) {
        let Some(mut transition) = Transition::from_bytes(record) else { break };
        // There are four programs.
        transition.witness %= 4;
        connections.apply(&transition, |happening| match happening {
            Happening::Established(connection) => assert!(opened.insert(connection.number)),
            Happening::State(..) => {}
            Happening::Closed(connection, _) => {
                assert!(opened.contains(&connection.number));
                assert!(closed.insert(connection.number));
            }
        });
    }
    assert_eq!(connections.iter().count(), opened.len() - closed.len());
});
