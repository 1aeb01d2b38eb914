//! The ABI between the eBPF programs and user space: the records in the ring buffer, the classification of
//! TCP state transitions, the kernel fields whose offsets are set at load, and the names of programs, maps
//! and globals.
//!
//! Nothing in this library reads kernel memory, so all of it is tested on the host. The programs are in
//! `main.rs`.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

#[cfg(test)]
extern crate std;

mod abi;

pub use abi::*;
