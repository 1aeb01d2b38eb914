//! A process whose memory map is locked for ever, because the server of a file that it has mapped gives no answer.

use std::{
    fs, io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::{fs::FileExt as _, process::CommandExt as _},
    },
    path::Path,
    process::Stdio,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread,
    time::Duration,
};

use super::{check, command};
use crate::support::client::socket;

/// A process that is hung closes its socket this long after its output.
const CLOSES_AFTER: Duration = Duration::from_millis(300);

/// What a process does when its memory map is locked.
#[derive(Clone, Copy)]
pub(super) enum OnceHung {
    /// It holds a self-connection.
    Hold,
    /// It holds one for a moment.
    HoldAndClose,
    /// It makes this number, one after another.
    Make(usize),
}

/// Connects a new socket to this address, or to itself, and resets the connection.
fn connect_and_reset(to: Option<SocketAddr>) {
    let client = socket(Ipv4Addr::LOCALHOST.into());
    client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let own = client.local_addr().unwrap();
    client.connect(&to.map_or(own, Into::into)).unwrap();
    client.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Reads each page of the program, so that none is missing later.
fn map_program() {
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let is_of_file = words.get(5).is_some_and(|path| path.starts_with('/'));
        if is_of_file && words[1].starts_with('r') {
            let (start, end) = words[0].split_once('-').unwrap();
            let address = |text| usize::from_str_radix(text, 16).unwrap();
            for page in (address(start)..address(end)).step_by(4_096) {
                // SAFETY: the mapping is readable, and nothing removes a part of the program.
                unsafe { std::ptr::read_volatile(page as *const u8) };
            }
        }
    }
}

/// What the threads do that lock the memory map.
#[derive(Default)]
struct Progress {
    is_reading: AtomicBool,
    is_unmapping: AtomicBool,
    /// How often the arguments of this process were read.
    looks: AtomicUsize,
}

/// Reads the page at this address, which never returns, and unmaps it. Returns when whoever reads the arguments of this
/// process waits.
fn lock_memory_map(address: usize) {
    let progress: &Progress = Box::leak(Box::default());
    thread::spawn(move || {
        while !progress.is_reading.load(Relaxed) {
            thread::sleep(Duration::from_millis(10));
        }
        thread::sleep(Duration::from_millis(600));
        progress.is_unmapping.store(true, Relaxed);
        // SAFETY: the mapping is not used any more, except by the read below, which never returns.
        unsafe { libc::munmap(address as *mut libc::c_void, 4_096) }
    });
    thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        progress.is_reading.store(true, Relaxed);
        // SAFETY: the mapping is readable. The read never returns.
        unsafe { std::ptr::read_volatile(address as *const u8) }
    });
    let arguments = fs::File::open("/proc/self/cmdline").unwrap();
    thread::spawn(move || {
        let mut first = [0; 1];
        while arguments.read_at(&mut first, 0).is_ok() {
            progress.looks.fetch_add(1, Relaxed);
            thread::sleep(Duration::from_millis(5));
        }
    });
    loop {
        let before = progress.looks.load(Relaxed);
        thread::sleep(Duration::from_millis(500));
        if progress.is_unmapping.load(Relaxed) && progress.looks.load(Relaxed) == before {
            return;
        }
    }
}

