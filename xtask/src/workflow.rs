//! Compares the rows of the workflow for a public CI with those of `cargo xtask vm --all`. Test code only.

use std::fs;

use crate::{vm, workspace::Workspace};

/// The architecture, the kernel and the other arguments of each row of the matrix.
fn rows(workflow: &str) -> Vec<(&str, &str, &str)> {
    let lines =
        workflow.lines().filter_map(|line| line.trim().strip_prefix("- { arch: ")?.strip_suffix(" }"));
    lines
        .filter_map(|line| {
            let (architecture, rest) = line.split_once(", kernel: ")?;
            let (kernel, arguments) = rest.split_once(", variants: ").unwrap_or((rest, ""));
            Some((architecture, kernel.trim_matches('"'), arguments.trim_matches('"')))
        })
        .collect()
}

#[test]
fn the_workflow_boots_each_kernel_of_the_matrix_in_its_variants() {
    let file = Workspace::find().unwrap().root.join(".github/workflows/checks.yml");
    let text = fs::read_to_string(file).unwrap();
    let expected = vm::arguments_of_all();
    let expected: Vec<_> = expected
        .iter()
        .map(|(architecture, kernel, arguments)| (*architecture, kernel.as_str(), arguments.as_str()))
        .collect();
    assert_eq!(rows(&text), expected);
}
