//! One test at a time. Between fork and exec a process that one test starts has a copy of every descriptor of
//! the test process. With parallel tests the holder and the closer of a socket would be random. Besides, all
//! tests look at one kernel, and load tests need its CPUs.
//!
//! A test calls nothing for that: [`occupy`] is called by whatever a test needs first, for example a namespace
//! or the path of the binary. The test then has the machine until its thread ends.

use std::{
    cell::RefCell,
    fs::File,
    sync::{OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
    thread,
};

use rustix::fs::{FlockOperation, flock};

static MACHINE: RwLock<()> = RwLock::new(());

#[expect(dead_code, reason = "held until it is dropped")]
enum Turn {
    Alone(RwLockWriteGuard<'static, ()>),
    Shared(RwLockReadGuard<'static, ()>),
}

thread_local! {
    static TURN: RefCell<Option<Turn>> = const { RefCell::new(None) };
}

/// Waits until no other test has the machine, and takes it until the thread of the calling test ends.
pub(crate) fn occupy() {
    take(|| Turn::Alone(MACHINE.write().unwrap_or_else(PoisonError::into_inner)));
}

/// As [`occupy`], but other tests that share the machine run at the same time.
pub(crate) fn share() {
    take(|| Turn::Shared(MACHINE.read().unwrap_or_else(PoisonError::into_inner)));
}

/// Does nothing on a thread that already has its turn, and on the threads that a test starts, because the turn
/// of their test includes them. libtest names the thread of a test by the path of the test.
fn take(turn: impl FnOnce() -> Turn) {
    if !thread::current().name().is_some_and(|name| name.contains("::")) {
        assert!(MACHINE.try_write().is_err(), "the test must occupy the machine before it starts a thread");
        return;
    }
    TURN.with_borrow_mut(|taken| {
        taken.get_or_insert_with(|| {
            let turn = turn();
            exclude_other_binaries();
            turn
        });
    });
}

/// Waits until no other test binary is at work, and takes the kernel until this process ends. Daemons stay
/// alive between tests, so one turn is not enough. `/` is a file that any user can lock, in a virtual machine
/// too, and that nobody has to create.
fn exclude_other_binaries() {
    static KERNEL: OnceLock<File> = OnceLock::new();
    KERNEL.get_or_init(|| {
        let root = File::open("/").unwrap();
        flock(&root, FlockOperation::LockExclusive).unwrap();
        root
    });
}
