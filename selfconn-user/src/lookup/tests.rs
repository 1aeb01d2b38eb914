use std::{
    sync::{Mutex, MutexGuard, PoisonError, mpsc},
    thread,
};

use selfconn_ebpf::{COMM_LEN, Task};
use tokio::{runtime, time::timeout};

use super::*;

/// Pids from here on hang until [`RELEASED`] is true. They are pids that no process has.
const HANGING: u32 = 1 << 30;

static RELEASED: Mutex<bool> = Mutex::new(false);

fn arguments(pid: u32) -> CommandLine {
    [&*pid.to_string()].into_iter().collect()
}

fn read_cmdline(ProcessKey { pid, .. }: ProcessKey) -> Option<CommandLine> {
    while pid >= HANGING && !*RELEASED.lock().unwrap_or_else(PoisonError::into_inner) {
        thread::sleep(Duration::from_millis(1));
    }
    Some(arguments(pid))
}

fn set_released(is_released: bool) {
    *RELEASED.lock().unwrap_or_else(PoisonError::into_inner) = is_released;
}

/// The tests that make readers hang take turns.
fn take_turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(test: impl AsyncFnOnce()) {
    runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(test());
}

fn request(id: u64, pid: u32, uid: u32) -> CmdlineRequest {
    CmdlineRequest { id, key: ProcessKey { pid, start_ticks: 1, arg_start: 0 }, owner: Owner::new(uid, 0) }
}

async fn response(readers: &mut CmdlineReaders) -> Option<(CmdlineRequest, Option<CommandLine>)> {
    let ready = poll_fn(|context| readers.poll_ready(context));
    timeout(Duration::from_secs(10), ready).await.ok()?;
    readers.next_response()
}

#[test]
fn a_stuck_reader_takes_nothing_from_other_owners() {
    let _turn = take_turn();
    set_released(false);
    run(async || {
        let mut readers = CmdlineReaders::start(CmdlineLimit::Full, read_cmdline).unwrap();
        assert_eq!(readers.request(request(1, HANGING, 1_000)), Ok(()));
        // Another process of the same owner waits for its turn, which does not come.
        assert_eq!(readers.request(request(2, 7, 1_000)), Ok(()));
        assert_eq!(readers.request(request(3, 8, 2_000)), Ok(()));
        let (answered, cmdline) = response(&mut readers).await.unwrap();
        assert_eq!((answered.id, cmdline), (3, Some(arguments(8))));
        assert_eq!((readers.give_up(1), readers.abandoned()), (vec![2], 1));
        assert_eq!(readers.request(request(4, 9, 1_000)), Err(Refusal::Busy), "one stuck read an owner");
        assert_eq!(readers.request(request(5, HANGING, 3_000)), Err(Refusal::Hung), "it is not asked again");
        // A service or container with the same uid is not kept out, and leaves one reader for others.
        let of_group =
            |id, pid, cgroup| CmdlineRequest { owner: Owner::new(1_000, cgroup), ..request(id, pid, 1_000) };
        assert_eq!(readers.request(of_group(4, 9, 77)), Ok(()));
        assert_eq!(response(&mut readers).await.unwrap().0.id, 4);
        for (id, cgroup) in [(6, 77), (7, 78)] {
            assert_eq!(readers.request(of_group(id, HANGING + id as u32, cgroup)), Ok(()));
            assert_eq!(readers.give_up(id), [0; 0]);
        }
        assert_eq!(readers.request(of_group(8, 9, 79)), Err(Refusal::Busy), "one reader is free");
        // Another user takes it.
        assert_eq!(readers.request(request(8, HANGING + 8, 2_000)), Ok(()));
        assert_eq!(readers.give_up(8), [0; 0]);
        assert_eq!(readers.request(request(9, 10, 5_000)), Err(Refusal::Busy), "all readers are stuck");
        assert_eq!(readers.abandoned(), MAX_STUCK as u64);
        // The processes let their readers go.
        set_released(true);
        for _ in 0..MAX_STUCK {
            response(&mut readers).await.unwrap();
        }
        assert_eq!(readers.request(request(10, 10, 1_000)), Ok(()));
        assert_eq!(response(&mut readers).await.unwrap().0.id, 10);
    });
}

