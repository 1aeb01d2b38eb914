//! Who: facts about a process from `/proc`, taken only while it is still the process that the kernel saw.

use std::{
    fs,
    io::{self, Read as _},
    os::unix::ffi::OsStrExt as _,
    rc::Rc,
};

use selfconn_ebpf::{Opener, Task};
use serde::Serialize;

/// Kernel clock ticks a second as `/proc` has them: `USER_HZ`, a constant of the ABI on all of aya's architectures.
const TICK_NS: u64 = 1_000_000_000 / 100;

/// As much of a command line as is told.
const CMDLINE_LIMIT: u64 = 4_096;

/// For how long what was read of a process is told again without reading, so that a process which opens thousands of
/// self-connections a second is read a few times.
const FRESH_NS: u64 = 100_000_000;

/// What `/proc` tells about a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub comm: Option<String>,
    /// Path of its program.
    pub exe: Option<String>,
    /// Its arguments, of at most 4,096 bytes.
    pub cmdline: Option<Vec<String>>,
    /// Path of its control group.
    pub cgroup: Option<String>,
    /// The systemd unit in that path.
    pub unit: Option<String>,
    /// The container id in that path.
    pub container: Option<String>,
}

/// Who is behind a connection, beside what the kernel saw of its opener.
#[derive(Clone, Debug, Default)]
pub struct Who {
    /// About the opener; where it is unknown, about the first holder.
    pub facts: Rc<Facts>,
    /// Which process has the socket open, where that was looked up.
    pub holders: Option<Vec<Holder>>,
}

/// A process that has a socket open, or closed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// In the initial pid namespace.
    pub pid: u32,
    /// Its name.
    pub comm: Option<String>,
}

impl Who {
    /// The opener was seen.
    #[must_use]
    pub fn opened(facts: Rc<Facts>) -> Self {
        Self { facts, holders: None }
    }

    /// Nobody saw it opened; these have it open.
    #[must_use]
    pub fn held(holders: Option<Vec<Holder>>) -> Self {
        let first = holders.as_ref().and_then(|holders| holders.first());
        let facts = first.and_then(|holder| read(holder.pid)).unwrap_or_default();
        Self { facts: Rc::new(facts), holders }
    }
}

/// A task as the kernel saw it do something. Times are of `CLOCK_BOOTTIME`.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    /// Which.
    pub task: Task,
    /// When its process started, in nanoseconds. 0: the kernel could not tell.
    pub start_ns: u64,
    /// When it was seen, in nanoseconds.
    pub at_ns: u64,
}

impl Sighting {
    /// Of who opened a connection.
    #[must_use]
    pub const fn of(opener: &Opener) -> Self {
        Self { task: opener.task, start_ns: opener.start_ns, at_ns: opener.at_ns }
    }

    /// Whether who has this pid now, and started then, had it when this was seen: of two that had it one after the
    /// other, the later one did not start before the earlier one was seen.
    const fn was_there(&self, start_ticks: u64) -> bool {
        start_ticks.saturating_add(1).saturating_mul(TICK_NS) <= self.at_ns
    }

    /// Whether its thread is there, by the name that it had. A program that was run since has none of the old threads
    /// but the first, and that one has the new program's name.
    fn is_there(&self) -> bool {
        let Task { pid, tid, ref comm, .. } = self.task;
        let len = comm.iter().position(|byte| *byte == 0).unwrap_or(comm.len());
        let name = fs::read(format!("/proc/{pid}/task/{tid}/comm"));
        name.is_ok_and(|name| name.strip_suffix(b"\n") == Some(&comm[..len]))
    }
}

/// Looks processes up.
#[derive(Debug)]
pub struct Processes {
    /// Whether pids here are those that the kernel reports.
    is_initial_pid_ns: bool,
    /// Whether times in `/proc` are: it tells them in the reader's time namespace (`do_task_stat`, fs/proc/array.c at
    /// v5.10).
    is_initial_time_ns: bool,
    last: Option<Seen>,
}

#[derive(Debug)]
struct Seen {
    pid: u32,
    start_ns: u64,
    at_ns: u64,
    facts: Rc<Facts>,
}

