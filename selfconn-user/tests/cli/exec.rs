//! `selfconn exec` as a command: exit codes, signals, the terminal, the user, and what remains. Needs root, because the
//! command is watched.

use std::{
    fs::{self, File},
    io::{BufReader, Read as _, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{Child, Command, Output, Stdio},
};

use rustix::{
    process::{Pid, Signal, WaitOptions, kill_process, setsid, waitpid},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
};

use crate::support::{assert_one_line_error, selfconn, unprivileged_selfconn};

fn exec(options: &[&str], command: &[&str]) -> Command {
    let mut exec = selfconn();
    exec.arg("exec").args(options).arg("--").args(command);
    with_default_signals(exec)
}

/// A shell can't trap a signal that was ignored when it was started, as by nohup or in the background of a script.
fn with_default_signals(mut command: Command) -> Command {
    let reset = || {
        for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2]
        {
            // SAFETY: a system call that takes numbers.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: the closure makes system calls only.
    unsafe { command.pre_exec(reset) };
    command
}

fn run(options: &[&str], command: &[&str]) -> Output {
    exec(options, command).stdin(Stdio::null()).output().unwrap()
}

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn exit_code_signal_and_output_are_the_commands() {
    for (script, code, signal) in [
        ("echo out; echo err >&2; exit 0", Some(0), None),
        ("exit 1", Some(1), None),
        ("exit 2", Some(2), None),
        ("exit 255", Some(255), None),
        ("kill -TERM $$", None, Some(15)),
        ("kill -KILL $$", None, Some(9)),
        ("kill -INT $$", None, Some(2)),
        ("kill -SEGV $$", None, Some(11)),
        // No signal is blocked or ignored that is not for the command without us.
        // Those below 32: the others are glibc's own.
        (r"sed -n 's/^Sig\(Blk\|Ign\):.*\(........\)$/\1 \2/p' /proc/self/status", Some(0), None),
    ] {
        let mut plain = Command::new("sh");
        plain.args(["-c", script]).stdin(Stdio::null());
        let plain = with_default_signals(plain).output().unwrap();
        let watched = run(&["--fail"], &sh(script));
        assert_eq!((watched.status.code(), watched.status.signal()), (code, signal), "{script}: {watched:?}");
        assert_eq!(watched.status, plain.status, "{script}");
        assert_eq!(watched.stdout, plain.stdout, "{script}");
        let stderr = text(&watched.stderr);
        let rest = stderr.strip_prefix(&text(&plain.stderr)).unwrap();
        assert!(
            rest.starts_with("selfconn: no self-connection; watched control group /"),
            "{script}: {stderr}"
        );
        assert!(rest.ends_with(", nothing was lost\n") && rest.lines().count() == 1, "{script}: {stderr}");
    }
}

#[test]
fn stdin_and_the_environment_are_the_commands() {
    let mut command = exec(&[], &sh("cat; echo $WORD"));
    let mut child = command
        .env("WORD", "word")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"from stdin\n").unwrap();
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), "from stdin\nword\n");
}