#[test]
fn the_users_of_a_control_group_make_two_readers_stuck_at_most() {
    let _turn = take_turn();
    set_released(false);
    run(async || {
        let mut readers = CmdlineReaders::start(CmdlineLimit::Full, read_cmdline).unwrap();
        let of_container = |id: u64, pid| CmdlineRequest {
            owner: Owner::new(200_000 + id as u32, 7),
            ..request(id, pid, 0)
        };
        for id in 1..=4 {
            assert_eq!(readers.request(of_container(id, HANGING + id as u32)), Ok(()));
        }
        assert_eq!((readers.give_up(1), readers.give_up(2)), (vec![], vec![3, 4]));
        assert_eq!(readers.request(of_container(5, 9)), Err(Refusal::Busy));
        assert_eq!(readers.request(request(6, 9, 1_000)), Ok(()));
        assert_eq!(response(&mut readers).await.unwrap().0.id, 6);
    });
    set_released(true);
}

#[test]
fn look_ups_beyond_an_owners_share_have_no_result_and_take_nothing_from_another() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        // No process has these pids.
        let of_flood = |number: u32| {
            let owner = Owner::new(1_000, number.into());
            LookupTarget::Holder { pid: HANGING + number, start_ticks: 1, owner }
        };
        let count = 4 * MAX_IN_PROGRESS as u32;
        for number in 0..count {
            lookups.begin(of_flood(number), number);
        }
        assert_eq!(lookups.in_progress.len(), MAX_IN_PROGRESS * 7 / 8);
        lookups.begin(this_process(5), count);
        let (id, is_waiting) = (lookups.last_id, lookups.facts.waits(lookups.last_id - 1));
        assert!(is_waiting, "the flood has its share of the threads");
        assert!(!lookups.facts.waits(id) && !lookups.cmdlines.waits(id), "another owner has threads at once");
        let process = loop {
            let (waiter, process) = completed(&mut lookups).await;
            if waiter == count {
                break process;
            }
            assert_eq!(process, Rc::default());
        };
        assert!(process.exe.is_some() && process.cmdline.is_some(), "{process:?}");
    });
}

#[test]
fn if_too_many_wait_a_look_up_of_the_user_with_the_most_is_given_up() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let victim = LookupTarget::Holder { pid: HANGING, start_ticks: 1, owner: Owner::new(2_000, 0) };
        (0..8).for_each(|_| lookups.begin(victim, 0));
        // A session has fewer than the victim.
        for session in 1..=20 {
            let owner = Owner::new(1_000, 10 + u64::from(session));
            let target = LookupTarget::Holder { pid: HANGING + session, start_ticks: 1, owner };
            (0..5).for_each(|_| lookups.begin(target, session));
        }
        for _ in 0..15 {
            lookups.give_up_one();
        }
        let given_up: Vec<_> = std::iter::from_fn(|| lookups.next_completed()).collect();
        assert_eq!(given_up.len(), 15 * 5);
        assert!(given_up.iter().all(|(session, _)| *session > 0));
    });
}

fn this_process(uid: u32) -> LookupTarget {
    let pid = std::process::id();
    let start_ns = process::start_time_ns(pid).unwrap();
    let task = Task { pid, tid: pid, ..Task::UNKNOWN };
    let observed = ObservedTask { task, start_ns, arg_start: 0, at_ns: start_ns };
    LookupTarget::Observed(observed, Owner::new(uid, 0))
}

fn holder(pid: u32) -> LookupTarget {
    let start_ns = process::start_time_ns(std::process::id()).unwrap();
    let start_ticks = process::start_ticks_of(start_ns);
    LookupTarget::Holder { pid, start_ticks, owner: Owner::new(0, 0) }
}

async fn completed(lookups: &mut Lookups<u32>) -> (u32, Rc<ProcessInfo>) {
    loop {
        if let Some(completed) = lookups.next_completed() {
            return completed;
        }
        timeout(Duration::from_secs(10), lookups.ready()).await.unwrap();
        lookups.update();
    }
}

