//! The demo: two guests that swap into one daemon.
