//! `pages DIRECTORY`: writes the man pages and the completions of bash, zsh and fish, of the same definitions that the
//! binary parses its command line with. An example, so that what it takes is not in the daemon.

use std::{env, fs, path::Path, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Arg, CommandFactory as _, Id, builder::Resettable};
use clap_complete::{Shell, generate};
use clap_mangen::{
    Man,
    roff::{Roff, roman},
};
use selfconn::cli::Cli;

fn main() -> ExitCode {
    let Some(directory) = env::args_os().nth(1) else {
        eprintln!("pages: say where to: pages DIRECTORY");
        return ExitCode::from(2);
    };
    if let Err(error) = write(Path::new(&directory)) {
        eprintln!("pages: {error:#}");
        return ExitCode::from(2);
    }
    ExitCode::SUCCESS
}

fn write(directory: &Path) -> Result<()> {
    for (name, content) in pages()? {
        let path = directory.join(name);
        let written =
            fs::create_dir_all(path.parent().unwrap_or(directory)).and_then(|()| fs::write(&path, content));
        written.with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// Each file's name, as the directories that such files are looked for in want it, and its content.
pub(crate) fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    // Of `selfconn help` the help itself has a line.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let shown = || command.get_subcommands().filter(|command| !command.is_hide_set());
    let names: Vec<String> = [&command].into_iter().chain(shown()).map(name).collect();
    let mut pages = Vec::new();
    for command in [&command].into_iter().chain(shown()) {
        pages.push(page(command, &names)?);
    }
    for (shell, name) in
        [(Shell::Bash, "bash/selfconn"), (Shell::Zsh, "zsh/_selfconn"), (Shell::Fish, "fish/selfconn.fish")]
    {
        let mut script = Vec::new();
        generate(shell, &mut without_hidden(&Cli::command()), "selfconn", &mut script);
        pages.push((name.to_owned(), script));
    }
    Ok(pages)
}

/// The same command without its hidden options, which the completions of bash would offer.
fn without_hidden(command: &clap::Command) -> clap::Command {
    // What conflicts with a hidden option must forget it: clap asks that each name it is told exists.
    let without_conflict = |argument: &Arg| {
        let conflicts = command.get_arg_conflicts_with(argument).into_iter();
        let shown = conflicts.filter(|other| !other.is_hide_set()).map(|other| other.get_id().clone());
        argument.clone().conflicts_with(Resettable::<Id>::Reset).conflicts_with_all(shown)
    };
    // Names are `'static` where clap is built without owned strings, as it is for the daemon.
    let name: &str = command.get_name().to_owned().leak();
    let shown = clap::Command::new(name)
        .args(command.get_arguments().filter(|argument| !argument.is_hide_set()).map(without_conflict))
        .subcommands(command.get_subcommands().filter(|command| !command.is_hide_set()).map(without_hidden));
    match command.get_about() {
        Some(about) => shown.about(about.clone()),
        None => shown,
    }
}

/// As its page is called.
fn name(command: &clap::Command) -> String {
    command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned()
}

fn page(command: &clap::Command, names: &[String]) -> Result<(String, Vec<u8>)> {
    let source = format!("selfconn {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).source(source).manual("selfconn");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    let others = names.iter().filter(|other| **other != name(command));
    let others: Vec<String> = others.map(|name| format!("{name}(1)")).collect();
    let mut roff = examples(command);
    roff.control("SH", ["SEE ALSO"]).text([roman(others.join(", "))]);
    roff.to_writer(&mut page)?;
    Ok((format!("man/{}", man.get_filename()), page))
}

/// What help ends with. Its lines stay as they are: a paragraph would be filled and lose its columns.
fn examples(command: &clap::Command) -> Roff {
    let mut roff = Roff::new();
    let text = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    roff.control("SH", ["EXAMPLES"]).control("nf", []);
    for line in text.trim_start_matches("Examples:\n").lines() {
        roff.text([roman(line)]);
    }
    roff.control("fi", []);
    roff
}
