//! The only room that knows virtio and vhost-user from the back end's side.
