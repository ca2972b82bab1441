//! What the log says in one test, where the code under test runs in the test's own thread.

use std::cell::RefCell;
use std::io::{Result, Write};
use std::sync::Once;

thread_local! {
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        LOG.with_borrow_mut(|log| log.write(bytes))
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Every test comes here before it causes a line. A subscriber of one thread isn't enough: whoever meets a line first
/// decides for all threads whether anybody listens to it.
pub fn listen() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| tracing_subscriber::fmt().with_ansi(false).with_writer(|| Log).init());
}

/// What the log says while this is done, after [`listen`].
pub fn told(does: impl FnOnce()) -> String {
    LOG.take();
    does();
    String::from_utf8(LOG.take()).expect("text")
}