/// Waits until this process is so old that an observation of now proves that it existed.
fn wait_until_proven() {
    const TWO_TICKS_NS: u64 = 20_000_000;
    let proven_ns = process::start_time_ns(std::process::id()).unwrap() + TWO_TICKS_NS;
    thread::sleep(Duration::from_nanos(proven_ns.saturating_sub(clock::boot_ns())));
}

/// This thread, as a kernel observes it that does not provide start times.
fn this_task(at_ns: u64) -> LookupTarget {
    let tid = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
    let mut comm = [0; COMM_LEN];
    let name = std::fs::read("/proc/thread-self/comm").unwrap();
    comm[..name.len() - 1].copy_from_slice(&name[..name.len() - 1]);
    let task = Task { pid: std::process::id(), tid, comm, ..Task::UNKNOWN };
    LookupTarget::Observed(ObservedTask { task, start_ns: 0, arg_start: 0, at_ns }, Owner::new(0, 0))
}

#[test]
fn without_start_times_observations_before_a_look_up_share_it() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        wait_until_proven();
        let count = 2 * MAX_IN_PROGRESS as u32;
        let first_ns = clock::boot_ns() - u64::from(count);
        let task = |number: u32| this_task(first_ns + u64::from(number));
        // As many as a burst of one process makes: more than may be in progress.
        for number in 0..count {
            lookups.begin(task(number), number);
        }
        assert_eq!((lookups.in_progress.len(), lookups.given_up()), (1, 0));
        // That the process existed then proves nothing about the time before.
        lookups.begin(this_task(first_ns - 1), count);
        // That the thread is there in the look-up proves nothing about the time after it.
        let later = this_task(clock::boot_ns() + 1_000_000_000);
        lookups.begin(later, count + 1);
        assert_eq!(lookups.in_progress.len(), 3);
        for _ in 0..count + 2 {
            let (_, process) = completed(&mut lookups).await;
            assert!(process.comm.is_some(), "{process:?}");
        }
        assert_eq!((lookups.joinable.len(), lookups.given_up()), (0, 0));
    });
}

#[test]
fn without_start_times_a_task_is_known_for_the_time_of_its_proof() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        wait_until_proven();
        let [before_ns, observed_ns] = [clock::boot_ns() - 2, clock::boot_ns()];
        let between = this_task(clock::boot_ns());
        lookups.begin(this_task(observed_ns), 1);
        assert!(completed(&mut lookups).await.1.comm.is_some());
        let is_known = |target: &LookupTarget| lookups.known(target, clock::boot_ns()).is_some();
        assert!(is_known(&between) && is_known(&this_task(observed_ns)));
        assert!(!is_known(&this_task(before_ns)) && !is_known(&this_task(clock::boot_ns())));
    });
}

#[test]
fn a_look_up_is_shared_and_its_result_is_fresh_for_a_while() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let target = this_process(0);
        assert_eq!(lookups.known(&target, clock::boot_ns()), None);
        lookups.begin(target, 1);
        lookups.begin(target, 2);
        assert_eq!(lookups.in_progress.len(), 1, "the same process is looked up once");
        let (first, process) = completed(&mut lookups).await;
        assert_eq!((first, completed(&mut lookups).await.0), (1, 2));
        assert!(process.cmdline.as_ref().unwrap().arguments().eq(std::env::args()));
        assert!(process.exe.is_some() && process.comm.is_some(), "{process:?}");
        assert_eq!(lookups.known(&target, clock::boot_ns()), Some(Rc::clone(&process)));
        // It is not known which program the holder of a socket runs.
        lookups.begin(holder(std::process::id()), 3);
        lookups.begin(holder(std::process::id()), 3);
        assert_eq!(lookups.in_progress.len(), 1, "the same holder is looked up once");
        // Its user decides whether it can have made the socket.
        let uid = Some(rustix::process::getuid().as_raw());
        let of_holder = Rc::new(ProcessInfo { uid, ..(*process).clone() });
        for _ in 0..2 {
            assert_eq!(completed(&mut lookups).await, (3, Rc::clone(&of_holder)));
        }
        lookups.begin(holder(u32::MAX), 4);
        assert_eq!(completed(&mut lookups).await, (4, Rc::default()), "no such process");
        let LookupTarget::Holder { pid, start_ticks, owner } = holder(std::process::id()) else {
            unreachable!()
        };
        lookups.begin(LookupTarget::Holder { pid, start_ticks: start_ticks + 1, owner }, 5);
        assert_eq!(
            completed(&mut lookups).await,
            (5, Rc::default()),
            "the holder has exited, its pid is reused"
        );
        assert_eq!((lookups.given_up(), lookups.abandoned()), (0, 0));
    });
}

