//! The programs without a daemon, so that a test can look into their maps.

use std::{sync::Once, thread};

use selfconn::bpf::{
    attach::RequestedHooks,
    bind_method::RequestedBindMethod,
    features::KernelFeatures,
    loader::{Tracer, TracerOptions},
    object::ObjectOptions,
};

use super::netns::TestNetns;

/// Runs `work` with the programs loaded and attached by this process, without a daemon.
pub(crate) fn with_tracer(work: impl FnOnce(&mut Tracer)) {
    with_tracer_on(RequestedHooks::default(), work);
}

/// As [`with_tracer`], with these hooks and methods only.
pub(crate) fn with_tracer_on(hooks: RequestedHooks, work: impl FnOnce(&mut Tracer)) {
    let object = ObjectOptions { connect_table_size: 1 << 14, ..ObjectOptions::MINIMAL };
    with_object(hooks, object, work);
}

/// As [`with_tracer_on`], with this object.
pub(crate) fn with_object(hooks: RequestedHooks, object: ObjectOptions, work: impl FnOnce(&mut Tracer)) {
    make_signal_sockets();
    runtime().block_on(async {
        let options = TracerOptions { hooks, bind_method: RequestedBindMethod::Off, object };
        work(&mut Tracer::start(&KernelFeatures::probe(false).unwrap(), options).unwrap());
    });
}

/// The first runtime of a process makes a pair of sockets for signals, which stays until the process ends, and with it
/// the network namespace of its thread. So this is that of the test process, and not that of the first test.
fn make_signal_sockets() {
    static ONCE: Once = Once::new();
    let make = || {
        TestNetns::enter_of_process(std::process::id());
        drop(runtime());
    };
    ONCE.call_once(|| thread::spawn(make).join().unwrap());
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Number of entries of a namespace in the connect table.
pub(crate) fn entry_count(tracer: &Tracer, net: TestNetns) -> usize {
    tracer
        .connect_entries()
        .unwrap()
        .iter()
        .filter(|(_, entry)| u64::from(entry.endpoint.netns) == net.inode)
        .count()
}
