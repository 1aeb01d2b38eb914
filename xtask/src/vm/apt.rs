//! Kernel packages from Debian's archive: lists and downloads them, with a state, a cache and a list of
//! sources of our own. The machine's apt says where its archive is and how to reach it (proxies,
//! credentials), and is not changed.

use std::{
    cmp::Reverse,
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, SystemTime},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::flavour::Flavour;
use crate::{
    architecture::Architecture,
    environment::plain,
    packages::{self, debs_in},
    run::{self, say},
    workspace::write_if_changed,
};

/// The keys of Debian's archive, from the package debian-archive-keyring.
pub(super) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The suites with the kernels that we test.
const SUITES: [&str; 9] = [
    "bullseye",
    "bullseye-updates",
    "bookworm",
    "bookworm-updates",
    "bookworm-backports",
    "trixie",
    "trixie-updates",
    "trixie-backports",
    "sid",
];

/// The suites with an archive of security updates.
const SECURED: [&str; 3] = ["bullseye", "bookworm", "trixie"];

/// Other names of Debian's suites.
const ALIASES: [&str; 5] = ["oldoldstable", "oldstable", "stable", "testing", "unstable"];

/// A kernel that is a day old is good enough.
const LISTS_MAX_AGE: Duration = Duration::from_hours(24);

/// The addresses of the two parts of Debian's archive.
#[derive(Clone, Debug, PartialEq, Eq)]
struct DebianArchive {
    main: String,
    security: Option<String>,
}

impl DebianArchive {
    /// Asks the machine's apt, which reads its sources in all their forms.
    fn of_this_machine() -> Result<Self> {
        let format = "$(REPO_URI) $(RELEASE)";
        let ask = || {
            run::output(plain("apt-get").args(["indextargets", "--format", format, "Created-By: Packages"]))
        };
        let mut sources = ask()?;
        // Without package lists apt names no source.
        if Self::find(&sources).is_none() {
            if !packages::may_install() {
                bail!("apt knows no source of Debian packages: run: sudo apt-get update");
            }
            packages::update();
            sources = ask()?;
        }
        Self::find(&sources)
            .context("no source of Debian's packages in /etc/apt: add one, or name kernels by --kernel PATH")
    }

    /// Finds it among lines of an address and a suite.
    fn find(sources: &str) -> Option<Self> {
        let sources = || sources.lines().filter_map(|line| line.rsplit_once(' '));
        let is_suite = |name: &str| SUITES.contains(&name) || ALIASES.contains(&name);
        let security_of = |suite: &'_ str| {
            suite.strip_suffix("-security").or(suite.strip_suffix("/updates")).is_some_and(is_suite)
        };
        let is_main = |suite: &str| {
            is_suite(suite.strip_suffix("-updates").or(suite.strip_suffix("-backports")).unwrap_or(suite))
        };
        Some(Self {
            main: sources().find(|(_, suite)| is_main(suite))?.0.to_owned(),
            security: sources().find(|(_, suite)| security_of(suite)).map(|(uri, _)| uri.to_owned()),
        })
    }

    /// The lines of a `sources.list` with these suites, for packages of this architecture (Debian's name). Only the
    /// lists of packages are fetched.
    fn list(&self, suites: &[&str], secured: &[&str], architecture: &str) -> String {
        let main = suites.iter().map(|suite| format!("{} {suite}", self.main));
        let security = self
            .security
            .iter()
            .flat_map(|uri| secured.iter().map(move |suite| format!("{uri} {suite}-security")));
        main.chain(security)
            .map(|source| {
                format!("deb [arch={architecture} target=Packages signed-by={KEYRING}] {source} main\n")
            })
            .collect()
    }
}

/// A `sources.list` for this suite with its updates, from this machine's archive, for packages of an architecture.
pub(super) fn sources_of(suite: &str, architecture: &Architecture) -> Result<String> {
    let updates = format!("{suite}-updates");
    ensure!(SECURED.contains(&suite), "{suite} is not a known suite of Debian's");
    Ok(DebianArchive::of_this_machine()?.list(&[suite, &updates], &[suite], architecture.debian))
}

/// A kernel's package in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct KernelPackage {
    name: String,
    /// Debian's version: the kernel's, a dash, and the packaging's.
    version: String,
    depends: String,
}

impl KernelPackage {
    /// The name of its directory.
    pub(super) fn id(&self) -> String {
        format!("{}_{}", self.name, self.version)
    }

    /// The packages with the image and the modules. Since 6.19 the package of a kernel is empty and depends
    /// on them.
    fn parts(&self) -> Vec<&str> {
        let names =
            self.depends.split([',', '|']).filter_map(|dependency| dependency.split_whitespace().next());
        let parts: Vec<&str> = names
            .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
            .collect();
        if parts.is_empty() { vec![&self.name] } else { parts }
    }
}