#[test]
fn in_another_pid_namespace_nothing_is_looked_up() {
    let lookups = Lookups::<()>::start(false, CmdlineLimit::Full).unwrap();
    assert_eq!(lookups.known(&this_process(0), clock::boot_ns()), Some(Rc::default()));
}

#[test]
fn what_is_known_of_a_process_outlives_it() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id();
        let start_ns = process::start_time_ns(pid).unwrap();
        let task = Task { pid, tid: pid, ..Task::UNKNOWN };
        let observed = ObservedTask { task, start_ns, arg_start: 0, at_ns: start_ns };
        let target = LookupTarget::Observed(observed, Owner::new(0, 0));
        lookups.begin(target, 1);
        // `spawn` returns after the execve().
        assert_eq!(completed(&mut lookups).await.1.comm.as_deref(), Some("sleep"));
        child.kill().unwrap();
        child.wait().unwrap();
        for waiter in [2, 3] {
            lookups.begin(target, waiter);
            assert_eq!(completed(&mut lookups).await.1.comm.as_deref(), Some("sleep"));
        }
        let later = ObservedTask { start_ns: start_ns + 1_000_000_000, ..observed };
        lookups.begin(LookupTarget::Observed(later, Owner::new(0, 0)), 4);
        assert_eq!(completed(&mut lookups).await, (4, Rc::default()), "another process with this pid");
    });
}

#[test]
fn what_is_known_of_a_program_outlives_an_execve_and_the_next_program_is_another_one() {
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let pid = std::process::id();
        let facts = process::read_facts(pid, &process::ProcessProof::None, true).unwrap();
        let of_program = |arg_start| match this_process(0) {
            LookupTarget::Observed(observed, owner) => {
                LookupTarget::Observed(ObservedTask { arg_start, ..observed }, owner)
            }
            LookupTarget::Holder { .. } => unreachable!(),
        };
        let (now, before) = (of_program(facts.arg_start), of_program(facts.arg_start + 1));
        lookups.begin(now, 1);
        lookups.begin(before, 2);
        assert_eq!(lookups.in_progress.len(), 2, "two programs of one process");
        let mut completed = [completed(&mut lookups).await, completed(&mut lookups).await];
        completed.sort_by_key(|(waiter, _)| *waiter);
        let [(_, running), (_, replaced)] = completed;
        assert!(running.exe.is_some() && running.cmdline.is_some(), "{running:?}");
        let unknown = ProcessInfo { exe: None, is_exe_ours: false, cmdline: None, ..(*running).clone() };
        assert_eq!(*replaced, unknown, "control group, unit and container are the process's");
        assert_eq!(lookups.known(&before, clock::boot_ns()), Some(replaced));
        // The program before was looked up when it ran.
        let key = before.key().unwrap();
        lookups.cache.insert(key, Rc::clone(&running), 0);
        lookups.begin(before, 3);
        assert_eq!(self::completed(&mut lookups).await, (3, running));
        assert_eq!((lookups.given_up(), lookups.abandoned()), (0, 0));
    });
}