impl Processes {
    /// Outside the initial pid namespace nothing is looked up: the same number is somebody else there.
    #[must_use]
    pub fn new(is_initial_pid_ns: bool) -> Self {
        let is_initial_time_ns = match fs::read_link("/proc/self/ns/time") {
            // As the kernel numbers it: include/linux/proc_ns.h at v5.10.
            Ok(ns) => ns.as_os_str() == "time:[4026531834]",
            // A kernel that knows no others.
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        Self { is_initial_pid_ns, is_initial_time_ns, last: None }
    }

    /// Whether numbers in `/proc` are those that events tell.
    #[must_use]
    pub fn can_look_up(&self) -> bool {
        self.is_initial_pid_ns
    }

    /// The facts about a process that the kernel saw, if its pid still is its own. `now_ns` is of `CLOCK_BOOTTIME`.
    /// Nothing is known of a process that is gone.
    pub fn look_up(&mut self, seen: &Sighting, now_ns: u64) -> Rc<Facts> {
        match (self.is_initial_pid_ns, seen.start_ns) {
            (false, _) => Rc::default(),
            (true, 0) => self.by_presence(seen),
            (true, start_ns) => self.by_start(seen.task.pid, start_ns, now_ns),
        }
    }

    fn by_start(&mut self, pid: u32, start_ns: u64, now_ns: u64) -> Rc<Facts> {
        if let Some(last) = &self.last
            && (last.pid, last.start_ns) == (pid, start_ns)
            && now_ns.saturating_sub(last.at_ns) < FRESH_NS
        {
            return Rc::clone(&last.facts);
        }
        let is_it = |start_ticks| start_ticks == start_ns / TICK_NS;
        let facts = match (read_if(pid, is_it), self.last.take()) {
            (Some(facts), _) => Rc::new(facts),
            // It is gone, and what was read of it stays true.
            (None, Some(last)) if (last.pid, last.start_ns) == (pid, start_ns) => last.facts,
            (None, _) => Rc::default(),
        };
        self.last = Some(Seen { pid, start_ns, at_ns: now_ns, facts: Rc::clone(&facts) });
        facts
    }

    /// Where the kernel can't tell its start. Nothing is kept, for what proves it must be looked at each time.
    fn by_presence(&self, seen: &Sighting) -> Rc<Facts> {
        let was_there = |start_ticks| self.is_initial_time_ns && seen.was_there(start_ticks);
        let facts = read_if(seen.task.pid, was_there).filter(|_| seen.is_there());
        facts.map(Rc::new).unwrap_or_default()
    }
}

/// Whether pids in `/proc` are those that the kernel reports.
#[must_use]
pub fn is_in_initial_pid_ns() -> bool {
    // As the kernel numbers it: include/linux/proc_ns.h at v5.10.
    fs::read_link("/proc/self/ns/pid").is_ok_and(|ns| ns.as_os_str() == "pid:[4026531836]")
}

/// The facts about whoever has this pid now.
#[must_use]
pub fn read(pid: u32) -> Option<Facts> {
    read_if(pid, |_| true)
}

/// The facts about whoever has this pid now, if it started, in clock ticks, when it is meant to.
fn read_if(pid: u32, is_meant: impl Fn(u64) -> bool) -> Option<Facts> {
    let file = |name: &str| format!("/proc/{pid}/{name}");
    let exe = fs::read_link(file("exe")).ok().map(|path| lossy(path.as_os_str().as_bytes()));
    let mut cmdline = Vec::new();
    let _ =
        fs::File::open(file("cmdline")).and_then(|file| file.take(CMDLINE_LIMIT).read_to_end(&mut cmdline));
    let cgroup = fs::read(file("cgroup")).ok().and_then(|text| cgroup_path(&lossy(&text)));
    // Last, for it says whose all of that was.
    let stat = lossy(&fs::read(file("stat")).ok()?);
    let (comm, start_ticks) = parse_stat(&stat)?;
    if !is_meant(start_ticks) {
        return None;
    }
    let place = cgroup.as_deref().map(Place::parse).unwrap_or_default();
    Some(Facts {
        comm: Some(comm.to_owned()),
        exe,
        cmdline: arguments(&cmdline),
        unit: place.unit,
        container: place.container,
        cgroup,
    })
}

/// Every parser here, for whatever bytes.
#[cfg(any(test, fuzzing))]
pub(crate) fn parse_anything(bytes: &[u8]) {
    let text = lossy(bytes);
    let _ = (parse_stat(&text), arguments(bytes));
    let _ = (cgroup_path(&text), Place::parse(&text));
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// When whoever has this pid now started: nanoseconds of `CLOCK_BOOTTIME`, to the clock tick.
#[must_use]
pub fn started_ns(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&String::from_utf8_lossy(&stat)).map(|(_, start_ticks)| start_ticks * TICK_NS)
}

/// Name and start, in clock ticks since boot, from the text of `/proc/PID/stat`. The name may hold anything, blanks
/// and parentheses included, so it ends at the last one.
fn parse_stat(stat: &str) -> Option<(&str, u64)> {
    let name = stat.get(stat.find('(')? + 1..stat.rfind(')')?)?;
    let start = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().nth(19)?;
    Some((name, start.parse().ok()?))
}

/// The arguments in `/proc/PID/cmdline`; `None`: a kernel thread, or a process that is nearly gone.
fn arguments(cmdline: &[u8]) -> Option<Vec<String>> {
    let cmdline = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    (!cmdline.is_empty()).then(|| cmdline.split(|byte| *byte == 0).map(lossy).collect())
}

/// The control group in the text of `/proc/PID/cgroup`: the unified hierarchy's, or systemd's own where the process is
/// in no other place there.
fn cgroup_path(text: &str) -> Option<String> {
    let path_of = |wanted: &str| {
        text.lines().find_map(|line| {
            let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
            (controllers == wanted).then_some(path)
        })
    };
    let unified = path_of("");
    let path = unified.filter(|path| *path != "/").or_else(|| path_of("name=systemd")).or(unified)?;
    Some(path.to_owned())
}

/// What the path of a control group says about who is in it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Place {
    unit: Option<String>,
    container: Option<String>,
}

