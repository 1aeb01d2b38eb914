//! Compares the kernels of the workflow for a public CI with those of `cargo xtask vm --all`. Test code only.

use std::fs;

use crate::{
    architecture::{AARCH64, X86_64},
    workspace::Workspace,
};

/// The architecture and the kernel of each row of the matrix.
fn rows(workflow: &str) -> Vec<(&str, &str)> {
    let lines = workflow.lines().filter_map(|line| line.trim().strip_prefix("- { arch: "));
    lines
        .filter_map(|line| {
            let (architecture, rest) = line.split_once(", kernel: \"")?;
            Some((architecture, rest.split_once('"')?.0))
        })
        .collect()
}

#[test]
fn the_workflow_boots_each_kernel_of_the_matrix() {
    let file = Workspace::find().unwrap().root.join(".github/workflows/checks.yml");
    let text = fs::read_to_string(file).unwrap();
    let rows = rows(&text);
    for architecture in [&X86_64, &AARCH64] {
        let kernels = rows.iter().filter(|(name, _)| *name == architecture.name).map(|(_, kernel)| *kernel);
        // Real-time kernels are no default of an architecture.
        let kernels: Vec<_> = kernels.filter(|kernel| !kernel.ends_with("-rt")).collect();
        assert_eq!(kernels, architecture.kernels, "{}", architecture.name);
    }
}
