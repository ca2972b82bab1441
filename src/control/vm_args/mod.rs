//! What to tell a VMM so that its VM swaps to us: arguments for a shell ([`shell`]), a document for an API or a
//! configuration file ([`json`]), or libvirt's elements ([`xml`]). Pure functions, so that the files in `vmm-configs/`
//! can be held to them. Guest memory must be shared, or the VMM can't hand it to us; everything else about the VM is
//! its owner's business. What a VMM can't do stands in the notes, which every form but `--json` prints.

mod balloon;
mod json;
mod shell;
#[cfg(test)]
mod tests;
mod xml;

use std::path::Path;

use serde_json::Value;

use crate::config::VmConfig;
use crate::ids::Bytes;

/// A VMM that we know how to talk to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Vmm {
    /// QEMU: arguments.
    Qemu,
    /// libvirt, which starts a QEMU: elements of a domain.
    Libvirt,
    /// cloud-hypervisor: arguments, or a document for its API.
    CloudHypervisor,
    /// Firecracker: a document for its API or its configuration file.
    Firecracker,
    /// crosvm: arguments.
    Crosvm,
}

impl Vmm {
    /// The forms in which it takes what it is told, the usual one first.
    #[must_use]
    pub fn formats(self) -> &'static [Format] {
        match self {
            Self::Qemu | Self::Crosvm => &[Format::Cli],
            Self::Libvirt => &[Format::Xml],
            Self::CloudHypervisor => &[Format::Cli, Format::Json],
            Self::Firecracker => &[Format::Json],
        }
    }
}

/// How a VMM is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Arguments, quoted for a shell.
    Cli,
    /// A JSON document.
    Json,
    /// XML elements.
    Xml,
}

/// What isn't in our configuration and the VMM must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guest {
    /// The guest's memory: whole MiB, at least one.
    pub memory: Bytes,
    /// QEMU learnt `reconnect-ms` with 9.2; older ones wait in seconds.
    pub qemu_before_9_2: bool,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Who is told.
    pub vmm: Vmm,
    /// How; one of its [`Vmm::formats`].
    pub format: Format,
    /// Not only our part but something that starts a VM: a script, a domain, a configuration.
    pub whole: bool,
    /// The guest that it is about.
    pub guest: Guest,
}

/// The answer.
#[derive(Clone, Debug, PartialEq)]
pub struct VmArgs {
    content: Content,
    /// What whoever pastes it should know, a sentence or two a line.
    notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    /// A VMM's arguments, and how they look in a shell.
    Arguments {
        args: Vec<String>,
        shown: String,
    },
    Document(Value),
    Xml(String),
}

impl VmArgs {
    /// For people: the notes as comments, then what to paste.
    #[must_use]
    pub fn text(&self) -> String {
        let is_xml = matches!(self.content, Content::Xml(_));
        let comment = |note: &String| if is_xml { xml::comment(note) } else { format!("# {note}\n") };
        let notes: String = self.notes.iter().map(comment).collect();
        notes + &self.bare()
    }

    /// What to paste alone: what a file has behind its head.
    #[must_use]
    pub fn bare(&self) -> String {
        match &self.content {
            Content::Arguments { shown, .. } => format!("{shown}\n"),
            Content::Document(document) => format!("{document:#}\n"),
            Content::Xml(text) => text.clone(),
        }
    }

    /// For scripts: the document itself, or the arguments or the XML as the only member of an object.
    #[must_use]
    pub fn json(&self) -> Value {
        match &self.content {
            Content::Arguments { args, .. } => serde_json::json!({ "args": args }),
            Content::Document(document) => document.clone(),
            Content::Xml(text) => serde_json::json!({ "xml": text }),
        }
    }
}

/// The guest's memory when nobody says.
pub const MEMORY_DEFAULT: Bytes = Bytes(2 << 30);

const MIB: u64 = 1 << 20;
/// Places of a queue, where the VMM lets us choose: cloud-hypervisor's own default is 128, and twice that lets a whole
/// cluster's requests be under way; crosvm's is more than a queue of ours may have.
const QUEUE_SIZE: u16 = 256;

/// Reads a guest's memory size.
///
/// # Errors
/// When it isn't a size, or not one that every VMM takes.
pub fn parse_memory(text: &str) -> Result<Bytes, String> {
    let bytes: Bytes = text.parse().map_err(|error: crate::ids::ParseBytesError| error.to_string())?;
    if bytes.0 >= MIB && bytes.0.is_multiple_of(MIB) {
        Ok(bytes)
    } else {
        Err(format!("{text:?} is not a guest's memory: it must be at least 1MiB and a multiple of 1MiB"))
    }
}

/// What gives a VMM the device of `vm` at `socket`. A format that isn't its own counts as its usual one.
#[must_use]
pub fn vm_args(vm: &VmConfig, socket: &Path, wanted: Wanted) -> VmArgs {
    match (wanted.vmm, wanted.format) {
        (Vmm::Qemu, _) => shell::qemu(vm, socket, wanted),
        (Vmm::Libvirt, _) => xml::libvirt(vm, socket, wanted),
        (Vmm::CloudHypervisor, Format::Json) => json::cloud_hypervisor(vm, socket, wanted),
        (Vmm::CloudHypervisor, _) => shell::cloud_hypervisor(vm, socket, wanted),
        (Vmm::Firecracker, _) => json::firecracker(vm, socket, wanted),
        (Vmm::Crosvm, _) => shell::crosvm(vm, socket, wanted),
    }
}
