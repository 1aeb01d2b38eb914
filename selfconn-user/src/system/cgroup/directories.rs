//! Who owns the directories of a control group: `st_uid` where the hierarchy is mounted.

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use selfconn_ebpf::guard::CGROUP_LEVELS;

use super::{CgroupInfo, Component, Hierarchy, Maker, NamedGroup};

/// Where the hierarchies are mounted. They do not move while this process runs.
static MOUNTS: LazyLock<Vec<CgroupMount>> = LazyLock::new(|| {
    // A mount point may have bytes that are not UTF-8; that line does not matter.
    fs::read("/proc/self/mountinfo").map_or_else(|_| vec![], |text| mounts(&String::from_utf8_lossy(&text)))
});

/// Group and others may write.
const WRITABLE: u32 = 0o022;

/// Names of a path beyond this number count as anyone's. The paths of systemd and of the engines in `tests` have less
/// than ten, and the root of a container can make as many as it likes below its own group.
const MAX_LEVELS: usize = 32;

#[derive(Debug, PartialEq, Eq)]
pub(super) struct CgroupMount {
    hierarchy: Hierarchy,
    /// The control group that the mount shows as its root, seen from this process's namespace.
    root: String,
    point: PathBuf,
}

/// The components of a path, each with who can have made it.
pub(in super::super) fn components(hierarchy: Hierarchy, path: &str) -> Vec<Component<'_>> {
    let names = path.split('/').filter(|name| !name.is_empty());
    let Some(directory) = MOUNTS.iter().find_map(|mount| mount.directory(hierarchy, path)) else {
        return names.map(|name| Component { name, maker: Maker::OutOfView }).collect();
    };
    // `directory` ends with the names of the path that the mount shows; those above its root are not seen.
    with_makers(&directory, names.collect(), is_roots_only)
}

/// The names of a path, each with who can have made it. `directory` is that of the last one. A path can have two
/// thousand names, and a look at a directory follows all names above it. So `is_roots` is asked from the root
/// downwards, up to the first directory that is not root's.
fn with_makers<'a>(
    directory: &Path,
    names: Vec<&'a str>,
    mut is_roots: impl FnMut(&Path) -> bool,
) -> Vec<Component<'a>> {
    let parents: Vec<_> = directory.ancestors().skip(1).take(names.len()).collect();
    let mut are_roots = true;
    names
        .into_iter()
        .zip(parents.into_iter().rev())
        .enumerate()
        .map(|(level, (name, parent))| {
            are_roots = are_roots && level < MAX_LEVELS && is_roots(parent);
            Component { name, maker: if are_roots { Maker::Root } else { Maker::Anyone } }
        })
        .collect()
}

/// True if only root can make a directory in this one.
fn is_roots_only(directory: &Path) -> bool {
    fs::metadata(directory).is_ok_and(|is| is_roots(&is))
}

fn is_roots(is: &fs::Metadata) -> bool {
    is.uid() == 0 && is.mode() & WRITABLE == 0
}

/// Calls `each` for every control group of the unified hierarchy whose directory only root can have made, down to the
/// level that rules of the guard can match. What is below a container is left out: its root may be uid 0, too.
///
/// # Errors
/// If the hierarchy is not mounted here, or a directory can't be read. One that was removed meanwhile is no error.
pub fn visit_named(mut each: impl FnMut(NamedGroup)) -> io::Result<()> {
    let root = MOUNTS.iter().find_map(|mount| mount.directory(Hierarchy::Unified, "/")).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "the unified hierarchy of control groups is not mounted")
    })?;
    visit_below(&root, &mut Vec::new(), &mut each)
}

/// A control group of the unified hierarchy.
#[derive(Debug)]
pub struct OwnGroup {
    pub directory: PathBuf,
    /// Seen from this process's control group namespace.
    pub path: String,
}

