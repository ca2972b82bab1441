//! What the daemon gives up once it knows its configuration: files other than its own, programs, networks, and at last
//! its capabilities. Every part is done as far as the kernel has it; what can't be done is logged, because a host
//! without Landlock is no reason to leave its guests without their pages. The threads' share is in [`crate::threads`].

use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus,
};

use crate::config::Config;
use crate::reclaim::pressure;
use crate::threads;

/// The newest version of Landlock that the rules below were written for.
const LANDLOCK: ABI = ABI::V5;

/// Directories that hold too much of others for the sake of one file.
const SHARED_DIRS: [&str; 7] = ["", "/", "/etc", "/root", "/home", "/tmp", "/var/tmp"];

/// Where the daemon has files.
#[derive(Debug)]
pub struct Files {
    /// Directories, files and devices that it reads and writes, with all below them.
    own: Vec<PathBuf>,
    /// Files of the kernel that it reads and writes.
    kernel: Vec<PathBuf>,
    /// What it only reads.
    read: Vec<PathBuf>,
}

impl Files {
    /// Those of a daemon with this configuration.
    #[must_use]
    pub fn of(config: &Config) -> Self {
        let mut own = vec![config.state_dir.clone(), config.runtime_dir.clone()];
        own.extend(config.vms_file.parent().map(Path::to_owned));
        // A file that does not exist yet is made in its directory.
        own.extend(config.writeback.as_ref().and_then(|writeback| {
            let path = &writeback.path;
            if path.exists() { Some(path.clone()) } else { path.parent().map(Path::to_owned) }
        }));
        let pressure = pressure::Files::of_this_host();
        let kernel = [pressure.host_psi].into_iter().chain(pressure.cgroup_psi).collect();
        // A panic's message needs the program itself, and what it was loaded with.
        let read = ["/proc", "/sys/fs/cgroup"].into_iter().map(PathBuf::from);
        let read = read.chain(std::env::current_exe()).chain(configuration(config));
        Self { own, kernel, read: read.collect() }
    }
}

/// What has to be readable for the configuration to be read again: the file, and its directory because an editor makes
/// another file of that name. Only where the directory is no place for everybody's files.
fn configuration(config: &Config) -> Vec<PathBuf> {
    let Some(path) = &config.path else { return Vec::new() };
    let mut paths = vec![path.clone()];
    for path in [Some(path.clone()), path.canonicalize().ok()].into_iter().flatten() {
        let dir = path.parent().filter(|dir| !SHARED_DIRS.iter().any(|shared| *dir == Path::new(shared)));
        paths.extend(dir.map(Path::to_owned));
    }
    paths
}

/// Restricts the calling thread, and all that it starts from now on, to `files`, and to calls that some thread needs.
pub fn enter(files: &Files) {
    match restrict(files) {
        Ok(RulesetStatus::FullyEnforced) => tracing::debug!("Landlock is on"),
        Ok(RulesetStatus::PartiallyEnforced) => tracing::info!("this kernel has only a part of Landlock"),
        Ok(RulesetStatus::NotEnforced) => {
            tracing::warn!("this kernel has no Landlock: the daemon may open any file that its user may");
        }
        Err(err) => tracing::warn!(%err, "Landlock is off: the daemon may open any file that its user may"),
    }
    if let Err(err) = threads::forbid_what_nobody_needs() {
        tracing::warn!(%err, "system calls are not restricted");
    }
}

/// Gives up the capabilities of the calling thread, the last one that has any, and rings, once the writeback file has its
/// own.
pub fn drop_capabilities() {
    if let Err(err) = threads::forbid_rings() {
        tracing::warn!(%err, "io_uring is not restricted");
    }
    if let Err(err) = threads::drop_capabilities() {
        tracing::warn!(%err, "the daemon keeps its capabilities");
    }
}

fn restrict(files: &Files) -> Result<RulesetStatus, RulesetError> {
    let mut rules = Ruleset::default().handle_access(AccessFs::from_all(LANDLOCK))?.create()?;
    let read = AccessFs::from_read(LANDLOCK) & !AccessFs::Execute;
    let own = AccessFs::from_all(LANDLOCK) & !AccessFs::Execute;
    let kernel = read | AccessFs::WriteFile;
    for (paths, access) in [(&files.own, own), (&files.kernel, kernel), (&files.read, read)] {
        // What does not exist needs no rule.
        for (path, opened) in paths.iter().filter_map(|path| Some((path, PathFd::new(path).ok()?))) {
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(LANDLOCK) };
            rules = rules.add_rule(PathBeneath::new(opened, access))?;
        }
    }
    Ok(rules.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::ErrorKind;
    use std::process::Command;

    #[test]
    fn only_the_daemons_own_files_can_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["state", "run", "other"] {
            fs::create_dir(at(name)).unwrap();
        }
        fs::write(at("other/file"), b"secret").unwrap();
        let config = format!(
            "state_dir = {:?}\nruntime_dir = {:?}\n[pool]\n[writeback]\npath = {:?}\nsize = \"64MiB\"",
            at("state"),
            at("run"),
            at("writeback")
        );
        let files = || Files::of(&Config::parse(&config, 1 << 30).unwrap());
        // What the file's directory holds is the daemon's only if the file is still to be made.
        assert_eq!(files().own.last(), Some(&dir.path().to_owned()));
        File::create(at("writeback")).unwrap();
        let _vmm = std::os::unix::net::UnixListener::bind(at("other/vmm.sock")).unwrap();
        let files = files();
        let inside = || {
            enter(&files);
            let denied = |what: &str, result: std::io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied, "{what}");
            };
            fs::write(at("state/table"), b"page").unwrap();
            fs::rename(at("state/table"), at("state/table2")).unwrap();
            File::options().write(true).open(at("writeback")).unwrap();
            File::options().read(true).write(true).open("/proc/pressure/memory").unwrap();
            fs::read("/proc/meminfo").unwrap();
            std::os::unix::net::UnixListener::bind(at("run/control.sock")).unwrap();
            // A VMM's socket is no file that is opened: whether it may be connected to its own mode says.
            std::os::unix::net::UnixStream::connect(at("other/vmm.sock")).unwrap();
            denied("read", fs::read(at("other/file")).map(drop));
            denied("write", fs::write(at("other/new"), b"x"));
            denied("password", fs::read("/etc/passwd").map(drop));
            denied("run", Command::new("/bin/true").status().map(drop));
            denied("network", std::net::TcpListener::bind("127.0.0.1:0").map(drop));
        };
        std::thread::scope(|scope| scope.spawn(inside).join()).unwrap();
        assert!(fs::read("/etc/passwd").is_ok(), "only the thread that entered it is in it");
    }
}