/// An apt with directories of its own.
#[derive(Debug)]
pub(super) struct PrivateApt {
    directory: PathBuf,
    architecture: &'static Architecture,
    pub(super) is_updated: bool,
}

impl PrivateApt {
    /// Sets it up below this directory for packages of an architecture, and fetches their lists if they are older than
    /// a day.
    pub(super) fn open(directory: &Path, architecture: &'static Architecture) -> Result<Self> {
        let directory = directory.join(format!("apt-{}", architecture.debian));
        for sub in ["lists/partial", "cache/archives/partial", "packages"] {
            let sub = directory.join(sub);
            fs::create_dir_all(&sub).with_context(|| format!("create {}", sub.display()))?;
        }
        let list = DebianArchive::of_this_machine()?.list(&SUITES, &SECURED, architecture.debian);
        let list_path = directory.join("sources.list");
        let is_unchanged = fs::read_to_string(&list_path).is_ok_and(|old| old == list);
        write_if_changed(&list_path, list.as_bytes())?;
        write_if_changed(&directory.join("status"), b"")?;
        let mut apt = Self { directory, architecture, is_updated: false };
        let updated = fs::metadata(apt.stamp()).and_then(|stamp| stamp.modified());
        let is_fresh = |at| SystemTime::now().duration_since(at).is_ok_and(|age| age < LISTS_MAX_AGE);
        if !(is_unchanged && updated.is_ok_and(is_fresh)) {
            apt.update()?;
        }
        Ok(apt)
    }

    /// The kernels of a flavour in the archive.
    pub(super) fn kernels(&self, flavour: &Flavour) -> Result<Vec<KernelPackage>> {
        let pattern = format!("^linux-(image|binary|modules)-[0-9].*-{}$", flavour.packages);
        let names = run::output(self.command("apt-cache").args(["search", "--names-only", &pattern]))?;
        let names = names.lines().filter_map(|line| line.split(' ').next());
        let names: Vec<&str> = names.filter(|name| flavour.has_package(name)).collect();
        ensure!(!names.is_empty(), "no kernels {} in the archive", flavour.packages);
        Ok(complete(parse_packages(&run::output(self.command("apt-cache").arg("show").args(names))?)))
    }

    /// Downloads the parts of a kernel into a directory of its own. apt checks them against the signed lists.
    pub(super) fn fetch(&self, package: &KernelPackage) -> Result<PathBuf> {
        let directory = self.directory.join("packages").join(package.id());
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let parts = package.parts().into_iter().map(|part| format!("{part}={}", package.version));
        let mut download = self.command("apt-get");
        run::output(download.arg("download").args(parts).current_dir(&directory))?;
        let files = debs_in(&directory)?;
        ensure!(files.len() == package.parts().len(), "downloaded {} and got {files:?}", package.id());
        Ok(directory)
    }

    /// Downloads a package, and unpacks it into this directory.
    pub(super) fn unpack(&self, package: &str, directory: &Path) -> Result<()> {
        fs::create_dir_all(directory).with_context(|| format!("create {}", directory.display()))?;
        run::output(self.command("apt-get").args(["download", package]).current_dir(directory))?;
        packages::extract_debs(directory)
    }

    fn stamp(&self) -> PathBuf {
        self.directory.join("updated")
    }

    /// Fetches the package lists. If some can't be fetched, the present ones are used.
    pub(super) fn update(&mut self) -> Result<()> {
        self.is_updated = true;
        let mut update = self.command("apt-get");
        match run::output(update.args(["update", "--quiet=2", "-o", "APT::Update::Error-Mode=any"])) {
            Ok(_) => fs::write(self.stamp(), "").context("note the time of the update"),
            Err(error) => {
                let lists = fs::read_dir(self.directory.join("lists")).context("list the package lists")?;
                let mut names = lists.filter_map(|entry| Some(entry.ok()?.file_name()));
                ensure!(names.any(|name| name.to_string_lossy().contains("Packages")), "{error:#}");
                say(format!("using the present package lists: {error:#}"));
                Ok(())
            }
        }
    }

    /// A program of apt with our directories. apt reads options on the command line after all configuration
    /// files.
    fn command(&self, program: &str) -> Command {
        let mut command = plain(program);
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
        // As root, apt would download as another user, who can't write here.
        command.arg("-o").arg(format!("APT::Architecture={}", self.architecture.debian));
        command.args(["-o", "APT::Sandbox::User="]);
        command.args(["-o", "Acquire::Languages=none"]);
        command
    }
}

