//! Start and stop order of the daemon.
