//! One file for each command: its options, and what it does with them.

pub mod doctor;
pub mod repro;
pub mod run;
pub mod scan;
