//! The programs without a daemon, so that a test can look into their maps.

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
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let options = TracerOptions {
            hooks,
            bind_method: RequestedBindMethod::Off,
            object: ObjectOptions { connect_table_size: 1 << 14, ..ObjectOptions::MINIMAL },
        };
        work(&mut Tracer::start(&KernelFeatures::probe(false).unwrap(), options).unwrap());
    });
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
