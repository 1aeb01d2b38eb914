//! A process that connects to a server again and again, and holds many connections meanwhile.

use std::{collections::VecDeque, io::Write as _, net::SocketAddr, thread, time::Duration};

use socket2::{Domain, Socket, Type};

use super::print_output;

const THREADS: usize = 4;

/// Number of connections that each thread holds.
const HELD: usize = 200;

/// Number of connections that a thread makes without a pause of a millisecond. All threads make some thousand a second:
/// several times as many as one in a millisecond, and fewer than a server accepts.
const AT_ONCE: usize = 2;

/// Number of connections of a thread after which the flood has begun.
const FIRST: usize = 2_000;

/// Connects without end. Every second connection sends this request, and none reads a response.
pub(super) fn flood(server: SocketAddr, request: &'static [u8]) -> ! {
    for _ in 1..THREADS {
        thread::spawn(move || flood_by_one_thread(server, request, || {}));
    }
    flood_by_one_thread(server, request, || print_output("flooding"))
}

fn flood_by_one_thread(server: SocketAddr, request: &[u8], on_begin: impl Fn()) -> ! {
    let mut held = VecDeque::new();
    let mut made = 0_usize;
    loop {
        // connect() does not wait for an answer, as it would if the server had no room for the connection.
        let socket = Socket::new(Domain::for_address(server), Type::STREAM.nonblocking(), None).unwrap();
        // A close by a reset leaves no TIME_WAIT, so the source ports are never used up.
        socket.set_linger(Some(Duration::ZERO)).unwrap();
        let _ = socket.connect(&server.into());
        made += 1;
        if made.is_multiple_of(2) {
            let _ = (&socket).write(request);
        }
        held.push_back(socket);
        if held.len() > HELD {
            held.pop_front();
        }
        if made == FIRST {
            on_begin();
        }
        if made.is_multiple_of(AT_ONCE) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}