/// Parses the output of `apt-cache show`.
fn parse_packages(text: &str) -> Vec<KernelPackage> {
    let package = |paragraph: &str| {
        let field = |name: &str| {
            let value = paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.map(str::to_owned)
        };
        Some(KernelPackage {
            name: field("Package")?,
            version: field("Version")?,
            depends: field("Depends").unwrap_or_default(),
        })
    };
    text.split("\n\n").filter_map(package).collect()
}

/// The kernels among the packages whose parts are still in the archive.
fn complete(packages: Vec<KernelPackage>) -> Vec<KernelPackage> {
    let present: BTreeSet<(String, String)> =
        packages.iter().map(|package| (package.name.clone(), package.version.clone())).collect();
    let is_present =
        |package: &KernelPackage, part: &str| present.contains(&(part.to_owned(), package.version.clone()));
    packages
        .into_iter()
        .filter(|package| package.name.starts_with("linux-image-"))
        .filter(|package| package.parts().iter().all(|part| is_present(package, part)))
        .collect()
}

/// The kernels whose version begins with these numbers, the newest first: `6.12` is any of 6.12, and not 6.1.
pub(super) fn newest_first<'a>(packages: &'a [KernelPackage], wanted: &str) -> Vec<&'a KernelPackage> {
    let is_wanted = |package: &&KernelPackage| numbers(&package.version).starts_with(&numbers(wanted));
    let mut wanted: Vec<&KernelPackage> = packages.iter().filter(is_wanted).collect();
    // Packages of the same kernel differ only in how they were made.
    wanted.sort_by_cached_key(|package| Reverse((numbers(&package.version), package.version.clone())));
    wanted
}

/// The numbers at the beginning of a version: 6, 1, 192 of `6.1.192-2` and of `6.1.192-cloud`.
pub(super) fn numbers(version: &str) -> Vec<u32> {
    let upstream = version.split(['-', '~', '+']).next().unwrap_or_default();
    upstream.split('.').map_while(|number| number.parse().ok()).collect()
}

/// True if this names a kernel in the archive, and not a file.
pub(super) fn is_version(text: &str) -> bool {
    !numbers(text).is_empty() && !Path::new(text).is_file()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, version: &str, depends: &str) -> KernelPackage {
        KernelPackage { name: name.into(), version: version.into(), depends: depends.into() }
    }

    #[test]
    fn the_archive_is_found_by_the_names_of_suites() {
        let (main, security) = ("http://archive.example/debian/", "http://archive.example/security/");
        for (suite, is_main, is_security) in [
            ("bookworm", true, false),
            ("bookworm-updates", true, false),
            ("stable-backports", true, false),
            ("sid", true, false),
            ("trixie-security", false, true),
            ("oldstable/updates", false, true),
            ("noble", false, false),
            ("noble-security", false, false),
            ("bookworm-pgdg", false, false),
        ] {
            let found = DebianArchive::find(&format!("x://other nodistro\n{main} {suite}\n"));
            assert_eq!(found.is_some(), is_main, "{suite}");
            let found = DebianArchive::find(&format!("{main} trixie\n{security} {suite}\n")).unwrap();
            assert_eq!(found.security.is_some(), is_security, "{suite}");
        }
        let archive = DebianArchive { main: main.into(), security: Some(security.into()) };
        assert_eq!(
            archive.list(&["sid"], &["trixie"], "arm64"),
            format!(
                "deb [arch=arm64 target=Packages signed-by={KEYRING}] {main} sid main\n\
                 deb [arch=arm64 target=Packages signed-by={KEYRING}] {security} trixie-security main\n"
            )
        );
    }

    #[test]
    fn the_newest_kernel_of_a_series_is_chosen() {
        let packages = [
            package("a", "6.1.192-2", ""),
            package("b", "6.1.9-3", ""),
            package("c", "6.12.99-1", ""),
            package("d", "6.12.117-1~bpo12+1", ""),
            package("e", "7.2.13-1", ""),
            package("f", "7.3.4-1~bpo13+1", ""),
            package("g", "7.3~rc4-1~exp1", ""),
        ];
        for (wanted, name) in [
            ("6.1", Some("a")),
            ("6.12", Some("d")),
            ("6.12.99", Some("c")),
            ("7", Some("f")),
            ("5.10", None),
        ] {
            let newest = newest_first(&packages, wanted).first().map(|package| package.name.as_str());
            assert_eq!(newest, name, "{wanted}");
        }
    }

    #[test]
    fn a_split_kernel_has_two_parts() {
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
        assert_eq!(packages[1].id(), "linux-image-7.3.4-cloud-amd64_7.3.4-1");
    }

    #[test]
    fn a_kernel_with_a_missing_part_is_left_out() {
        let split = |version: &str| {
            let depends = "linux-binary-x (= 1), linux-modules-x (= 1), linux-base-x (= 1)";
            package("linux-image-x", version, depends)
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
