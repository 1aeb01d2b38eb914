//! The first and only service of a test machine: PID 1 of the guest that `cargo xtask vm` boots.
//!
//! It makes the file systems and the loopback interface that the tests expect, loads modules, runs what the plan in
//! its initramfs names, prints a line for each and a verdict at the end, and powers the machine off. It lives from
//! nothing but itself: the initramfs has no shell and no libraries.

use std::{
    fs, io,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use rustix::{
    mount::{MountFlags, mount},
    net::{
        AddressFamily, RecvFlags, SendFlags, SocketType, netlink::SocketAddrNetlink, recv, sendto, socket,
    },
    process::{Resource, Rlimit, WaitOptions, setrlimit, wait},
    system::{RebootCommand, init_module, reboot},
    termios::tcdrain,
};

use self::plan::{DEADLINE, FACT, Plan, Run, VOICE};

mod plan;
mod serial;

/// Source, and type, and where. The first three are what everything else stands on; the others are worth having, and
/// a kernel may refuse them, so a test that needs one says so better than we could.
const MOUNTS: [(&str, &str); 10] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("tracefs", "/sys/kernel/tracing"),
    ("debugfs", "/sys/kernel/debug"),
    ("securityfs", "/sys/kernel/security"),
    ("bpf", "/sys/fs/bpf"),
    ("cgroup2", "/sys/fs/cgroup"),
];
const NEEDED_MOUNTS: usize = 3;

fn main() -> ExitCode {
    if std::process::id() != 1 {
        eprintln!("this is the init of a test machine, and powers off the machine it runs on: not this one");
        return ExitCode::from(2);
    }
    let passed = guest().unwrap_or_else(|error| {
        println!("{VOICE}{error:#}");
        false
    });
    println!("{}", plan::verdict(passed));
    power_off()
}

/// How many descriptors a process may open: what service managers set, and the kernel doesn't.
const DESCRIPTORS: u64 = 524_288;

/// Everything between the kernel's hand-over and the verdict.
fn guest() -> Result<bool> {
    let refused = mount_all()?;
    serial::speak()?;
    for (target, error) in refused {
        println!("{VOICE}mount {target}: {error}");
    }
    let plan = fs::read(plan::PATH).with_context(|| format!("read {}", plan::PATH))?;
    let plan: Plan = serde_json::from_slice(&plan).with_context(|| format!("parse {}", plan::PATH))?;
    let deadline = Duration::from_secs(plan.deadline_s);
    thread::spawn(move || {
        thread::sleep(deadline);
        println!("\n{DEADLINE} of {} s has passed; what runs:", deadline.as_secs());
        tell_what_runs();
        println!("{}", plan::verdict(false));
        power_off()
    });
    let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    setrlimit(Resource::Nofile, limit).context("set the limit on descriptors")?;
    loopback_up().context("bring lo up")?;
    for module in &plan.modules {
        if let Err(error) = load(module) {
            println!("{VOICE}load {module}: {error:#}");
        }
    }
    tell_facts();
    let mut passed = true;
    for run in &plan.runs {
        println!("{VOICE}start {}", run.name);
        let started = Instant::now();
        let ended = start(run, &plan.env).and_then(|child| Ok(reap_until(&child)?));
        match &ended {
            Ok(status) if status.success() => {
                println!("{VOICE}{}: passed in {:.1} s", run.name, started.elapsed().as_secs_f64());
            }
            Ok(status) => println!("{VOICE}{}: failed, {status}", run.name),
            Err(error) => println!("{VOICE}{}: failed, {error:#}", run.name),
        }
        passed &= ended.is_ok_and(|status| status.success());
    }
    Ok(passed)
}

/// Mounts what can be; yields what could not, as there is no place yet to say it.
fn mount_all() -> Result<Vec<(&'static str, io::Error)>> {
    let mut refused = Vec::new();
    for (index, (kind, target)) in MOUNTS.into_iter().enumerate() {
        let mounted = fs::create_dir_all(target)
            .and_then(|()| Ok(mount(kind, target, kind, MountFlags::empty(), None)?));
        match mounted {
            Ok(()) => {}
            Err(error) if index < NEEDED_MOUNTS => {
                return Err(error).with_context(|| format!("mount {kind} on {target}"));
            }
            Err(error) => refused.push((target, error)),
        }
    }
    Ok(refused)
}

