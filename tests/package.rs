//! The Debian package, as `images/make-deb` makes it of this build: what it holds, its manual pages, that the same tree
//! gives the same bytes; and installed, used, restarted, killed, upgraded, removed and purged in a fresh Debian with its own
//! systemd (`images/judge-package`). Needs QEMU and what `images/make-debian-guest` makes; `tests/run` provides both.

#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::debian::{self, Files};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What a command prints; it must succeed, and say nothing on stderr.
fn printed(command: &mut Command) -> String {
    let done = command.output().unwrap();
    let complaints = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success() && complaints.is_empty(), "{command:?}: {}\n{complaints}", done.status);
    String::from_utf8(done.stdout).unwrap()
}

/// Packs this build.
fn pack(output: &Path) -> PathBuf {
    printed(
        Command::new(root().join("images/make-deb"))
            .args([
                "--binary".as_ref(),
                env!("CARGO_BIN_EXE_ballast").as_ref(),
                "--output".as_ref(),
                output.as_os_str(),
            ])
            .env("SOURCE_DATE_EPOCH", "1700000000"),
    );
    let mut packages = fs::read_dir(output).unwrap().map(|entry| entry.unwrap().path());
    packages.find(|path| path.extension().is_some_and(|extension| extension == "deb")).unwrap()
}

#[test]
fn a_package_holds_what_it_should_and_the_same_tree_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (pack(&dir.path().join("a")), pack(&dir.path().join("b")));
    assert!(fs::read(&first).unwrap() == fs::read(second).unwrap(), "two packages of one tree differ");
    let list = printed(Command::new("dpkg-deb").arg("--contents").arg(&first));
    for (mode, path) in [
        ("-rwxr-xr-x root/root", "./usr/bin/ballast"),
        ("-rw-r--r-- root/root", "./etc/ballast/ballast.toml"),
        ("-rw-r--r-- root/root", "./usr/lib/systemd/system/ballast.service"),
        ("-rwxr-xr-x root/root", "./usr/lib/ballast/mount-state"),
        ("-rw-r--r-- root/root", "./usr/share/man/man1/ballast-vm-add.1.gz"),
        ("-rw-r--r-- root/root", "./usr/share/man/man5/ballast.toml.5.gz"),
        ("-rw-r--r-- root/root", "./usr/share/bash-completion/completions/ballast"),
        ("-rw-r--r-- root/root", "./usr/share/doc/ballast/copyright"),
    ] {
        let line = list.lines().find(|line| line.ends_with(&format!(" {path}"))).expect(path);
        assert!(line.starts_with(mode), "{line}");
    }
    let depends = printed(Command::new("dpkg-deb").arg("--field").arg(&first).arg("Depends"));
    assert!(depends.starts_with("libc6 (>= 2."), "{depends}");
    // systemd provides the second; where it isn't, apt takes the first alternative that it has, which is small.
    assert!(depends.trim_end().ends_with(", systemd-standalone-sysusers | systemd-sysusers"), "{depends}");
}

#[test]
fn without_systemd_the_daemon_is_started_as_the_readme_says_and_finds_what_the_unit_would_make() {
    let read = |path: &str| fs::read_to_string(root().join(path)).unwrap();
    for path in ["README.md", "images/deb/postinst"] {
        let start = "/usr/lib/ballast/mount-state && runuser -u ballast -- ballast serve";
        assert!(read(path).contains(start), "{path}");
    }
    let (unit, script) =
        (read("vmm-configs/systemd/ballast.service"), read("vmm-configs/systemd/mount-state"));
    for (key, path) in [("RuntimeDirectory", "/run/ballast"), ("StateDirectory", "/var/lib/ballast")] {
        let mode = unit.lines().find_map(|line| line.strip_prefix(&format!("{key}Mode=0"))).unwrap();
        let made = format!("install -d -m {mode} -o ballast -g ballast {path}\n");
        assert!(script.contains(&made), "{made}");
    }
}

/// What is overridden on purpose stands with its reason in `images/deb/lintian-overrides`.
#[test]
fn lintian_has_nothing_to_say_about_the_package() {
    let dir = tempfile::tempdir().unwrap();
    let package = pack(dir.path());
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on", "error,warning"]).arg(&package);
    assert_eq!(printed(&mut lintian), "");
}

#[test]
fn manual_pages_have_no_mistakes_and_the_configurations_names_each_key() {
    let dir = tempfile::tempdir().unwrap();
    printed(Command::new(env!("CARGO_BIN_EXE_ballast")).arg("man").arg(dir.path()));
    let man5 = dir.path().join("ballast.toml.5");
    let example = root().join("vmm-configs/ballast.toml");
    let page = Command::new(root().join("images/deb/man5"))
        .stdin(fs::File::open(&example).unwrap())
        .output()
        .unwrap();
    fs::write(&man5, page.stdout).unwrap();
    let pages: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|page| page.unwrap().path()).collect();
    assert!(pages.len() > 15, "{pages:?}");
    for page in &pages {
        // Every warning of groff's goes to stderr.
        printed(Command::new("groff").args(["-man", "-ww", "-z", "-t"]).arg(page));
    }
    let shown = fs::read_to_string(man5).unwrap();
    let keys = fs::read_to_string(example).unwrap();
    let keys: Vec<_> =
        keys.lines().filter_map(|line| line.trim_start_matches('#').split_once(" = ")).collect();
    assert!(keys.len() > 20);
    for (key, _) in keys.iter().filter(|(key, _)| !key.contains(' ')) {
        assert!(shown.contains(&format!(".B {key} = ")), "the manual page doesn't have {key}");
    }
}

#[test]
fn completions_are_scripts_that_their_shell_takes() {
    let bash = printed(Command::new(env!("CARGO_BIN_EXE_ballast")).args(["completions", "bash"]));
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("ballast");
    fs::write(&script, bash).unwrap();
    let taken =
        printed(Command::new("bash").args(["-c", "source \"$0\" && complete -p ballast"]).arg(&script));
    assert!(taken.contains("ballast"), "{taken}");
    for shell in ["zsh", "fish"] {
        assert!(
            printed(Command::new(env!("CARGO_BIN_EXE_ballast")).args(["completions", shell])).contains("vm")
        );
    }
}

#[test]
fn debian_installs_it_runs_it_and_is_rid_of_it_again() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let package = pack(&dir.path().join("package"));
    let mut files = Files::new();
    files.put("root/ballast.deb", 0o644, &fs::read(package).unwrap());
    let judge = fs::read(root().join("images/judge-package")).unwrap();
    files.put("usr/local/bin/judge-kit", 0o755, &judge);
    let said = debian::boot(dir.path(), files, 768, None);
    assert!(said.starts_with("the package") && said.contains("refused=1"), "{said}");
}
