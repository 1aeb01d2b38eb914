//! `pages DIRECTORY`: writes the man pages and the completions for bash, zsh and fish. It uses the clap
//! definitions of the binary. It is an example, so that its dependencies are not in the daemon.

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
        eprintln!("usage: pages DIRECTORY");
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
        let outcome =
            fs::create_dir_all(path.parent().unwrap_or(directory)).and_then(|()| fs::write(&path, content));
        outcome.with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// The path and the content of each file. Man pages and completions have the file names that the tools search
/// for.
pub(crate) fn pages() -> Result<Vec<(String, Vec<u8>)>> {
    // No page for `selfconn help`, because the help text itself lists it.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    let visible = || command.get_subcommands().filter(|command| !command.is_hide_set());
    let names: Vec<String> = [&command].into_iter().chain(visible()).map(name).collect();
    let mut pages = Vec::new();
    for command in [&command].into_iter().chain(visible()) {
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

/// The command without its hidden options and subcommands, because the bash completions would offer them.
fn without_hidden(command: &clap::Command) -> clap::Command {
    // Removes conflicts with hidden options, because clap requires that each named option exists.
    let without_hidden_conflicts = |argument: &Arg| {
        let conflicts = command.get_arg_conflicts_with(argument).into_iter();
        let visible = conflicts.filter(|other| !other.is_hide_set()).map(|other| other.get_id().clone());
        argument.clone().conflicts_with(Resettable::<Id>::Reset).conflicts_with_all(visible)
    };
    // Leaked, because clap needs `'static` names without its feature `string`, which the daemon does not
    // enable.
    let name: &str = command.get_name().to_owned().leak();
    let visible = clap::Command::new(name)
        .args(
            command.get_arguments().filter(|argument| !argument.is_hide_set()).map(without_hidden_conflicts),
        )
        .subcommands(command.get_subcommands().filter(|command| !command.is_hide_set()).map(without_hidden));
    match command.get_about() {
        Some(about) => visible.about(about.clone()),
        None => visible,
    }
}

/// The name of the man page of a command.
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

/// The examples of the help text. They are not filled (`nf`), so that their columns are preserved.
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
