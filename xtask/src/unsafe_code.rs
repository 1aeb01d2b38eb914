//! Compares the table of `unsafe` code in SECURITY.md with the sources. Test code only.

use std::{collections::BTreeMap, fs, path::Path};

use crate::{fingerprint, workspace::Workspace};

/// The number of unsafe blocks, functions, implementations and attributes of each file, without tests and
/// benchmarks.
fn count_by_file(root: &Path) -> BTreeMap<String, usize> {
    let mut files = Vec::new();
    for part in ["selfconn-ebpf/src", "selfconn-user/src", "xtask/src"] {
        fingerprint::collect(root, Path::new(part), &mut files).unwrap();
    }
    files.retain(|file| !file.ends_with("unsafe_code.rs"));
    let count = |file: &Path| {
        let text = fs::read_to_string(root.join(file)).unwrap();
        text.lines().map(|line| in_line(line.split("//").next().unwrap_or_default())).sum()
    };
    let counts = files.iter().map(|file| (file.display().to_string(), count(file)));
    counts.filter(|&(_, count)| count > 0).collect()
}

fn in_line(line: &str) -> usize {
    ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern", "#[unsafe("]
        .iter()
        .map(|form| line.matches(form).count())
        .sum()
}

/// The rows of the table: a file between backticks, and a number.
fn documented_counts(text: &str) -> BTreeMap<String, usize> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `")?.split('|');
        let file = cells.next()?.trim().strip_suffix('`')?.to_owned();
        Some((file, cells.next()?.trim().parse().ok()?))
    };
    text.lines().filter_map(row).filter(|(file, _)| file.ends_with(".rs")).collect()
}

#[test]
fn security_md_lists_all_unsafe_code() {
    let root = Workspace::find().unwrap().root;
    let documented = documented_counts(&fs::read_to_string(root.join("SECURITY.md")).unwrap());
    assert_eq!(documented, count_by_file(&root), "left: SECURITY.md, right: the sources");
}

#[test]
fn each_form_of_unsafe_is_counted() {
    for (line, count) in [
        ("let a = unsafe { b() };", 1),
        ("    unsafe impl Pod for A {}", 1),
        ("pub(crate) unsafe fn a() {", 1),
        ("#[unsafe(no_mangle)]", 1),
        ("use rustix::thread::unshare_unsafe;", 0),
        ("unsafe { unshare_unsafe(flags) }?;", 1),
    ] {
        assert_eq!(in_line(line), count, "{line}");
    }
}
