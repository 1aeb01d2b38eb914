//! Tests what all commands have in common, with the real binary and for each command of the clap definitions:
//! help with valid examples, one-line errors, exit codes, colour, broken pipes, man pages and completions.
//! These tests cover a new command automatically.

#[path = "../../examples/pages.rs"]
#[expect(dead_code, reason = "only the example itself calls its main function")]
mod pages;

use std::{
    fs::File,
    io,
    process::{Command, Stdio},
};

use clap::{CommandFactory as _, Parser as _};
use selfconn::cli::Cli;

use crate::support::{assert_one_line_error, on_a_terminal, selfconn};

/// The visible commands of the clap definitions.
fn commands() -> Vec<clap::Command> {
    let mut cli = Cli::command().disable_help_subcommand(true);
    cli.build();
    cli.get_subcommands().filter(|command| !command.is_hide_set()).cloned().collect()
}

/// The arguments that select each command. An empty list selects the program itself.
fn names() -> Vec<Vec<String>> {
    let of_commands = commands().into_iter().map(|command| vec![command.get_name().to_owned()]);
    [vec![]].into_iter().chain(of_commands).collect()
}

/// A pipe without a reader.
fn broken_pipe() -> Stdio {
    let (_, writer) = io::pipe().unwrap();
    writer.into()
}

#[test]
fn help_of_each_command_has_an_example_and_fits_a_page() {
    for name in names() {
        for option in ["-h", "--help"] {
            let output = selfconn().args(&name).arg(option).output().unwrap();
            let text = String::from_utf8(output.stdout).unwrap();
            assert!(output.status.success() && output.stderr.is_empty(), "{name:?} {option}");
            assert!(text.contains("\nExamples:\n  selfconn "), "{name:?} {option}: {text}");
            let longest = text.lines().max_by_key(|line| line.chars().count()).unwrap();
            assert!(longest.chars().count() <= 100, "{name:?}: {longest}");
            assert!(!text.contains('\x1b'), "colour in a pipe: {text:?}");
        }
    }
    let output = selfconn().output().unwrap();
    assert_eq!(output.status.code(), Some(2), "without a command: help");
    assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: selfconn <COMMAND>"));
}

/// Checks the example lines that start with the program, up to a pipe, a redirection or the explanation.
#[test]
fn each_example_is_a_valid_command_line() {
    let mut cli = Cli::command();
    cli.build();
    for command in [cli].into_iter().chain(commands()) {
        let text = command.get_after_help().unwrap().to_string();
        let lines = text.lines().filter_map(|line| line.strip_prefix("  selfconn"));
        let mut examples = 0;
        for line in lines {
            let end = ["  ", " | ", " > ", " 2>", " &"].iter().filter_map(|stop| line.find(stop)).min();
            let words =
                line[..end.unwrap_or(line.len())].split_whitespace().map(|word| word.trim_matches('\''));
            let outcome = Cli::try_parse_from(["selfconn"].into_iter().chain(words));
            assert!(outcome.is_ok(), "selfconn{line}: {outcome:?}");
            examples += 1;
        }
        assert!(examples > 1, "{}: {text}", command.get_name());
    }
}

#[test]
fn version_names_the_commit_and_the_object() {
    for option in ["-V", "--version"] {
        let output = selfconn().arg(option).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let version = concat!("selfconn ", env!("CARGO_PKG_VERSION"), " (commit ");
        let (commit, object) =
            text.trim_end().strip_prefix(version).unwrap().split_once(", eBPF object ").unwrap();
        let is_hash = |text: &str| text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        assert!(is_hash(commit) || commit == "unknown", "{text}");
        assert!(object.strip_suffix(" for x86_64 and aarch64)").is_some_and(is_hash), "{text}");
    }
}

#[test]
fn a_wrong_command_line_is_a_one_line_error_that_names_the_help() {
    for name in names() {
        let output = selfconn().args(&name).arg("--no-such-option").output().unwrap();
        let help = [&["selfconn".to_owned()], name.as_slice(), &["--help".to_owned()]].concat().join(" ");
        assert_one_line_error(&output, &["'--no-such-option'", &help]);
        assert!(output.stdout.is_empty());
    }
    assert_one_line_error(
        &selfconn().arg("scann").output().unwrap(),
        &["'scann'", "'scan'", "selfconn --help"],
    );
    // Text from the caller is escaped: it starts no new line and moves no cursor.
    let output = selfconn().args(["run", "--ring-size", "4\nselfconn: \x1b[2Jfine"]).output().unwrap();
    assert_one_line_error(&output, &["--ring-size", "power of two"]);
    assert!(!output.stderr.contains(&b'\x1b'));
}

#[test]
fn each_command_has_json() {
    for command in commands() {
        let has_json = command.get_arguments().any(|argument| argument.get_long() == Some("json"));
        assert!(has_json, "{}", command.get_name());
    }
}

/// The command with its required arguments.
fn runnable(name: &str) -> Command {
    let mut command = selfconn();
    command.arg(name);
    match name {
        "tail" => command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/one-event.jsonl")),
        "exec" => command.arg("true"),
        _ => &mut command,
    };
    command
}

