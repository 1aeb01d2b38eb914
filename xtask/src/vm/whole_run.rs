//! A run of the whole matrix, kept in a file row by row: one that was stopped, or in which a row failed, is continued
//! with the rows that have not passed.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::report::MatrixRow;
use crate::{
    environment::plain,
    run,
    workspace::{Workspace, here, write_if_changed},
};

/// What the rows test. A change of the tests themselves leaves the rows that have passed.
const TESTED: [&str; 3] = ["selfconn-ebpf", "selfconn-user/src", "Cargo.lock"];

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// The version of what is tested. None: it is unknown, so the run can't be continued.
    tested: Option<String>,
    /// How long the run took before it was continued the last time.
    before: Duration,
    /// How long it has taken in all, without the pauses.
    took: Duration,
    /// The last result of each row.
    rows: Vec<MatrixRow>,
    /// Kernel and variant of the rows that were booted more than once.
    repeated: BTreeSet<String>,
}

/// A run of the whole matrix.
#[derive(Debug)]
pub(super) struct WholeRun {
    file: PathBuf,
    start: Instant,
    record: Mutex<Record>,
}

impl WholeRun {
    /// A new one, in place of the last. It needs no git; without, it can't be continued.
    pub(super) fn begin(directory: &Path, workspace: &Workspace) -> Result<Self> {
        let record = Record { tested: tested(workspace).ok().flatten(), ..Record::default() };
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        write_if_changed(&file(directory), &serde_json::to_vec_pretty(&record)?)?;
        Ok(Self::of(directory, record))
    }

    /// The last one. It is an error if there is none, or if it tested another daemon or other programs.
    pub(super) fn of_last(directory: &Path, workspace: &Workspace) -> Result<Self> {
        let file = file(directory);
        let last = fs::read(&file).with_context(|| {
            format!("there is no run to continue ({}): leave --continue out", here(&file))
        })?;
        let last: Record = serde_json::from_slice(&last).with_context(|| {
            format!("{} is of another version of cargo xtask: leave --continue out", here(&file))
        })?;
        let record = continued(last, tested(workspace)?.as_deref())?;
        Ok(Self::of(directory, record))
    }

    fn of(directory: &Path, record: Record) -> Self {
        Self { file: file(directory), start: Instant::now(), record: Mutex::new(record) }
    }

    /// The result of a row that has passed.
    pub(super) fn passed(&self, kernel: &str, variant: &str) -> Option<MatrixRow> {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.row(kernel, variant).filter(|row| row.passed()).cloned()
    }

    /// Writes a row's result into the file.
    pub(super) fn add(&self, row: &MatrixRow) -> Result<()> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.add(row, self.start.elapsed());
        write_if_changed(&self.file, &serde_json::to_vec_pretty(&*record)?)?;
        Ok(())
    }

    /// For the line about it in docs/kernels.md.
    pub(super) fn summary(&self) -> String {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        record.summary()
    }
}

fn file(directory: &Path) -> PathBuf {
    directory.join("whole-run.json")
}

impl Record {
    fn row(&self, kernel: &str, variant: &str) -> Option<&MatrixRow> {
        self.rows.iter().find(|row| row.kernel == kernel && row.variant == variant)
    }

    fn add(&mut self, row: &MatrixRow, elapsed: Duration) {
        self.took = self.before + elapsed;
        if self.row(&row.kernel, &row.variant).is_some() {
            self.rows.retain(|old| (&old.kernel, &old.variant) != (&row.kernel, &row.variant));
            self.repeated.insert(format!("{} {}", row.kernel, row.variant));
        }
        self.rows.push(row.clone());
    }

    fn summary(&self) -> String {
        let minutes = self.took.as_secs().div_ceil(60);
        let repeated: Vec<_> = self.repeated.iter().map(String::as_str).collect();
        let repeated = match &repeated[..] {
            [] => String::new(),
            rows => format!("; booted again, because they had not passed: {}", rows.join(", ")),
        };
        format!("{} rows in {minutes} minutes{repeated}", self.rows.len())
    }
}

/// The last run, if it tested the same.
fn continued(last: Record, tested: Option<&str>) -> Result<Record> {
    let paths = TESTED.join(", ");
    match (&last.tested, tested) {
        (Some(then), Some(now)) if then == now => Ok(Record { before: last.took, ..last }),
        (Some(_), Some(_)) => {
            bail!("{paths} have changed since the last run: leave --continue out, and boot all rows")
        }
        _ => bail!(
            "{paths} have, or had in the last run, changes without a commit, or there is no git: leave --continue out"
        ),
    }
}

/// The version of what is tested. None: it has changes that are not committed.
fn tested(workspace: &Workspace) -> Result<Option<String>> {
    let git = |arguments: &[&str]| run::output(plain("git").arg("-C").arg(&workspace.root).args(arguments));
    if !git(&[&["status", "--porcelain", "--"][..], &TESTED].concat())?.trim().is_empty() {
        return Ok(None);
    }
    let trees = TESTED.map(|path| format!("HEAD:{path}"));
    let arguments: Vec<&str> = ["rev-parse"].into_iter().chain(trees.iter().map(String::as_str)).collect();
    Ok(Some(git(&arguments)?.split_whitespace().collect::<Vec<_>>().join(" ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::report::row_of;

    const PASSED: &str = "test a ... ok\n";
    const FAILED: &str = "test a ... FAILED\n";

    fn record() -> Record {
        let mut record = Record { tested: Some("one".into()), ..Record::default() };
        record.add(&row_of("5.10", PASSED), Duration::from_secs(60));
        record.add(&row_of("6.1", FAILED), Duration::from_secs(100));
        record
    }

    #[test]
    fn a_row_that_failed_is_replaced_and_named() {
        let record = record();
        assert_eq!(record.summary(), "2 rows in 2 minutes");
        let json = serde_json::to_vec(&record).unwrap();
        let mut record = continued(serde_json::from_slice(&json).unwrap(), Some("one")).unwrap();
        let has_passed = |record: &Record, kernel| record.row(kernel, "default").unwrap().passed();
        assert!(has_passed(&record, "5.10") && !has_passed(&record, "6.1"));
        record.add(&row_of("6.1", PASSED), Duration::from_secs(50));
        assert!(has_passed(&record, "6.1"));
        assert_eq!(
            record.summary(),
            "2 rows in 3 minutes; booted again, because they had not passed: 6.1 default"
        );
    }

    #[test]
    fn a_run_of_another_daemon_is_not_continued() {
        for now in [Some("two"), None] {
            assert!(continued(record(), now).is_err(), "{now:?}");
        }
        assert!(continued(Record { tested: None, ..record() }, None).is_err());
    }
}
