//! Files, pipes, HTTP and the service manager, which no kernel handles differently. Runs on the host only.

pub(crate) mod accounting;
pub(crate) mod envelope;
pub(crate) mod log;
pub(crate) mod log_file;
pub(crate) mod metrics;
pub(crate) mod service;
pub(crate) mod stdout;
