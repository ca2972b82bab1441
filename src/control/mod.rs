//! The control socket: API types, server, client.