/// The control group of this process or, if that is so deep that the programs in the kernel would not find a group
/// below it, the one above it.
///
/// # Errors
/// If the unified hierarchy is not mounted here, or does not show the group.
pub fn own_group() -> io::Result<OwnGroup> {
    let text = fs::read_to_string("/proc/self/cgroup")?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    let names = path.unwrap_or("/").split('/').filter(|name| !name.is_empty());
    let path: String = names.take(CGROUP_LEVELS as usize - 1).map(|name| format!("/{name}")).collect();
    let path = if path.is_empty() { "/".to_owned() } else { path };
    let directory = MOUNTS.iter().find_map(|mount| mount.directory(Hierarchy::Unified, &path));
    let directory = directory.ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::NotFound,
            "the unified hierarchy of control groups does not show this process",
        )
    })?;
    // Without the slash after a mount point.
    Ok(OwnGroup { directory: directory.components().collect(), path })
}

fn visit_below(
    directory: &Path,
    names: &mut Vec<String>,
    each: &mut impl FnMut(NamedGroup),
) -> io::Result<()> {
    if names.len() >= CGROUP_LEVELS as usize
        || !unless_removed(fs::metadata(directory))?.is_some_and(|is| is_roots(&is))
    {
        return Ok(());
    }
    for entry in unless_removed(fs::read_dir(directory))?.into_iter().flatten() {
        let Some(entry) = unless_removed(entry)? else { continue };
        let Some(is) = unless_removed(entry.metadata())?.filter(fs::Metadata::is_dir) else { continue };
        names.push(entry.file_name().to_string_lossy().into_owned());
        let components: Vec<_> = names.iter().map(|name| Component { name, maker: Maker::Root }).collect();
        let CgroupInfo { unit, container, .. } = CgroupInfo::new(&components);
        each(NamedGroup { path: format!("/{}", names.join("/")), unit, id: is.ino() });
        if container.is_none() {
            visit_below(&entry.path(), names, each)?;
        }
        names.pop();
    }
    Ok(())
}

/// `None`: the directory was removed.
fn unless_removed<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    /// What an open directory of a removed group may say (`kernfs_get_active`, fs/kernfs/dir.c at v5.10).
    const ENODEV: i32 = 19;
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ENODEV) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

impl CgroupMount {
    /// The directory of a control group. `None`: this mount does not show it.
    fn directory(&self, hierarchy: Hierarchy, path: &str) -> Option<PathBuf> {
        let below = Path::new(path).strip_prefix(&self.root).ok().filter(|_| hierarchy == self.hierarchy)?;
        let is_outside = below.components().any(|name| name == std::path::Component::ParentDir);
        (!is_outside).then(|| self.point.join(below))
    }
}

