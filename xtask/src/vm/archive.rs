//! Kernel packages from Debian's archive: which there are, and fetching them, through an apt with a state, a cache and
//! a list of sources of its own. The machine's apt is asked where the archive is and how to reach it (proxies,
//! credentials), and stays as it is.

use std::{
    cmp::Ordering,
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::sources::{Archive, Source, parse_deb822, parse_lines};
use crate::{environment, progress::say, workspace::write_if_changed};

/// The keyring of the package debian-archive-keyring, for machines whose sources don't name theirs.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The archive changes a few times a day; a kernel that is a day late is none the worse.
const LISTS_MAX_AGE: Duration = Duration::from_hours(24);

/// A kernel's package in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Package {
    name: String,
    /// Debian's version: the kernel's, and the packaging's after a dash.
    pub(super) version: String,
    depends: String,
}

impl Package {
    /// The kernel's own version.
    pub(super) fn kernel_version(&self) -> &str {
        self.version.split('-').next().unwrap_or(&self.version)
    }

    /// What this package and its version are called in one word.
    pub(super) fn id(&self) -> String {
        format!("{}_{}", self.name, self.version)
    }

    /// The packages that hold the image and the modules: this one; or, where it is an empty one that pulls in the
    /// others (so from 6.19), those.
    fn parts(&self) -> Vec<&str> {
        let parts: Vec<&str> = self
            .depends
            .split([',', '|'])
            .filter_map(|dependency| dependency.split_whitespace().next())
            .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
            .collect();
        if parts.is_empty() { vec![&self.name] } else { parts }
    }
}

/// An apt of our own.
#[derive(Debug)]
pub(super) struct Apt {
    directory: PathBuf,
    updated: bool,
}

impl Apt {
    /// Sets it up in this directory, and fetches the lists of packages unless those here are new enough.
    pub(super) fn open(directory: PathBuf) -> Result<Self> {
        for sub in ["lists/partial", "cache/archives/partial", "packages"] {
            let sub = directory.join(sub);
            fs::create_dir_all(&sub).with_context(|| format!("create {}", sub.display()))?;
        }
        let archive = Archive::find(&system_sources()?)
            .context("no source of Debian packages in /etc/apt: name the kernels by --kernel PATH")?;
        let list = archive.list(KEYRING);
        let list_path = directory.join("sources.list");
        let unchanged = fs::read_to_string(&list_path).is_ok_and(|old| old == list);
        // Written only if they differ: apt reads the lists anew when they are younger.
        write_if_changed(&list_path, list.as_bytes())?;
        write_if_changed(&directory.join("status"), b"")?;
        let mut this = Self { directory, updated: false };
        if !unchanged || !this.lists_are_fresh() {
            this.update()?;
        }
        Ok(this)
    }

    /// The cloud kernels there are.
    pub(super) fn kernels(&self) -> Result<Vec<Package>> {
        let kinds = "^linux-(image|binary|modules)-[0-9].*-cloud-amd64$";
        let names = self.run("apt-cache", &["search", "--names-only", kinds])?;
        let names: Vec<&str> = names.lines().filter_map(|line| line.split(' ').next()).collect();
        ensure!(!names.is_empty(), "no cloud kernels in the archive");
        Ok(complete(parse_packages(&self.run("apt-cache", &[&["show"], names.as_slice()].concat())?)))
    }

    /// Fetches the packages that make up a kernel, and yields their files. apt checks them against the signed lists.
    pub(super) fn fetch(&self, package: &Package) -> Result<Vec<PathBuf>> {
        let directory = self.directory.join("packages").join(package.id());
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let parts: Vec<String> =
            package.parts().iter().map(|part| format!("{part}={}", package.version)).collect();
        let mut command = self.command("apt-get");
        command.arg("download").args(&parts).current_dir(&directory);
        output_of(command)?;
        let mut files = Vec::new();
        for entry in fs::read_dir(&directory).with_context(|| format!("list {}", directory.display()))? {
            files.push(entry?.path());
        }
        ensure!(files.len() == parts.len(), "asked apt for {} and got {files:?}", parts.join(" "));
        Ok(files)
    }

