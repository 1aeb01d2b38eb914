//! Compares the tables of threats in SECURITY.md with the tests: each row names the tests that show it. Test code only.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{fingerprint, workspace::Workspace};

/// The last column of these tables.
const COLUMN: &str = "shown by";

/// The name of every test of the workspace.
fn test_names(root: &Path) -> BTreeSet<String> {
    let mut files = Vec::new();
    for part in ["selfconn-ebpf", "selfconn-user", "xtask/src"] {
        fingerprint::collect(root, Path::new(part), &mut files).unwrap();
    }
    files.retain(|file| file.extension().is_some_and(|extension| extension == "rs"));
    files.iter().flat_map(|file| tests_in(&fs::read_to_string(root.join(file)).unwrap())).collect()
}

/// The names of the functions with `#[test]` that are not ignored.
fn tests_in(source: &str) -> Vec<String> {
    let (mut names, mut is_test) = (Vec::new(), false);
    for line in source.lines().map(str::trim_start) {
        if line == "#[test]" {
            is_test = true;
        } else if line.starts_with("#[ignore") {
            is_test = false;
        } else if let Some(rest) = line.strip_prefix("fn ") {
            let name = rest.split('(').next().unwrap_or_default();
            names.extend(std::mem::take(&mut is_test).then(|| name.to_owned()));
        }
    }
    names
}

/// Each row of the tables whose last column is [`COLUMN`], with the tests that it names.
fn rows(text: &str) -> Vec<(String, Vec<String>)> {
    let (mut rows, mut is_in_table) = (Vec::new(), false);
    for line in text.lines() {
        let Some(cells) = line.strip_prefix("| ").and_then(|line| line.strip_suffix(" |")) else {
            is_in_table &= line.starts_with("|--");
            continue;
        };
        let last = cells.rsplit(" | ").next().unwrap_or_default();
        if last == COLUMN {
            is_in_table = true;
        } else if is_in_table {
            let tests = last.split('`').skip(1).step_by(2).map(str::to_owned).collect();
            rows.push((line.to_owned(), tests));
        }
    }
    rows
}

#[test]
fn security_md_names_tests_that_exist() {
    let root = Workspace::find().unwrap().root;
    let known = test_names(&root);
    let rows = rows(&fs::read_to_string(root.join("SECURITY.md")).unwrap());
    assert!(rows.len() > 30, "{} rows", rows.len());
    for (row, tests) in rows {
        assert!(!tests.is_empty(), "no test shows: {row}");
        for test in tests {
            assert!(known.contains(&test), "there is no test {test}: {row}");
        }
    }
}

#[test]
fn a_row_without_a_test_and_a_test_that_is_ignored_are_found() {
    let text = "| who | shown by |\n|---|---|\n| a | `one`, `two` |\n| b | nothing |\n\n| who | what |\n| c | `d` |\n";
    let rows: Vec<_> = rows(text).into_iter().map(|(_, tests)| tests).collect();
    assert_eq!(rows, [vec!["one".to_owned(), "two".to_owned()], vec![]]);
    let source = "#[test]\nfn one() {\n}\nfn helper() {}\n#[test]\n#[ignore = \"why\"]\nfn two() {}\n";
    assert_eq!(tests_in(source), ["one"]);
}