#[test]
fn after_the_deadline_the_rest_is_unknown() {
    fn hang(_: ProcessKey) -> Option<CommandLine> {
        while !*RELEASED.lock().unwrap_or_else(PoisonError::into_inner) {
            thread::sleep(Duration::from_millis(1));
        }
        None
    }
    let _turn = take_turn();
    set_released(false);
    run(async || {
        let mut lookups = Lookups::start_with(true, CmdlineLimit::Full, hang).unwrap();
        let (target, began) = (this_process(0), Instant::now());
        lookups.begin(target, 1);
        let (_, process) = completed(&mut lookups).await;
        assert!(began.elapsed() >= DEADLINE && began.elapsed() < DEADLINE * 20, "{:?}", began.elapsed());
        assert!(process.exe.is_some() && process.cmdline.is_none(), "{process:?}");
        assert_eq!((lookups.given_up(), lookups.abandoned()), (1, 1));
        // It is known to hang, so its next event waits for nothing that hangs.
        lookups.begin(target, 2);
        let (_, again) = completed(&mut lookups).await;
        assert_eq!((again, lookups.given_up(), lookups.abandoned()), (process, 1, 1));
        // At the end of a run nobody waits.
        lookups.begin(holder(std::process::id()), 3);
        lookups.give_up_all();
        assert_eq!(lookups.next_completed().unwrap().0, 3);
        assert_eq!(lookups.abandoned(), 1, "giving up is not the process's fault");
    });
    set_released(true);
}

#[test]
fn a_process_whose_facts_hang_is_unknown_and_nothing_more_is_read_of_its_owner() {
    let (release, released) = mpsc::channel::<()>();
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let released = Mutex::new(released);
        lookups.facts = FactsReaders::start_with(2 * DEADLINE, move |target| {
            if target.pid() == HANGING {
                let _ = released.lock().unwrap().recv();
                return None;
            }
            process::read_facts(target.pid(), &process::ProcessProof::None, true)
        })
        .unwrap();
        let of_owner = |pid| LookupTarget::Holder { pid, start_ticks: 1, owner: Owner::new(1_000, 0) };
        let own = std::process::id();
        lookups.begin(of_owner(HANGING), 1);
        lookups.begin(holder(own), 2);
        let (waiter, process) = completed(&mut lookups).await;
        assert!(waiter == 2 && process.comm.is_some(), "{waiter} {process:?}");
        assert_eq!(completed(&mut lookups).await, (1, Rc::default()));
        while lookups.abandoned() == 0 {
            thread::sleep(Duration::from_millis(1));
            lookups.update();
        }
        assert_eq!(lookups.given_up(), 1);
        lookups.begin(of_owner(own), 3);
        assert_eq!((lookups.next_completed(), lookups.given_up()), (Some((3, Rc::default())), 2));
        lookups.begin(holder(own), 4);
        assert!(completed(&mut lookups).await.1.comm.is_some());
        assert_eq!(lookups.worker_problems().count(), 0);
    });
    drop(release);
}

#[test]
fn a_command_line_that_is_proven_is_used_without_the_rest() {
    let (release, released) = mpsc::channel::<()>();
    run(async || {
        let mut lookups = Lookups::start(true, CmdlineLimit::Full).unwrap();
        let released = Mutex::new(released);
        let never = Duration::from_mins(1);
        lookups.facts = FactsReaders::start_with(never, move |_| {
            let _ = released.lock().unwrap().recv();
            None
        })
        .unwrap();
        let LookupTarget::Observed(observed, owner) = this_process(0) else { unreachable!() };
        let facts = process::read_facts(observed.task.pid, &process::ProcessProof::None, true).unwrap();
        let of_program = |arg_start| LookupTarget::Observed(ObservedTask { arg_start, ..observed }, owner);
        // Another program, and one whose address is unknown, so that it may be another.
        for (waiter, arg_start) in [(1, facts.arg_start), (2, facts.arg_start + 1), (3, 0)] {
            lookups.begin(of_program(arg_start), waiter);
        }
        for expected in 1..=3 {
            let (waiter, process) = completed(&mut lookups).await;
            assert_eq!(waiter, expected);
            assert_eq!(process.cmdline.is_some(), waiter == 1, "{waiter}: {process:?}");
            let rest = ProcessInfo { cmdline: None, ..(*process).clone() };
            assert_eq!(rest, ProcessInfo::default());
        }
        assert_eq!((lookups.given_up(), lookups.abandoned()), (3, 0));
    });
    drop(release);
}
