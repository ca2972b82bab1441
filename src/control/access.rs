//! Who may talk to the daemon. A socket's mode lets its owner and its group in; the control socket asks in addition who
//! is at the other end, because a socket's file can be made accessible by mistake, and a connection be handed on. VMMs
//! have their group for the VMs' sockets; whoever may give orders to the daemon is in another, if in any.

use std::io;

use nix::unistd::{Gid, Group, Uid, User};

/// Who is let in at a socket beside root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// The user that runs the daemon.
    own_uid: u32,
    /// The group of the socket.
    gid: u32,
    /// Whether that group is let in, or is just the one that the daemon's files have.
    with_group: bool,
    /// Users who have the group as a further one.
    members: Vec<u32>,
}

/// Why there is no such group.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// It doesn't exist.
    #[error(
        "there is no group {name:?}: make it with `groupadd --system {name}`, or configure another {key}"
    )]
    Unknown {
        /// The key in the configuration.
        key: &'static str,
        /// The name that was configured.
        name: String,
    },
    /// The system's list of groups can't be read.
    #[error("the groups of this system can't be looked up: see to /etc/group and nsswitch.conf")]
    Lookup(#[from] io::Error),
}

impl Access {
    /// For the VMs' sockets, whose group is the configured one, or else the process's own. To be asked before the daemon
    /// gives up other files.
    ///
    /// # Errors
    /// When there is no group of that name.
    pub fn of_vms(name: Option<&str>) -> Result<Self, GroupError> {
        Self::of_group("socket_group", name)
    }

    /// For the control socket: the configured group, or else none.
    ///
    /// # Errors
    /// When there is no group of that name.
    pub fn of_control(name: Option<&str>) -> Result<Self, GroupError> {
        let access = Self::of_group("control_group", name)?;
        Ok(if name.is_some() { access } else { Self { with_group: false, members: Vec::new(), ..access } })
    }

    fn of_group(key: &'static str, name: Option<&str>) -> Result<Self, GroupError> {
        let found = match name {
            None => Group::from_gid(Gid::effective()).map_err(io::Error::from)?,
            Some(name) => {
                let found = Group::from_name(name).map_err(io::Error::from)?;
                Some(found.ok_or_else(|| GroupError::Unknown { key, name: name.to_owned() })?)
            }
        };
        let gid = found.as_ref().map_or(Gid::effective(), |group| group.gid);
        let names = found.map(|group| group.mem).unwrap_or_default();
        // A member without an account is nobody.
        let members =
            names.iter().filter_map(|name| User::from_name(name).ok()?.map(|user| user.uid.as_raw()));
        let (own_uid, gid) = (Uid::effective().as_raw(), gid.as_raw());
        Ok(Self { own_uid, gid, with_group: true, members: members.collect() })
    }

    /// Has the process be of the group, so that it may give it more sockets after it has given up its capabilities.
    ///
    /// # Errors
    /// When it may not.
    pub fn join(&self) -> io::Result<()> {
        let gid = Gid::from_raw(self.gid);
        let mut groups = nix::unistd::getgroups()?;
        if gid == Gid::effective() || groups.contains(&gid) {
            return Ok(());
        }
        groups.push(gid);
        Ok(nix::unistd::setgroups(&groups)?)
    }

    /// The group of the socket.
    #[must_use]
    pub fn gid(&self) -> u32 {
        self.gid
    }

    /// The mode of the socket: for its owner, and its group if that is let in.
    #[must_use]
    pub fn mode(&self) -> u32 {
        if self.with_group { 0o660 } else { 0o600 }
    }

    /// Whether a process of this user and group may give orders: root, the daemon's own user, and the group.
    #[must_use]
    pub fn allows(&self, uid: u32, gid: u32) -> bool {
        uid == 0 || uid == self.own_uid || self.with_group && (gid == self.gid || self.members.contains(&uid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_the_own_user_and_the_group_are_let_in_and_nobody_else() {
        let access = Access { own_uid: 900, gid: 36, with_group: true, members: vec![1000, 1001] };
        let cases = [
            (0, 0, true),
            (900, 900, true),
            (64055, 36, true),
            (1001, 1001, true),
            (1002, 1002, false),
            (36, 900, false),
            (u32::MAX, u32::MAX, false),
        ];
        for (uid, gid, allowed) in cases {
            assert_eq!(access.allows(uid, gid), allowed, "{uid}:{gid}");
        }
        let without = Access { with_group: false, members: Vec::new(), ..access };
        for (uid, gid, _) in cases {
            assert_eq!(without.allows(uid, gid), uid == 0 || uid == 900, "{uid}:{gid}");
        }
        assert_eq!(without.mode(), 0o600);
    }

    #[test]
    fn a_group_is_found_by_its_name() {
        assert_eq!(Access::of_vms(Some("root")).unwrap().gid(), 0);
        let own = Access::of_vms(None).unwrap();
        assert_eq!((own.gid(), own.own_uid), (Gid::effective().as_raw(), Uid::effective().as_raw()));
        let err = Access::of_control(Some("no-such-group")).unwrap_err().to_string();
        assert!(err.contains("groupadd --system no-such-group") && err.contains("control_group"), "{err}");
    }
}
