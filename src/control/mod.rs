//! The control socket: what is asked and answered ([`api`]), the daemon's side ([`server`]), the commands' side
//! ([`client`]), `ballast check`'s way to its end ([`check`]), how sockets come to be and for whom ([`socket`],
//! [`access`]), what a VMM's command line needs ([`vm_args`]) and how `status` ([`table`])
//! and the others' answers are shown ([`listing`]). Knows the codecs by
//! name, and the rest of the store and the devices only through [`api::Host`].

pub mod access;
pub mod api;
pub mod check;
pub mod client;
pub mod listing;
pub mod server;
pub mod socket;
pub mod table;
pub mod vm_args;
