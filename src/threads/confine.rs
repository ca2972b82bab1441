//! What threads may ask of the kernel: no capability, and for workers, who look at what guests wrote, only what serving
//! pages takes; for the thread that networks may reach, only what answering takes. A call that is not allowed fails with EPERM and doesn't end the daemon: an unforeseen call in some
//! library must not take every guest of the host with it.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

use super::Role;

/// What every restricted thread may call: memory and locks, event descriptors, the clock, the log, and its end.
const COMMON_CALLS: &[c_long] = &[
    // Memory: the allocator, and for workers guest memory that is unmapped after their last look at it.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    // Locks and time.
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    // Event descriptors, and descriptors that are closed after the last look at them.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_close,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    // What a hash map's seed takes.
    libc::SYS_getrandom,
    // Aborting, with a message, and ending.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_tgkill,
    libc::SYS_exit,
    libc::SYS_exit_group,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
];

/// What a worker may call beside those: the arena and the tables grow, and a page that can't be read is mended.
const WORKER_CALLS: &[c_long] = &[libc::SYS_fallocate, libc::SYS_pread64];

/// What the thread of a session, a balloon's too, may call beside the common ones: it reads and writes a VMM's messages,
/// looks at the files that come with them, and punches holes into those, or makes one for what is in flight.
const SESSION_CALLS: &[c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_pread64,
    libc::SYS_memfd_create,
    libc::SYS_ftruncate,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_statx,
    libc::SYS_newfstatat,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
];

/// What a thread may call beside the common ones that asks VMMs: it connects to Unix sockets, and waits for answers.
const ASKING_CALLS: &[c_long] = &[
    libc::SYS_socket,
    libc::SYS_connect,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_fcntl,
    libc::SYS_ioctl,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
];

/// What the thread of the TCP address may call beside those: it takes connections on the socket that it has, and
/// answers. It makes none.
const SCRAPED_CALLS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
];

/// What no thread of the daemon has a use for, and whoever takes it over would.
const NOBODYS_CALLS: &[c_long] = &[
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_open_by_handle_at,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
];

/// What makes a ring that carries out calls which no filter sees. The writeback file's is made, and restricted, before
/// any thread of its own is there; after that no thread needs another.
const RING_CALLS: &[c_long] = &[libc::SYS_io_uring_setup, libc::SYS_io_uring_register];

fn refused() -> SeccompAction {
    SeccompAction::Errno(libc::EPERM.unsigned_abs())
}

fn apply(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> io::Result<()> {
    let arch = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch).map_err(io::Error::other)?;
    let program: BpfProgram = filter.try_into().map_err(io::Error::other)?;
    // This sets no_new_privs as well.
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

fn unconditional(calls: &[c_long]) -> BTreeMap<c_long, Vec<SeccompRule>> {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// Restricts the calling thread, for good, to what its role needs, where others could tell it what to do.
///
/// # Errors
/// When the kernel has no seccomp.
pub(super) fn restrict_calls(role: Role) -> io::Result<()> {
    let more = match role {
        Role::Worker => WORKER_CALLS,
        Role::Scraped => SCRAPED_CALLS,
        Role::Session | Role::Balloon => SESSION_CALLS,
        Role::Asking => ASKING_CALLS,
        Role::FileIo | Role::Shrinker | Role::Scrubber | Role::Listener => return forbid_rings(),
    };
    apply(unconditional(&[COMMON_CALLS, more].concat()), refused(), SeccompAction::Allow)
}

/// Keeps the calling thread, and those that it starts from now on, from making rings. For good.
///
/// # Errors
/// When the kernel has no seccomp.
pub fn forbid_rings() -> io::Result<()> {
    apply(unconditional(RING_CALLS), SeccompAction::Allow, refused())
}

/// Keeps the calling thread, and those that it starts from now on, from starting programs, from networks, and from
/// what else no thread needs. For good.
///
/// # Errors
/// When the kernel has no seccomp.
pub fn forbid_what_nobody_needs() -> io::Result<()> {
    let mut rules = unconditional(NOBODYS_CALLS);
    let local = libc::AF_UNIX.unsigned_abs().into();
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, local)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(io::Error::other)?;
    rules.insert(libc::SYS_socket, vec![other]);
    apply(rules, SeccompAction::Allow, refused())
}

/// Gives up every capability of the calling thread, for good.
///
/// # Errors
/// When the kernel refuses that.
pub fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    rustix::thread::clear_ambient_capability_set()?;
    Ok(rustix::thread::set_capabilities(
        None,
        CapabilitySets { effective: none, permitted: none, inheritable: none },
    )?)
}