#[test]
fn a_command_that_cannot_be_executed_is_a_shells_exit_code_and_a_line() {
    for (command, code) in [("selfconn-no-such-command", 127), ("/etc/passwd", 126), ("/etc", 126)] {
        let output = run(&[], &[command]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(
            stderr.starts_with(&format!("selfconn: {command}: ")) && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
}

#[test]
fn without_the_privileges_the_command_is_not_run_unless_that_is_wanted() {
    let (_directory, mut command) = unprivileged_selfconn();
    let output = command.args(["exec", "--", "echo", "run"]).output().unwrap();
    assert_one_line_error(&output, &["the command was not run, because it can't be watched", "CAP_BPF"]);
    assert!(output.stdout.is_empty());
    let (_directory, mut command) = unprivileged_selfconn();
    let output =
        command.args(["exec", "--best-effort", "--", "sh", "-c", "echo run; exit 3"]).output().unwrap();
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(3), "run\n"));
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with("selfconn: the command is not watched: "), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn below_sudo_the_command_runs_as_the_user_who_called_it() {
    let script = "id -u; id -g; id -G; echo $HOME";
    let as_sudo = |command: &mut Command| {
        text(
            &command
                .env("SUDO_USER", "nobody")
                .env("SUDO_UID", "65534")
                .env("HOME", "/h")
                .output()
                .unwrap()
                .stdout,
        )
    };
    assert_eq!(as_sudo(&mut exec(&[], &sh(script))), "65534\n65534\n65534\n/h\n");
    assert_eq!(as_sudo(&mut exec(&["--user", "root"], &sh("id -u"))), "0\n");
    let output = run(&["--user", "selfconn-nobody"], &["true"]);
    assert_one_line_error(&output, &["--user selfconn-nobody", "no such user"]);
}

fn start(options: &[&str], script: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = exec(options, &sh(script));
    let mut child = child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

fn line(from: &mut impl std::io::BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line.trim_end().to_owned()
}

#[test]
fn signals_are_passed_on_once() {
    for (signal, name) in [
        (Signal::TERM, "TERM"),
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::QUIT, "QUIT"),
        (Signal::USR1, "USR1"),
        (Signal::USR2, "USR2"),
    ] {
        let script = format!(
            "count=0; trap 'count=$((count+1)); echo got' {name}; echo ready; \
             while [ $count = 0 ]; do sleep 0.05; done; sleep 0.3; exit $((40+count))"
        );
        let (mut child, mut stdout) = start(&[], &script);
        assert_eq!(line(&mut stdout), "ready");
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert_eq!(line(&mut stdout), "got", "{name}");
        assert_eq!(child.wait().unwrap().code(), Some(41), "{name}");
    }
}

#[test]
fn a_stopped_command_stops_and_continues_with_us() {
    let (mut child, mut stdout) = start(&[], "echo $$; read _ || :; kill -STOP $$; echo continued");
    let _command = line(&mut stdout);
    let pid = Pid::from_child(&child);
    let (_, status) = waitpid(Some(pid), WaitOptions::UNTRACED).unwrap().unwrap();
    assert!(status.stopped(), "{status:?}");
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(line(&mut stdout), "continued");
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_interrupt_of_the_terminal_reaches_the_command_once() {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let slave = || File::options().read(true).write(true).open(name.to_str().unwrap()).unwrap();
    let script = "count=0; trap 'count=$((count+1)); echo got' INT; test -t 0 && echo ready; \
                  while [ $count = 0 ]; do sleep 0.05; done; sleep 0.3; exit $((40+count))";
    let mut command = exec(&[], &sh(script));
    command.stdin(slave()).stdout(slave()).stderr(Stdio::null());
    // SAFETY: the closure makes system calls only.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            rustix::process::ioctl_tiocsctty(std::io::stdin())?;
            Ok(())
        });
    }
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut master = File::from(terminal);
    let mut seen = String::new();
    let mut wait_for = |master: &mut File, word: &str| {
        let mut chunk = [0; 256];
        while !seen.contains(word) {
            let length = master.read(&mut chunk).unwrap();
            seen.push_str(&String::from_utf8_lossy(&chunk[..length]));
        }
    };
    wait_for(&mut master, "ready");
    master.write_all(b"\x03").unwrap();
    wait_for(&mut master, "got");
    assert_eq!(child.wait().unwrap().code(), Some(41));
}

#[test]
fn many_short_processes_leave_no_control_group_behind() {
    let script = "i=0; while [ $i -lt 10000 ]; do /bin/true; i=$((i+1)); done; grep ^0:: /proc/self/cgroup";
    let output = run(&[], &sh(script));
    assert!(output.status.success(), "{output:?}");
    let stdout = text(&output.stdout);
    assert!(stdout.contains("/selfconn-exec-"), "{stdout}");
    let own = selfconn::system::cgroup::own_group().unwrap().directory;
    let left: Vec<_> = fs::read_dir(own).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let name = stdout.trim().rsplit('/').next().unwrap();
    assert!(!left.iter().any(|left| left == name), "{name} is left: {left:?}");
}

#[test]
fn a_process_that_goes_on_is_mentioned_and_its_group_is_removed() {
    let output = run(&[], &sh("sleep 2 >/dev/null 2>&1 & exit 7"));
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{stderr}");
    assert!(stderr.contains("selfconn: 1 process of the command still runs"), "{stderr}");
}

#[test]
fn a_self_connection_is_reported_with_a_fix() {
    let repro = selfconn().get_program().to_str().unwrap().to_owned();
    let directory = tempfile::tempdir().unwrap();
    let (report, summary) = (directory.path().join("report"), directory.path().join("summary"));
    let options = ["--fail", "--annotate", "github", "--report", report.to_str().unwrap()];
    let output = exec(&options, &[&repro, "repro", "--json"])
        .env("GITHUB_STEP_SUMMARY", &summary)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let report = fs::read_to_string(report).unwrap();
    let lines: Vec<_> = report.lines().collect();
    assert!(
        lines[0].starts_with("selfconn: 1 self-connection, 1 server kept out; watched control group /"),
        "{report}"
    );
    assert!(
        lines[2].contains(&format!("{repro} repro --json (pid "))
            && lines[2].contains(") connected to itself at 127.0.0.1:"),
        "{report}"
    );
    for (at, word) in [
        (3, "  cause     the client had bound this port itself"),
        (4, "  held      "),
        (5, "  kept out  selfconn (pid "),
        (6, "  fix       bind the client to another port"),
    ] {
        assert!(lines[at].starts_with(word), "{report}");
    }
    assert!(lines[4].ends_with(", and 1m0s more in TIME_WAIT"), "{report}");
    let annotations: Vec<String> = text(&output.stderr).lines().map(str::to_owned).collect();
    // `repro` shows that nobody can bind the port.
    assert_eq!(annotations.len(), 2, "{annotations:?}");
    assert!(annotations[0].starts_with("::error title=TCP self-connection::"), "{annotations:?}");
    assert!(annotations[0].contains("%0AFix: "), "{annotations:?}");
    assert!(annotations[1].contains(" could not bind 127.0.0.1:"), "{annotations:?}");
    assert!(fs::read_to_string(summary).unwrap().contains(&format!("    {}\n", lines[2])));
}