    /// Forgets the fetched packages: what is needed of them has been taken out.
    pub(super) fn forget(&self, package: &Package) -> Result<()> {
        let directory = self.directory.join("packages").join(package.id());
        fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))
    }

    fn stamp(&self) -> PathBuf {
        self.directory.join("updated")
    }

    fn lists_are_fresh(&self) -> bool {
        let updated = fs::metadata(self.stamp()).and_then(|stamp| stamp.modified());
        updated.is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age < LISTS_MAX_AGE))
    }

    /// Whether the lists were fetched just now.
    pub(super) fn is_up_to_date(&self) -> bool {
        self.updated
    }

    /// Fetches the lists. A suite that isn't there, or an archive that can't be reached, is no reason to do without
    /// the lists that are.
    pub(super) fn update(&mut self) -> Result<()> {
        self.updated = true;
        match self.run("apt-get", &["update", "--quiet=2", "-o", "APT::Update::Error-Mode=any"]) {
            Ok(_) => fs::write(self.stamp(), "").context("note the time of the update"),
            Err(error) => {
                let lists = fs::read_dir(self.directory.join("lists")).context("list the package lists")?;
                let mut names = lists.filter_map(|entry| Some(entry.ok()?.file_name()));
                ensure!(names.any(|name| name.to_string_lossy().contains("Packages")), "{error:#}");
                say(format!("using the package lists that are there: {error:#}"));
                Ok(())
            }
        }
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(arguments);
        output_of(command)
    }

    /// A program of apt that knows our directories only. The options go on the command line, which is read after every
    /// file of configuration.
    fn command(&self, program: &str) -> Command {
        let mut command = environment::plain(program);
        for (option, file) in [
            ("Dir::State", ""),
            ("Dir::State::lists", "lists/"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache/"),
            ("Dir::Etc::sourcelist", "sources.list"),
            ("Dir::Etc::sourceparts", "no-more-sources"),
            ("Dir::Etc::preferences", "no-preferences"),
            ("Dir::Etc::preferencesparts", "no-preferences"),
        ] {
            command.arg("-o").arg(format!("{option}={}", self.directory.join(file).display()));
        }
        // As root, apt would hand the fetching to a user that can't write here.
        command.args(["-o", "APT::Architecture=amd64", "-o", "APT::Sandbox::User="]);
        command.args(["-o", "Acquire::Languages=none"]);
        command
    }
}

/// The lines of a `sources.list` for this suite alone, with its updates, from where this machine gets its packages.
pub(super) fn sources_of(suite: &str) -> Result<String> {
    let archive = Archive::find(&system_sources()?).context("no source of Debian packages in /etc/apt")?;
    let wanted = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
    let of_suite = |line: &&str| line.split(' ').any(|word| wanted.iter().any(|wanted| wanted == word));
    let list = archive.list(KEYRING);
    let lines: Vec<&str> = list.lines().filter(of_suite).collect();
    ensure!(!lines.is_empty(), "{suite} is no suite of Debian's that we know");
    Ok(lines.join("\n") + "\n")
}

/// Every source this machine's apt reads.
fn system_sources() -> Result<Vec<Source>> {
    let etc = Path::new("/etc/apt");
    let mut files = vec![etc.join("sources.list")];
    if let Ok(parts) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(parts.filter_map(|part| Some(part.ok()?.path())));
    }
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let parse = match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_lines,
            Some("sources") => parse_deb822,
            _ => continue,
        };
        match fs::read_to_string(&file) {
            Ok(text) => sources.extend(parse(&text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
        }
    }
    Ok(sources)
}

/// Runs a command to its end; what it says on standard error is the error.
fn output_of(mut command: Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("start {program}"))?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        let error: Vec<&str> = error.lines().filter(|line| line.starts_with("E:")).collect();
        bail!("{program}: {}: {}", output.status, error.join("; "));
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program}: output"))
}

/// Reads the paragraphs `apt-cache show` prints.
fn parse_packages(text: &str) -> Vec<Package> {
    text.split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| {
                paragraph
                    .lines()
                    .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
                    .map(str::to_owned)
            };
            Some(Package {
                name: field("Package")?,
                version: field("Version")?,
                depends: field("Depends").unwrap_or_default(),
            })
        })
        .collect()
}

/// The kernels among the packages; without those whose parts have left the archive already.
fn complete(packages: Vec<Package>) -> Vec<Package> {
    let there: BTreeSet<(String, String)> =
        packages.iter().map(|package| (package.name.clone(), package.version.clone())).collect();
    let is_there =
        |package: &Package, part: &str| there.contains(&(part.to_owned(), package.version.clone()));
    packages
        .into_iter()
        .filter(|package| package.name.starts_with("linux-image-"))
        .filter(|package| package.parts().iter().all(|part| is_there(package, part)))
        .collect()
}

/// The newest kernel whose version begins with these numbers: `6.12` is any of 6.12, and not 6.1.
pub(super) fn newest<'a>(packages: &'a [Package], wanted: &str) -> Option<&'a Package> {
    packages
        .iter()
        .filter(|package| numbers(package.kernel_version()).starts_with(&numbers(wanted)))
        .max_by(|a, b| compare(&a.version, &b.version))
}

/// The numbers a kernel's version begins with.
pub(super) fn numbers(version: &str) -> Vec<u32> {
    version.split('.').map_while(|number| number.parse().ok()).collect()
}

