//! The bench: drives any vhost-user-blk back end and compares what comes back.
