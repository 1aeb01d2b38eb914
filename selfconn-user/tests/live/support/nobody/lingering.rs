//! A process whose sockets linger when they are closed.

use std::{
    io::{ErrorKind, Write as _},
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::{process::getpid, thread::gettid};

use super::{super::client::socket, print_output};

/// Longer than any test.
const LINGER: Duration = Duration::from_hours(1);

/// Makes this number of connections to a listener of its own that takes none, and closes each while its data waits. Its
/// own closes are interrupted at once. Whoever closes such a socket in its place waits.
pub(super) fn close_lingering(count: usize) {
    let listener = socket(Ipv4Addr::LOCALHOST.into());
    // The kernel makes it as small as it may be.
    listener.set_recv_buffer_size(1).unwrap();
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    listener.listen(i32::try_from(count).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let is_closing = Arc::new(AtomicBool::new(false));
    interrupt_this_thread(Arc::clone(&is_closing));
    for _ in 0..count {
        let mut client = socket(Ipv4Addr::LOCALHOST.into());
        client.set_send_buffer_size(1).unwrap();
        match client.connect(&address) {
            Ok(()) => {}
            // By a signal for the close before.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => panic!("{error}"),
        }
        client.set_nonblocking(true).unwrap();
        while client.write(&[0; 4_096]).is_ok() {}
        client.set_linger(Some(LINGER)).unwrap();
        is_closing.store(true, Ordering::SeqCst);
        drop(client);
        is_closing.store(false, Ordering::SeqCst);
    }
    print_output("closed");
    // SAFETY: no arguments.
    unsafe { libc::pause() };
}

/// Ends the waits of this thread each millisecond while it closes.
fn interrupt_this_thread(is_closing: Arc<AtomicBool>) {
    extern "C" fn nothing(_: libc::c_int) {}
    let handler = nothing as extern "C" fn(libc::c_int) as *const () as libc::sighandler_t;
    // SAFETY: the handler does nothing.
    unsafe { libc::signal(libc::SIGUSR1, handler) };
    let (pid, tid) = (getpid().as_raw_nonzero().get(), gettid().as_raw_nonzero().get());
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_millis(1));
            if is_closing.load(Ordering::SeqCst) {
                // SAFETY: numbers only. The thread is there until the process ends.
                unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, libc::SIGUSR1) };
            }
        }
    });
}
