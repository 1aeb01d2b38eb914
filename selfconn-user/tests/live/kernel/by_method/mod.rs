//! Tests that force one attach method after another. Runs on every kernel, and again under each lockdown, because a
//! lockdown decides which programs load and what they can read.

pub(crate) mod accident;
pub(crate) mod attribution;
pub(crate) mod bind_matrix;
pub(crate) mod bind_preemption;
pub(crate) mod detection;
pub(crate) mod early_warning;
pub(crate) mod guard;
pub(crate) mod kinds;
pub(crate) mod methods;
pub(crate) mod page_faults;
pub(crate) mod port_range;
pub(crate) mod programs;
pub(crate) mod transition_preemption;