/// Orders versions as Debian's policy says (chapter "Version"): runs of digits as numbers, the rest by character,
/// where `~` comes before everything, the end included, and letters before other characters.
fn compare(a: &str, b: &str) -> Ordering {
    fn weight(byte: Option<u8>) -> (u8, u8) {
        match byte {
            Some(b'~') => (0, 0),
            None | Some(b'0'..=b'9') => (1, 0),
            Some(byte) if byte.is_ascii_alphabetic() => (2, byte),
            Some(byte) => (3, byte),
        }
    }
    fn number(text: &mut &[u8]) -> u64 {
        let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (run, rest) = text.split_at(digits);
        *text = rest;
        run.iter()
            .fold(0, |number: u64, digit| number.saturating_mul(10).saturating_add(u64::from(digit - b'0')))
    }
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    while !(a.is_empty() && b.is_empty()) {
        match weight(a.first().copied()).cmp(&weight(b.first().copied())) {
            Ordering::Equal => {}
            unequal => return unequal,
        }
        if weight(a.first().copied()) == weight(None) {
            match number(&mut a).cmp(&number(&mut b)) {
                Ordering::Equal => {}
                unequal => return unequal,
            }
        } else {
            (a, b) = (&a[1..], &b[1..]);
        }
    }
    Ordering::Equal
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, depends: &str) -> Package {
        Package { name: name.into(), version: version.into(), depends: depends.into() }
    }

    #[test]
    fn orders_versions_as_dpkg_does() {
        for (older, newer) in [
            ("6.1.9-1", "6.1.192-2"),
            ("6.1.192-2~deb11u1", "6.1.192-2"),
            ("6.12.117-1~bpo12+1", "6.12.117-1"),
            ("6.12.117-1", "6.12.117-1+b1"),
            ("7.3~rc4-1~exp1", "7.3.4-1~bpo13+1"),
            ("5.10.262-1", "6.1.1-1"),
            ("1.0a-1", "1.0+1"),
        ] {
            assert_eq!(compare(older, newer), Ordering::Less, "{older} < {newer}");
            assert_eq!(compare(newer, older), Ordering::Greater, "{newer} > {older}");
            assert_eq!(compare(older, older), Ordering::Equal, "{older}");
        }
    }

    #[test]
    fn picks_the_newest_of_a_series() {
        let packages = [
            package("a", "6.1.192-2", ""),
            package("b", "6.1.192-2~deb11u1", ""),
            package("c", "6.12.99-1", ""),
            package("d", "6.12.117-1", ""),
            package("e", "7.2.13-1", ""),
            package("f", "7.3.4-1~bpo13+1", ""),
        ];
        for (wanted, name) in [
            ("6.1", Some("a")),
            ("6.12", Some("d")),
            ("6.12.99", Some("c")),
            ("7", Some("f")),
            ("5.10", None),
        ] {
            assert_eq!(newest(&packages, wanted).map(|package| package.name.as_str()), name, "{wanted}");
        }
    }

    #[test]
    fn knows_the_parts_of_a_split_kernel() {
        let text = "Package: linux-image-6.18.15-cloud-amd64\nVersion: 6.18.15-1\n\
                    Depends: kmod, linux-base-6.18.15 (= 6.18.15-1)\nDescription: Linux\n more\n\n\
                    Package: linux-image-7.3.4-cloud-amd64\nVersion: 7.3.4-1\n\
                    Depends: dracut | initramfs-tools, linux-binary-7.3.4-cloud-amd64 (= 7.3.4-1), \
                    linux-modules-7.3.4-cloud-amd64 (= 7.3.4-1)\n\n";
        let packages = parse_packages(text);
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].parts(), ["linux-image-6.18.15-cloud-amd64"]);
        assert_eq!(
            packages[1].parts(),
            ["linux-binary-7.3.4-cloud-amd64", "linux-modules-7.3.4-cloud-amd64"]
        );
        assert_eq!(packages[1].kernel_version(), "7.3.4");
        assert_eq!(packages[1].id(), "linux-image-7.3.4-cloud-amd64_7.3.4-1");
    }

    #[test]
    fn leaves_out_kernels_whose_parts_are_gone() {
        let split = |version: &str| {
            package(
                "linux-image-x",
                version,
                "linux-binary-x (= 1), linux-modules-x (= 1), linux-base-x (= 1)",
            )
        };
        let packages = vec![
            package("linux-image-whole", "6.12.1-1", "kmod"),
            split("7.1-1"),
            split("7.2-1"),
            package("linux-binary-x", "7.1-1", ""),
            package("linux-binary-x", "7.2-1", ""),
            package("linux-modules-x", "7.2-1", ""),
        ];
        let versions: Vec<String> = complete(packages).into_iter().map(|package| package.version).collect();
        assert_eq!(versions, ["6.12.1-1", "7.2-1"]);
    }
}