/// A page fault on a file that its server never gives holds the `mmap_lock` for reading. munmap() waits to
/// write, and every later reader waits behind it, such as a reader of `/proc/PID/cmdline`.
pub(super) fn hang(folder: &Path, once_hung: OnceHung) -> ! {
    use rustix::mount::{MountFlags, mount};
    let device = fs::File::options().read(true).write(true).open(folder.join("fuse")).unwrap();
    let mount_point = folder.join("mount");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = std::ffi::CString::new(options).unwrap();
    mount("x", &mount_point, "fuse", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).unwrap();
    let mut server = command("serve");
    server.stdin(Stdio::from(OwnedFd::from(device))).stdout(Stdio::null());
    // The server must end with this process: only then the kernel aborts its requests, and this process can end.
    // SAFETY: prctl is safe to call between fork and exec.
    unsafe { server.pre_exec(|| check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL))) };
    #[expect(clippy::zombie_processes, reason = "this process ends by SIGKILL, and its child with it")]
    let _server = server.spawn().unwrap();
    // The device is closed here, in this process: the command has it.
    drop(server);
    let file = fs::File::open(mount_point.join("f")).unwrap();
    // Everything that runs while the lock is held has run before, and its pages are there, because a page fault would
    // wait for the lock. A newer kernel may lock only a part of the map for it; 5.10 doesn't.
    map_program();
    let (client, listener) = (socket(Ipv4Addr::LOCALHOST.into()), TcpListener::bind("127.0.0.1:0").unwrap());
    let closed: SocketAddr = listener.local_addr().unwrap();
    connect_and_reset(Some(closed));
    drop(listener);
    assert!(socket(Ipv4Addr::LOCALHOST.into()).connect(&closed.into()).is_err());
    client.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    let own = client.local_addr().unwrap();
    thread::sleep(Duration::from_millis(1));
    // SAFETY: a new mapping, which nothing else refers to. The threads below use its address only.
    let page = unsafe {
        libc::mmap(std::ptr::null_mut(), 4_096, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0)
    };
    assert_ne!(page, libc::MAP_FAILED, "{}", io::Error::last_os_error());
    lock_memory_map(page as usize);
    match once_hung {
        OnceHung::Make(connections) => (0..connections).for_each(|_| connect_and_reset(None)),
        OnceHung::Hold | OnceHung::HoldAndClose => client.connect(&own).unwrap(),
    }
    let message = b"nobody: hung\n";
    // SAFETY: the buffer is valid for the call.
    unsafe { libc::write(1, message.as_ptr().cast(), message.len()) };
    if matches!(once_hung, OnceHung::HoldAndClose) {
        thread::sleep(CLOSES_AFTER);
        drop(client);
    }
    loop {
        // SAFETY: no arguments.
        unsafe { libc::pause() };
    }
}

/// Serves a filesystem with one file at stdin: two reads fail, and the others get no answer
/// (`include/uapi/linux/fuse.h`).
pub(super) fn serve() {
    const LOOKUP: u32 = 1;
    const FORGET: u32 = 2;
    const GETATTR: u32 = 3;
    const OPEN: u32 = 14;
    const READ: u32 = 15;
    const INIT: u32 = 26;
    const INTERRUPT: u32 = 36;
    const BATCH_FORGET: u32 = 42;
    let mut request = vec![0; 1 << 20];
    let mut reads = 0;
    loop {
        let length = match rustix::io::read(io::stdin(), &mut request[..]) {
            Ok(length) => length,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::NOENT) => continue,
            Err(_) => return,
        };
        // struct fuse_in_header: len, opcode, unique, nodeid.
        let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        assert!(length >= 40);
        let (opcode, unique, node) = (word(4), long(8), long(16));
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_ne_bytes()).collect::<Vec<u8>>();
        // struct fuse_attr: ino, size, blocks, three times, their nanoseconds, mode, nlink, uid, gid, rdev,
        // blksize, flags.
        let attributes = |node: u64| {
            let mode = if node == 1 { 0o040_755 } else { 0o100_644 };
            let mut attributes = [node, 4_096, 0, 0, 0, 0].map(u64::to_ne_bytes).concat();
            attributes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 0, 0]));
            attributes
        };
        let (error, body) = match opcode {
            // struct fuse_init_out: major, minor, max_readahead, flags, max_background, max_write, ...
            INIT => (0, words(&[7, 31, 4_096, 0, 0, 4_096, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
            // struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid, two nanoseconds, attr.
            LOOKUP => {
                let entry = [2, 0, 1_000, 1_000, 0].map(u64::to_ne_bytes).concat();
                (0, [entry, attributes(2)].concat())
            }
            // struct fuse_attr_out: attr_valid, nanoseconds and padding, attr.
            GETATTR => (0, [[1_000, 0].map(u64::to_ne_bytes).concat(), attributes(node)].concat()),
            // struct fuse_open_out: fh, open_flags, padding.
            OPEN => (0, [1, 0].map(u64::to_ne_bytes).concat()),
            READ if reads == 2 => continue,
            READ => {
                reads += 1;
                (-libc::EIO, Vec::new())
            }
            FORGET | INTERRUPT | BATCH_FORGET => continue,
            _ => (-libc::ENOSYS, Vec::new()),
        };
        // struct fuse_out_header: len, error, unique.
        let length = u32::try_from(16 + body.len()).unwrap();
        let mut reply = [length.to_ne_bytes(), error.to_ne_bytes()].concat();
        reply.extend(unique.to_ne_bytes());
        reply.extend(body);
        let _ = rustix::io::write(io::stdin(), &reply);
    }
}
