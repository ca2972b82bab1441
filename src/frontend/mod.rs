//! A vhost-user-blk front end: what a VMM is to the device, for the bench and the tests.
