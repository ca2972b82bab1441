//! Where the daemon's own cgroup says how its memory fares. Pure but for [`pressure_file`], which looks whether the
//! file is there.

use std::fs;
use std::path::{Path, PathBuf};

/// The `memory.pressure` of the daemon's own cgroup v2; `None` without one, and in the root cgroup, whose numbers are
/// the host's.
pub(super) fn pressure_file() -> Option<PathBuf> {
    let cgroup = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let directory = directory(&cgroup, &mounts)?;
    let file = directory.join("memory.pressure");
    // The root cgroup has no type. Inside a cgroup namespace the path alone would not tell.
    (directory.join("cgroup.type").exists() && file.exists()).then_some(file)
}

/// The directory of the cgroup v2 that `/proc/self/cgroup` names, under one of the mounts of `/proc/self/mountinfo`.
fn directory(cgroup: &str, mountinfo: &str) -> Option<PathBuf> {
    let path = cgroup.lines().find_map(|line| line.strip_prefix("0::"))?;
    // A cgroup outside our namespace: no mount of ours shows it.
    if Path::new(path).components().any(|part| part.as_os_str() == "..") {
        return None;
    }
    mountinfo.lines().filter_map(cgroup2_mount).find_map(|(root, mount_point)| {
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(&mount_point).join(below))
    })
}

/// The mounted directory and the mount point of one line of mountinfo, when it is about cgroup2.
fn cgroup2_mount(line: &str) -> Option<(String, String)> {
    // 41 31 0:38 / /sys/fs/cgroup rw,relatime [optional fields] - cgroup2 cgroup2 rw
    let (mount, filesystem) = line.split_once(" - ")?;
    (filesystem.split(' ').next() == Some("cgroup2")).then_some(())?;
    let mut fields = mount.split(' ').skip(3);
    Some((unescape(fields.next()?), unescape(fields.next()?)))
}

/// Mountinfo writes what would break its lines as a backslash and three octal digits.
fn unescape(field: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(field.to_owned(), |text, (code, meant)| text.replace(code, meant))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_cgroup_is_found_under_its_mount() {
        let cgroup = "4:memory:/elsewhere\n0::/system.slice/ballast.service\n";
        assert_eq!(
            directory(cgroup, HYBRID),
            Some(PathBuf::from("/sys/fs/cgroup/unified/system.slice/ballast.service"))
        );
        assert_eq!(directory("0::/\n", HYBRID), Some(PathBuf::from("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn a_mount_of_a_part_of_the_tree_is_understood() {
        let mount = "41 31 0:38 /docker/abc /mnt/a\\040b rw - cgroup2 cgroup2 rw\n";
        assert_eq!(directory("0::/docker/abc/x", mount), Some(PathBuf::from("/mnt/a b/x")));
        assert_eq!(directory("0::/docker/abcd", mount), None);
        assert_eq!(directory("0::/../other", mount), None);
    }

    #[test]
    fn garbage_names_no_cgroup() {
        for text in ["", "\n", "0:", "0::", "4:memory:/x", "- - -", " - cgroup2", "1 2 3 - cgroup2 c rw"] {
            assert_eq!(directory(text, HYBRID).filter(|_| text != "0::"), None, "{text:?}");
            assert_eq!(directory("0::/x", text), None, "{text:?}");
        }
    }

    #[test]
    fn looking_for_ones_own_cgroup_finds_a_file_or_nothing() {
        assert!(pressure_file().is_none_or(|file| file.exists()));
    }
}
