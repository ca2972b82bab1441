//! The QEMU of this host: its version, its command line, and whether it can boot Linux with KVM here. Knows the
//! images only as files.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::error::Error;
use super::guest::{Guest, GuestSpec};
use super::interrupt;
use super::process::TICK;
use super::scratch::Scratch;

/// The program, in PATH.
const PROGRAM: &str = "qemu-system-x86_64";

/// How long a guest may take to reach its init with KVM, which takes about one second where it works.
const KVM_PATIENCE: Duration = Duration::from_secs(8);

/// The QEMU that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Qemu {
    version: (u32, u32),
}

/// What executes the guest's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Accelerator {
    /// KVM if a guest is seen to boot with it, else TCG
    Auto,
    /// The processor itself
    Kvm,
    /// QEMU's translator: slow, but works everywhere
    Tcg,
}

/// What a guest is booted from, as `images/make-guest` leaves it.
#[derive(Clone, Debug)]
pub struct Images {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
}

impl Images {
    /// The images in a directory.
    ///
    /// # Errors
    /// When one is missing; the message says what builds it.
    pub fn find(directory: &Path) -> Result<Self, Error> {
        let file = |name: &str| {
            let path = directory.join(name);
            if path.is_file() { Ok(path) } else { Err(Error::missing(path)) }
        };
        Ok(Self { kernel: file("vmlinuz")?, initramfs: file("initramfs")? })
    }
}

impl Qemu {
    /// Finds QEMU and asks for its version.
    ///
    /// # Errors
    /// When it isn't there, or prints no version.
    pub fn find() -> Result<Self, Error> {
        let output = Command::new(PROGRAM)
            .arg("--version")
            .output()
            .map_err(|_| Error::Missing { what: format!("{PROGRAM} (package qemu-system-x86)") })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = parse_version(&text).ok_or(Error::QemuVersion { given: text })?;
        Ok(Self { version })
    }

    /// The program to start.
    pub(super) fn program(self) -> &'static Path {
        Path::new(PROGRAM)
    }

    /// The accelerator to use: `Auto` is settled by booting a guest, because a `/dev/kvm` that opens may still
    /// not run Linux.
    ///
    /// # Errors
    /// When interrupted meanwhile.
    pub fn accelerator(self, wanted: Accelerator, images: &Images) -> Result<Accelerator, Error> {
        match wanted {
            Accelerator::Auto if self.boots_with_kvm(images)? => Ok(Accelerator::Kvm),
            Accelerator::Auto => Ok(Accelerator::Tcg),
            wanted => Ok(wanted),
        }
    }

    fn boots_with_kvm(self, images: &Images) -> Result<bool, Error> {
        if std::fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(false);
        }
        let scratch = Scratch::new("ballast-kvm")?;
        let spec = GuestSpec {
            accelerator: Accelerator::Kvm,
            socket: None,
            parameters: vec![("probe", "1".to_owned())],
            ..GuestSpec::new("probe", images.clone(), scratch.path())
        };
        let mut guest = Guest::boot(self, &spec)?;
        let deadline = Instant::now() + KVM_PATIENCE;
        loop {
            interrupt::check()?;
            // Looked at in this order: a guest that has ended has said everything.
            let ended = guest.ended();
            if guest.report().booted {
                return Ok(true);
            }
            if ended || Instant::now() > deadline {
                return Ok(false);
            }
            std::thread::sleep(TICK);
        }
    }

    /// The whole command line for a guest.
    pub(super) fn arguments(self, spec: &GuestSpec) -> Vec<OsString> {
        let accelerator = if spec.accelerator == Accelerator::Kvm { "kvm" } else { "tcg" };
        let mut arguments: Vec<OsString> =
            ["-nodefaults", "-no-user-config", "-no-reboot"].map(Into::into).into();
        let mut option = |name: &str, value: OsString| arguments.extend([name.into(), value]);
        option("-name", format!("ballast-{}", spec.name).into());
        option("-accel", accelerator.into());
        option("-machine", "q35,memory-backend=memory".into());
        // The back end maps the guest's memory, so it must be shared.
        let memory = format!("memory-backend-memfd,id=memory,size={}M,share=on", spec.memory_mib);
        option("-object", memory.into());
        option("-m", format!("{}M", spec.memory_mib).into());
        option("-smp", spec.cpus.to_string().into());
        option("-display", "none".into());
        option("-serial", joined("file:", &spec.console_path(), ""));
        option("-kernel", spec.images.kernel.clone().into());
        option("-initrd", spec.images.initramfs.clone().into());
        option("-append", spec.kernel_command_line().into());
        if let Some(socket) = &spec.socket {
            option("-chardev", joined("socket,id=swap,path=", socket, self.reconnect()));
            let device = format!("vhost-user-blk-pci,chardev=swap,num-queues={}", spec.cpus);
            option("-device", device.into());
        }
        arguments.extend(spec.arguments.iter().cloned());
        arguments
    }

    /// Whether it knows seconds only to wait before it connects again.
    #[must_use]
    pub fn is_before_9_2(self) -> bool {
        self.version < (9, 2)
    }

    fn reconnect(self) -> &'static str {
        if self.is_before_9_2() { ",reconnect=1" } else { ",reconnect-ms=100" }
    }
}

/// A path as part of an option: QEMU reads two commas as one.
fn joined(before: &str, path: &Path, after: &str) -> OsString {
    format!("{before}{}{after}", path.display().to_string().replace(',', ",,")).into()
}

/// `QEMU emulator version 7.2.22 (Debian …)`: major and minor.
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let (_, after) = text.split_once("version ")?;
    let mut numbers = after.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_debian_prints_them() {
        let bookworm = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright (c) 2003-2022";
        assert_eq!(parse_version(bookworm), Some((7, 2)));
        assert_eq!(parse_version("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"), Some((10, 0)));
        assert_eq!(parse_version("QEMU"), None);
    }

    #[test]
    fn reconnecting_is_asked_for_as_the_version_knows_it() {
        for (version, option) in
            [((7, 2), "reconnect=1"), ((9, 1), "reconnect=1"), ((9, 2), "reconnect-ms=100")]
        {
            let images = Images { kernel: "/k".into(), initramfs: "/i".into() };
            let spec = GuestSpec {
                socket: Some("/run/a,b.sock".into()),
                ..GuestSpec::new("web1", images, Path::new("/d"))
            };
            let arguments = Qemu { version }.arguments(&spec);
            let wanted = format!("socket,id=swap,path=/run/a,,b.sock,{option}");
            assert!(arguments.contains(&OsString::from(&wanted)), "{arguments:?} has {wanted}");
        }
    }

    #[test]
    fn missing_images_are_named_with_what_builds_them() {
        let error = Images::find(Path::new("/nonexistent")).expect_err("no images there");
        let message = error.to_string();
        assert!(message.contains("/nonexistent/vmlinuz") && message.contains("tests/run"), "{message}");
    }
}