/// Asks rtnetlink to set IFF_UP on interface 1, which is `lo` in every network namespace.
fn loopback_up() -> Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 0x1 | 0x4;
    const LOOPBACK: u32 = 1;
    const IFF_UP: u32 = 1;
    // struct nlmsghdr (length, type, flags, sequence, port), then struct ifinfomsg (family and device type, index,
    // flags, which flags to change).
    let mut request = Vec::from(32_u32.to_ne_bytes());
    request.extend(RTM_NEWLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    for word in [1_u32, 0, 0, LOOPBACK, IFF_UP, IFF_UP] {
        request.extend(word.to_ne_bytes());
    }
    // No protocol is protocol 0: NETLINK_ROUTE.
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 64];
    recv(&socket, &mut answer, RecvFlags::empty())?;
    // struct nlmsgerr: the header again, then the negative error number.
    let [_, _, _, _, error, ..] = answer.as_chunks::<4>().0 else {
        unreachable!("64 bytes hold more than five words")
    };
    match i32::from_ne_bytes(*error) {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(-error).into()),
    }
}

fn load(module: &str) -> Result<()> {
    let image = fs::read(module).context("read")?;
    match init_module(&image, c"") {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What every row of the report should know of its machine.
fn tell_facts() {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    println!("{FACT}kernel={}", read("/proc/sys/kernel/osrelease"));
    let lockdown = read("/sys/kernel/security/lockdown");
    let chosen = lockdown.split(['[', ']']).nth(1).unwrap_or("unknown");
    println!("{FACT}lockdown={chosen}");
    println!("{FACT}cpus={}", thread::available_parallelism().map_or(0, usize::from));
    println!("{FACT}uptime_s={}", read("/proc/uptime").split(' ').next().unwrap_or_default());
}

fn start(run: &Run, env: &[(String, String)]) -> Result<Child> {
    Command::new(&run.program)
        .args(&run.args)
        .env_clear()
        .env("PATH", "/bin")
        .env("RUST_BACKTRACE", "1")
        .envs(run.env.iter().chain(env).map(|(key, value)| (key, value)))
        .current_dir("/tmp")
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("start {}", run.program))
}

/// Waits for the child, and on the way for every orphan, as PID 1 must: a test that waits for a process to be gone
/// would wait for ever for a zombie.
fn reap_until(child: &Child) -> io::Result<ExitStatus> {
    loop {
        if let Some((pid, status)) = wait(WaitOptions::empty())?
            && pid.as_raw_nonzero().get().unsigned_abs() == child.id()
        {
            return Ok(ExitStatus::from_raw(status.as_raw()));
        }
    }
}

/// A line for each process of user space, and where in the kernel each of its threads is.
fn tell_what_runs() {
    for process in entries(Path::new("/proc")) {
        let Ok(command) = fs::read(process.join("cmdline")) else { continue };
        if command.is_empty() {
            continue;
        }
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        println!("{VOICE}{} {command}", process.display());
        for thread in entries(&process.join("task")) {
            let read = |file: &str| fs::read_to_string(thread.join(file)).unwrap_or_default();
            let state = read("status");
            let state = state.lines().find_map(|line| line.strip_prefix("State:\t")).unwrap_or("?");
            println!("{VOICE}  {} {state}", read("comm").trim());
            for frame in read("stack").lines() {
                println!("{VOICE}    {frame}");
            }
        }
    }
}

/// The numbered directories in a directory of /proc.
fn entries(directory: &Path) -> Vec<std::path::PathBuf> {
    let Ok(read) = fs::read_dir(directory) else { return Vec::new() };
    read.filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()))
        })
        .collect()
}

/// Ends the machine when what was printed has left it. Returns only where that fails; then PID 1 ends, and the kernel
/// with it.
fn power_off() -> ExitCode {
    // Both only fail where there is no terminal, and then nobody listens.
    let _ = tcdrain(io::stdout());
    let _ = reboot(RebootCommand::PowerOff);
    ExitCode::FAILURE
}