#[test]
fn a_broken_pipe_is_not_an_error() {
    for name in names() {
        let output = selfconn().args(&name).arg("--help").stdout(broken_pipe()).output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{name:?} --help: {output:?}");
    }
    for command in commands() {
        let name = command.get_name();
        for option in [None, Some("--json")] {
            let output = runnable(name).args(option).stdout(broken_pipe()).output().unwrap();
            assert!(output.status.success(), "{name} {option:?}: {output:?}");
            let stderr = String::from_utf8_lossy(&output.stderr);
            assert!(!stderr.contains("panicked") && !stderr.contains("pipe"), "{name} {option:?}: {stderr}");
        }
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    for name in names() {
        let output = selfconn().args(&name).arg("--help").stdout(full()).output().unwrap();
        assert_one_line_error(&output, &["cannot write to stdout", "No space left on device"]);
    }
    // Without `run`: the daemon waits for free space, as it does with its log. The stdout of `exec` is the command's.
    for command in commands().into_iter().filter(|command| !["exec", "run"].contains(&command.get_name())) {
        let mut output = runnable(command.get_name()).stdout(full()).output().unwrap();
        // Lines about namespaces or processes that were not seen can precede the error.
        let end = output.stderr.len().saturating_sub(1);
        if let Some(before) = output.stderr[..end].iter().rposition(|byte| *byte == b'\n') {
            output.stderr.drain(..=before);
        }
        assert_one_line_error(&output, &["cannot write to stdout", "No space left on device"]);
    }
}

#[test]
fn an_error_sets_the_exit_code_also_without_a_reader() {
    let status =
        selfconn().args(["run", "--log", "/proc/no/such/file"]).stderr(broken_pipe()).status().unwrap();
    assert_eq!(status.code(), Some(2));
}

#[test]
fn help_has_colour_on_a_terminal_unless_no_color_is_set() {
    for name in names() {
        let help = || {
            let mut command = selfconn();
            command.args(&name).arg("--help").env_remove("NO_COLOR").env("TERM", "xterm");
            command
        };
        assert!(on_a_terminal(help()).1.contains("\x1b["), "{name:?}");
        let mut plain = help();
        plain.env("NO_COLOR", "1");
        assert!(!on_a_terminal(plain).1.contains('\x1b'), "{name:?}");
    }
}

#[test]
fn output_on_a_terminal_has_no_colour_if_no_color_is_set() {
    for name in ["doctor", "scan", "repro"] {
        let mut command = selfconn();
        command.arg(name).env("NO_COLOR", "1").env("TERM", "xterm");
        let (_, text) = on_a_terminal(command);
        assert!(!text.is_empty() && !text.contains("\x1b["), "{name}: {text:?}");
    }
}

#[test]
fn man_pages_have_the_same_content_as_help() {
    let pages = pages::pages().unwrap();
    let page = |name: &str| {
        let (_, page) = pages.iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}"));
        // Man pages escape the dash, help does not.
        String::from_utf8(page.clone()).unwrap().replace("\\-", "-")
    };
    assert!(page("man/selfconn.1").contains("selfconn-scan(1)"));
    for command in commands() {
        let page = page(&format!("man/selfconn-{}.1", command.get_name()));
        assert!(page.contains(&command.get_about().unwrap().to_string()), "{page}");
        for argument in command.get_arguments() {
            let Some(long) = argument.get_long() else { continue };
            assert_eq!(page.contains(&format!("--{long}")), !argument.is_hide_set(), "--{long}: {page}");
        }
        assert!(page.contains("\n.SH EXAMPLES\n.nf\n  selfconn "), "{page}");
    }
}

/// The completions that bash offers after these words.
fn bash_completions(script: &str, words: &[&str]) -> Vec<String> {
    let query = format!(
        "COMP_WORDS=({}); COMP_CWORD={}; _selfconn selfconn '{}' '{}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"",
        words.join(" "),
        words.len() - 1,
        words[words.len() - 1],
        words[words.len() - 2],
    );
    let output = Command::new("bash").args(["--norc", "-c", &format!("{script}\n{query}")]).output().unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_options_and_values() {
    let pages = pages::pages().unwrap();
    let script = &pages.iter().find(|(name, _)| name == "bash/selfconn").unwrap().1;
    let script = String::from_utf8(script.clone()).unwrap();
    let all = commands();
    for command in &all {
        let name = command.get_name();
        assert!(bash_completions(&script, &["selfconn", &name[..3]]).contains(&name.to_owned()), "{name}");
        assert!(
            bash_completions(&script, &["selfconn", name, "--js"]).contains(&"--json".to_owned()),
            "{name}"
        );
    }
    assert_eq!(bash_completions(&script, &["selfconn", "run", "--hooks", "b"]), ["both"]);
    assert!(
        !bash_completions(&script, &["selfconn", "run", "--"]).contains(&"--without-btf".to_owned()),
        "hidden"
    );
}