/// The control group mounts in the text of `/proc/self/mountinfo`.
fn mounts(text: &str) -> Vec<CgroupMount> {
    text.lines()
        .filter_map(|line| {
            let (mount, filesystem) = line.split_once(" - ")?;
            let mut fields = mount.split(' ').skip(3);
            let (root, point) = (fields.next()?, fields.next()?);
            let mut filesystem = filesystem.split(' ');
            let hierarchy = match (filesystem.next()?, filesystem.nth(1)?) {
                ("cgroup2", _) => Hierarchy::Unified,
                ("cgroup", options) if options.split(',').any(|option| option == "name=systemd") => {
                    Hierarchy::Systemd
                }
                _ => return None,
            };
            Some(CgroupMount { hierarchy, root: root.to_owned(), point: point.into() })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};

    use super::*;

    const MOUNTINFO: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
34 31 0:31 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime shared:10 - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 /../.. /host/cgroup ro,relatime - cgroup2 cgroup2 rw,nsdelegate
broken
";

    #[test]
    fn a_directory_is_found_where_its_hierarchy_is_mounted() {
        let mounts = mounts(MOUNTINFO);
        assert_eq!(mounts.len(), 2);
        let directory = |hierarchy, path| mounts.iter().find_map(|mount| mount.directory(hierarchy, path));
        for (hierarchy, path, expected) in [
            (Hierarchy::Systemd, "/a.slice/b.service", Some("/sys/fs/cgroup/systemd/a.slice/b.service")),
            (Hierarchy::Systemd, "/../b.service", None),
            (Hierarchy::Unified, "/../../a/b", Some("/host/cgroup/a/b")),
            (Hierarchy::Unified, "/../../../a", None),
            (Hierarchy::Unified, "/a", None),
        ] {
            assert_eq!(directory(hierarchy, path).as_deref(), expected.map(Path::new), "{path}");
        }
    }

    #[test]
    fn a_name_below_a_directory_that_does_not_exist_may_be_anyones() {
        let makers = |path| -> Vec<_> {
            components(Hierarchy::Unified, path).into_iter().map(|component| component.maker).collect()
        };
        let gone = makers("/selfconn-test-none/a.service");
        let is_mounted = MOUNTS.iter().any(|mount| mount.hierarchy == Hierarchy::Unified);
        let expected = if is_mounted { Maker::Anyone } else { Maker::OutOfView };
        assert_eq!(gone.last(), Some(&expected), "{gone:?}");
        assert_eq!(makers("/../../a"), [Maker::OutOfView; 3]);
        assert_eq!(makers("/"), []);
    }

    /// Whether root made each name, and how many directories were looked at.
    fn by_root(directory: &Path, names: &str, mut is_roots: impl FnMut(&Path) -> bool) -> (Vec<bool>, usize) {
        let mut looks = 0;
        let components = with_makers(directory, names.split('/').collect(), |directory| {
            looks += 1;
            is_roots(directory)
        });
        (components.iter().map(|component| component.maker == Maker::Root).collect(), looks)
    }

    #[test]
    fn nothing_below_the_first_directory_of_a_user_is_looked_at() {
        let names = |count: usize| vec!["a"; count].join("/");
        for (count, users, made_by_root) in
            [(5, None, 5), (5, Some("/m/a"), 1), (2_000, Some("/m/a/a"), 2), (2_000, None, MAX_LEVELS)]
        {
            let (names, users) = (names(count), users.map(Path::new));
            let directory = Path::new("/m").join(&names);
            let is_roots = |at: &Path| users.is_none_or(|users| !at.starts_with(users));
            let (is_by_root, looks) = by_root(&directory, &names, is_roots);
            assert_eq!(is_by_root.len(), count);
            assert_eq!(is_by_root.iter().take_while(|is| **is).count(), made_by_root);
            assert!(!is_by_root[made_by_root..].contains(&true));
            assert_eq!(looks, made_by_root + usize::from(users.is_some()));
        }
    }

    #[test]
    fn no_group_below_a_container_is_visited() {
        let folder = tempfile::tempdir().unwrap();
        let docker = format!("docker-{}.scope", "7e".repeat(32));
        let paths = [
            "a.slice/b.service/worker".to_owned(),
            format!("a.slice/{docker}/batch-1"),
            "machine.slice/machine-web.scope/payload/batch-1".to_owned(),
        ];
        for path in paths {
            fs::DirBuilder::new().recursive(true).mode(0o755).create(folder.path().join(path)).unwrap();
        }
        let mut visited = Vec::new();
        visit_below(folder.path(), &mut Vec::new(), &mut |group| visited.push(group.path)).unwrap();
        visited.sort();
        // Without root, all directories are a user's.
        let is_root = fs::metadata(folder.path()).unwrap().uid() == 0;
        let expected = [
            "/a.slice",
            "/a.slice/b.service",
            "/a.slice/b.service/worker",
            &format!("/a.slice/{docker}"),
            "/machine.slice",
            "/machine.slice/machine-web.scope",
            "/machine.slice/machine-web.scope/payload",
        ];
        assert_eq!(visited, if is_root { expected.to_vec() } else { Vec::new() });
    }

    #[test]
    fn the_owner_and_the_mode_of_a_directory_say_who_makes_names_in_it() {
        const NOBODY: u32 = 65_534;
        let folder = tempfile::tempdir().unwrap();
        let names = "a/b/c/d";
        let directory = folder.path().join("m").join(names);
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&directory).unwrap();
        // Without root, all directories are a user's.
        let is_root = fs::metadata(&directory).unwrap().uid() == 0;
        let assert_by_root = |expected: [bool; 4]| {
            let (found, _) = by_root(&directory, names, is_roots_only);
            assert_eq!(found, expected.map(|is_by_root| is_by_root && is_root));
        };
        assert_by_root([true; 4]);
        let b = folder.path().join("m/a/b");
        let set_mode = |mode| fs::set_permissions(&b, fs::Permissions::from_mode(mode)).unwrap();
        set_mode(0o777);
        assert_by_root([true, true, false, false]);
        set_mode(0o755);
        assert_by_root([true; 4]);
        if is_root {
            chown(&b, Some(NOBODY), None).unwrap();
            assert_by_root([true, true, false, false]);
        }
    }
}
