//! Starting the daemon's threads. Each has a name, as much of the processor as its work is urgent, no capability, and,
//! where it works with a guest's bytes, few system calls. Where guests, VMMs and the shrinker want more processor than
//! there is, a guest that waits for its page comes first.

mod confine;

pub use confine::{drop_capabilities, forbid_rings, forbid_what_nobody_needs};

use std::io;
use std::thread::{Builder, JoinHandle};

/// What a thread is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves rings. A guest's processor stands still meanwhile, and what it reads a guest wrote.
    Worker,
    /// Reads and writes the writeback file. A guest may wait for that, too.
    FileIo,
    /// Makes room.
    Shrinker,
    /// Looks at stored pages. It holds the locks of those who serve them, for moments, and so has no less than others.
    Scrubber,
    /// Takes connections, and answers clients and the kernel.
    Listener,
    /// Answers a VMM.
    Session,
    /// Answers a VMM about its guest's balloon, and carries out what the guest asks of that.
    Balloon,
    /// Asks VMMs about their guests, and believes none.
    Asking,
    /// Answers whoever may reach a TCP address, and so may do nothing else.
    Scraped,
}

impl Role {
    /// Steps of niceness, from that of the process: five steps are three times as much of the processor. Guests' loads
    /// come before the room that stores will want; ten steps for the shrinker are too many, because stores that do wait
    /// for it then wait a hundred times longer on a busy host.
    fn niceness(self) -> i32 {
        match self {
            Self::Worker | Self::FileIo => -5,
            Self::Shrinker => 5,
            Self::Scrubber
            | Self::Listener
            | Self::Session
            | Self::Balloon
            | Self::Asking
            | Self::Scraped => 0,
        }
    }
}

/// Starts a thread. Where the kernel refuses it more than its share (that takes CAP_SYS_NICE), it has its share.
///
/// # Errors
/// When there can be no more threads.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    role: Role,
    run: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    Builder::new().name(name.into()).spawn(move || {
        take_on(role);
        run()
    })
}

/// Gives the calling thread, which was started by other means, its role. For good.
pub fn take_on(role: Role) {
    set_niceness(role.niceness());
    if let Err(err) = drop_capabilities() {
        tracing::warn!(%err, "a thread keeps its capabilities");
    }
    if let Err(err) = confine::restrict_calls(role) {
        tracing::warn!(%err, ?role, "a thread's system calls are not restricted");
    }
}

/// Changes the calling thread's niceness by `steps`.
fn set_niceness(steps: i32) {
    // On Linux, "the process 0" is the calling thread.
    if steps != 0
        && let Ok(nice) = rustix::process::getpriority_process(None)
        && let Err(err) = rustix::process::setpriority_process(None, nice.saturating_add(steps))
    {
        tracing::debug!(%err, steps, "a thread keeps the niceness of its process");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};
    use std::io::{ErrorKind, Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    const ALL: [Role; 9] = [
        Role::Worker,
        Role::FileIo,
        Role::Shrinker,
        Role::Scrubber,
        Role::Listener,
        Role::Session,
        Role::Balloon,
        Role::Asking,
        Role::Scraped,
    ];

    /// What the kernel says of a thread of this role: its status, and its niceness. A worker can't read its own.
    fn observed(role: Role) -> (String, i32) {
        let (told, tell) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = spawn("observed", role, move || {
            told.send(rustix::thread::gettid().as_raw_nonzero()).unwrap();
            let _ = ended.recv();
        });
        let tid = tell.recv().unwrap();
        let read = |file| fs::read_to_string(format!("/proc/self/task/{tid}/{file}")).unwrap();
        let (status, stat) = (read("status"), read("stat"));
        drop(end);
        thread.unwrap().join().unwrap();
        // The 19th field; the second, in brackets, is the name.
        let niceness = stat.rsplit(") ").next().unwrap().split(' ').nth(16).unwrap();
        (status, niceness.parse().unwrap())
    }

    #[test]
    fn urgent_threads_get_more_and_others_keep_theirs() {
        let usual = rustix::process::getpriority_process(None).unwrap();
        assert_eq!(observed(Role::Listener).1, usual);
        assert_eq!(observed(Role::Shrinker).1, (usual + 5).min(19));
        // Without the capability nothing changes.
        assert!([usual, (usual - 5).max(-20)].contains(&observed(Role::Worker).1));
    }

    #[test]
    fn threads_that_look_at_what_guests_wrote_open_no_file_make_no_socket_and_start_no_program() {
        File::open("/proc/self/status").expect("others can");
        for role in [Role::Worker, Role::Session, Role::Balloon] {
            let thread = spawn("confined", role, move || {
                let denied = |what: &str, result: io::Result<()>| {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied, "{role:?}: {what}");
                };
                denied("open", File::open("/proc/self/status").map(drop));
                denied("create", File::create("/tmp/ballast-worker").map(drop));
                denied("unlink", fs::remove_file("/tmp/ballast-worker"));
                denied("tcp", TcpListener::bind("127.0.0.1:0").map(drop));
                denied("udp", UdpSocket::bind("127.0.0.1:0").map(drop));
                denied("unix", UnixListener::bind("/tmp/ballast-worker").map(drop));
                denied("run", Command::new("/bin/true").status().map(drop));
                denied("thread", Builder::new().spawn(|| ()).map(drop));
            });
            thread.unwrap().join().unwrap();
        }
    }

    #[test]
    fn no_thread_makes_a_ring_whose_calls_nobody_filters() {
        for role in ALL {
            let ring = spawn("ring", role, || io_uring::IoUring::new(2).map(drop)).unwrap().join().unwrap();
            assert_eq!(ring.unwrap_err().kind(), ErrorKind::PermissionDenied, "{role:?}");
        }
    }

    #[test]
    fn the_thread_that_networks_reach_answers_on_the_socket_that_it_has_and_opens_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = spawn("metrics", Role::Scraped, move || {
            let denied = |what: &str, result: io::Result<()>| {
                assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied, "{what}");
            };
            denied("open", File::open("/proc/self/status").map(drop));
            denied("tcp", TcpListener::bind("127.0.0.1:0").map(drop));
            denied("connect", TcpStream::connect(address).map(drop));
            denied("run", Command::new("/bin/true").status().map(drop));
            denied("thread", Builder::new().spawn(|| ()).map(drop));
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 3];
            stream.read_exact(&mut asked).unwrap();
            stream.write_all(&asked).unwrap();
        });
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"abc").unwrap();
        let mut answered = Vec::new();
        stream.read_to_end(&mut answered).unwrap();
        assert_eq!(answered, b"abc");
        thread.unwrap().join().unwrap();
    }

    #[test]
    fn no_thread_has_a_capability_or_gets_one() {
        for role in ALL {
            let (status, _) = observed(role);
            let line = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim();
            for set in ["CapEff:", "CapPrm:", "CapInh:", "CapAmb:"] {
                assert_eq!(u64::from_str_radix(line(set), 16), Ok(0), "{role:?}, {set}");
            }
            if [Role::Worker, Role::Scraped, Role::Session, Role::Balloon].contains(&role) {
                assert_eq!((line("Seccomp:"), line("NoNewPrivs:")), ("2", "1"));
            }
        }
    }
}