impl Place {
    /// The innermost unit (a service, or the scope of a session), and the innermost container: docker, containerd,
    /// cri-o and podman name its group after its id of 64 hexadecimal digits, with or without a prefix.
    fn parse(path: &str) -> Self {
        let innermost = || path.rsplit('/');
        let is_unit = |part: &&str| part.ends_with(".service") || part.ends_with(".scope");
        Self {
            unit: innermost().find(is_unit).map(str::to_owned),
            container: innermost().find_map(container_id).map(str::to_owned),
        }
    }
}

fn container_id(part: &str) -> Option<&str> {
    let part = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = part.rsplit_once('-').unwrap_or(("", part));
    let is_id = id.len() == 64 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    // conmon watches a container from outside.
    (is_id && !prefix.ends_with("conmon")).then_some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let rest = "S 1 2 2 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 0 0";
        for name in ["sh", "a b", "(sd-pam)", ") 1 2 (", "", "a) S 1", "\n{\"event\":\"fake\"}"] {
            assert_eq!(parse_stat(&format!("42 ({name}) {rest}")), Some((name, 4711)), "{name:?}");
        }
        for broken in ["", "42", "42 (", "42 )(", "42 (sh) S 1"] {
            assert_eq!(parse_stat(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_pid_that_somebody_else_has_now_has_no_facts() {
        let pid = std::process::id();
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let (comm, start) = parse_stat(&stat).unwrap();
        let facts = read(pid).unwrap();
        assert_eq!(facts.comm.as_deref(), Some(comm));
        assert_eq!(facts.exe, std::env::current_exe().ok().map(|path| path.to_string_lossy().into_owned()));
        assert_eq!(facts.cmdline.as_deref().unwrap(), std::env::args().collect::<Vec<_>>());
        assert_eq!(read(u32::MAX), None);

        let start_ns = start * TICK_NS;
        let (task, mut renamed) = (own_task(), own_task());
        renamed.comm[0] ^= 1;
        let elsewhere = Task { tid: 1, ..task };
        for (what, task, start_ns, at_ns, is_it) in [
            ("it started then", task, start_ns, 0, true),
            ("another started then", task, start_ns + TICK_NS, 0, false),
            ("it was there before", task, 0, start_ns + TICK_NS, true),
            ("it may have come since, in the same tick", task, 0, start_ns + TICK_NS - 1, false),
            ("it came since", task, 0, start_ns, false),
            ("its thread has another name now", renamed, 0, start_ns + TICK_NS, false),
            ("its thread is gone", elsewhere, 0, start_ns + TICK_NS, false),
            ("neither is known", task, 0, 0, false),
        ] {
            let seen = Sighting { task, start_ns, at_ns };
            let mut processes = Processes::new(true);
            for time in ["first", "again"] {
                let expected = if is_it { facts.clone() } else { Facts::default() };
                assert_eq!(*processes.look_up(&seen, 1), expected, "{what}, {time}");
            }
            assert_eq!(*Processes::new(false).look_up(&seen, 1), Facts::default(), "{what}, elsewhere");
            let mut shifted = Processes { is_initial_time_ns: false, ..Processes::new(true) };
            let expected = if start_ns == start * TICK_NS { facts.clone() } else { Facts::default() };
            assert_eq!(*shifted.look_up(&seen, 1), expected, "{what}, in another time namespace");
        }
    }

    /// As the kernel sees this thread.
    fn own_task() -> Task {
        let mut comm = [0; 16];
        let name = fs::read("/proc/thread-self/comm").unwrap();
        comm[..name.len() - 1].copy_from_slice(&name[..name.len() - 1]);
        let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        Task { pid: std::process::id(), tid, comm, leader: [0; 16] }
    }

    #[test]
    fn what_was_read_of_one_that_is_gone_stays_true_where_its_start_is_known() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let mut comm = [0; 16];
        comm[..5].copy_from_slice(b"sleep");
        let task = Task { pid, tid: pid, comm, leader: comm };
        let start_ns = started_ns(pid).unwrap();
        let known = Sighting { task, start_ns, at_ns: start_ns };
        let unknown = Sighting { task, start_ns: 0, at_ns: start_ns + TICK_NS };
        let mut processes = Processes::new(true);
        // `spawn` returns once the program runs.
        for seen in [&known, &unknown] {
            assert_eq!(processes.look_up(seen, 1).comm.as_deref(), Some("sleep"), "{seen:?}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for now_ns in [2, 2 * FRESH_NS, 4 * FRESH_NS] {
            assert_eq!(processes.look_up(&known, now_ns).comm.as_deref(), Some("sleep"), "at {now_ns}");
            assert_eq!(*processes.look_up(&unknown, now_ns), Facts::default(), "at {now_ns}");
        }
        let later = Sighting { start_ns: start_ns + TICK_NS, ..known };
        assert_eq!(*processes.look_up(&later, 5 * FRESH_NS), Facts::default());
    }

    #[test]
    fn arguments_are_what_stands_between_nuls() {
        for (bytes, expected) in [
            (&b""[..], None),
            (b"\0", None),
            (b"sh\0-c\0a b\0", Some(vec!["sh", "-c", "a b"])),
            (b"sh\0\0x\0", Some(vec!["sh", "", "x"])),
            (b"renamed by itself", Some(vec!["renamed by itself"])),
            (b"\xff\n\0", Some(vec!["\u{fffd}\n"])),
        ] {
            let expected: Option<Vec<String>> =
                expected.map(|args| args.into_iter().map(str::to_owned).collect());
            assert_eq!(arguments(bytes), expected);
        }
    }

    #[test]
    fn the_control_group_tells_unit_and_container() {
        const ID: &str = "4a5b6c7d8e9f00112233445566778899aabbccddeeff00112233445566778899";
        for (path, unit, container) in [
            ("/system.slice/nginx.service".to_owned(), Some("nginx.service".to_owned()), None),
            (
                "/user.slice/user-1000.slice/user@1000.service/app.slice/web.service".to_owned(),
                Some("web.service".to_owned()),
                None,
            ),
            ("/user.slice/user-0.slice/session-3.scope".to_owned(), Some("session-3.scope".to_owned()), None),
            ("/".to_owned(), None, None),
            // docker, by cgroupfs and by systemd
            (format!("/docker/{ID}"), None, Some(ID)),
            (format!("/system.slice/docker-{ID}.scope"), Some(format!("docker-{ID}.scope")), Some(ID)),
            // containerd and cri-o below Kubernetes
            (
                format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{ID}.scope"),
                Some(format!("cri-containerd-{ID}.scope")),
                Some(ID),
            ),
            (format!("/kubepods/burstable/pod1/{ID}"), None, Some(ID)),
            (format!("/kubepods.slice/crio-{ID}.scope"), Some(format!("crio-{ID}.scope")), Some(ID)),
            // podman, and the container's own groups below
            (
                format!("/machine.slice/libpod-{ID}.scope/container"),
                Some(format!("libpod-{ID}.scope")),
                Some(ID),
            ),
            (format!("/machine.slice/libpod-{ID}.scope/init.scope"), Some("init.scope".to_owned()), Some(ID)),
            (
                format!("/machine.slice/libpod-conmon-{ID}.scope"),
                Some(format!("libpod-conmon-{ID}.scope")),
                None,
            ),
            (format!("/docker/{}", &ID[1..]), None, None),
            (format!("/docker/{}", ID.to_uppercase()), None, None),
        ] {
            let expected = Place { unit, container: container.map(str::to_owned) };
            assert_eq!(Place::parse(&path), expected, "{path}");
        }
    }

    #[test]
    fn the_group_is_the_unified_one_or_systemds() {
        for (text, path) in [
            ("0::/system.slice/a.service\n", Some("/system.slice/a.service")),
            ("12:pids:/x\n1:name=systemd:/system.slice/a.service\n0::/\n", Some("/system.slice/a.service")),
            ("12:pids:/x\n1:name=systemd:/y\n", Some("/y")),
            ("0::/\n", Some("/")),
            ("0::/with:colon\n", Some("/with:colon")),
            ("12:pids:/x\n", None),
            ("", None),
        ] {
            assert_eq!(cgroup_path(text).as_deref(), path, "{text:?}");
        }
    }
}
