//! A volume's socket: where it listens, and who may connect.

use std::fmt;
use std::fs::Permissions;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{open, AtFlags, OFlag};
use nix::sys::socket::{bind, connect, socket, AddressFamily, Backlog, SockFlag, SockType, UnixAddr};
use nix::sys::stat::{fchmod, fstat, Mode, SFlag};
use nix::unistd::{fchownat, geteuid, Gid, Uid};

use crate::error::EngineError;

/// As it is bound.
const PRIVATE: u32 = 0o600;

/// Who may connect to a socket: connecting takes the right to write to its file. `None`: whom the process runs as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketRights {
    pub owner: Option<u32>,
    pub group: Option<u32>,
    /// Permissions of the file, 0o777 at most.
    pub mode: u32,
}

impl Default for SocketRights {
    fn default() -> Self {
        Self { owner: None, group: None, mode: PRIVATE }
    }
}

impl fmt::Display for SocketRights {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(owner) = self.owner {
            write!(out, "user {owner}, ")?;
        }
        if let Some(group) = self.group {
            write!(out, "group {group}, ")?;
        }
        write!(out, "mode {:04o}", self.mode)
    }
}

/// Listen on `path`: a socket that nobody listens on is replaced, a live one is somebody else's.
///
/// # Errors
/// There is something else, or the file cannot be made or given away. Nothing of ours is left there then.
pub fn listen(path: &Path, rights: SocketRights) -> Result<UnixListener, EngineError> {
    use std::os::unix::fs::FileTypeExt;
    let fail = |source| EngineError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => {
            return Err(EngineError::NotASocket { path: path.to_owned() })
        }
        Ok(_) if somebody_listens(path) => return Err(EngineError::SocketTaken { path: path.to_owned() }),
        Ok(_) => std::fs::remove_file(path).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    let listener = bound(path).map_err(|errno| fail(errno.into()))?;
    let listens = give(path, rights).and_then(|()| {
        nix::sys::socket::listen(&listener, Backlog::MAXCONN).map_err(|errno| fail(errno.into()))
    });
    if let Err(error) = listens {
        // It has failed already; what cannot be removed is replaced by the next attempt.
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(listener)
}

/// The socket's file takes the mode that the socket has when it is bound. Until somebody listens every connection is refused,
/// so there is no moment at which others could connect than those who may in the end.
fn bound(path: &Path) -> nix::Result<UnixListener> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&listener, Mode::from_bits_truncate(PRIVATE))?;
    bind(listener.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(listener.into())
}

/// The mode first: of a file that is another user's it takes a capability to change it.
fn give(path: &Path, rights: SocketRights) -> Result<(), EngineError> {
    if rights == SocketRights::default() {
        return Ok(());
    }
    let fail = |source: io::Error| EngineError::Give { path: path.to_owned(), rights, source };
    // Of the file itself, whatever somebody puts in its place meanwhile.
    let file = open(path, OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|errno| fail(errno.into()))?;
    let found = fstat(&file).map_err(|errno| fail(errno.into()))?;
    let is_socket = SFlag::from_bits_truncate(found.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK;
    if !is_socket || found.st_uid != geteuid().as_raw() {
        return Err(EngineError::SocketTaken { path: path.to_owned() });
    }
    // Neither bind, with its umask, nor any call on an O_PATH descriptor before Linux 6.6 sets a mode as it is.
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    std::fs::set_permissions(itself, Permissions::from_mode(rights.mode)).map_err(fail)?;
    if rights.owner.is_none() && rights.group.is_none() {
        return Ok(());
    }
    let (owner, group) = (rights.owner.map(Uid::from_raw), rights.group.map(Gid::from_raw));
    fchownat(&file, "", owner, group, AtFlags::AT_EMPTY_PATH).map_err(|errno| fail(errno.into()))
}

/// Without waiting: whoever listens there may not be accepting. Only ECONNREFUSED tells that nobody does: EAGAIN is a full
/// backlog, and EPROTOTYPE somebody's datagram socket.
fn somebody_listens(path: &Path) -> bool {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let Ok(probe) = socket(AddressFamily::Unix, SockType::Stream, flags, None) else { return true };
    let connected = UnixAddr::new(path).and_then(|address| connect(probe.as_raw_fd(), &address));
    connected != Err(Errno::ECONNREFUSED)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    const NOBODY: u32 = 65534;

    fn rights_of(path: &Path) -> (u32, u32, u32) {
        let meta = std::fs::symlink_metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.mode() & 0o7777)
    }

    #[test]
    fn a_socket_is_given_to_whom_it_should_be() {
        if !geteuid().is_root() {
            println!("skipped: giving a file away takes root");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.sock");
        let private = listen(&path, SocketRights::default()).unwrap();
        assert_eq!(rights_of(&path), (0, nix::unistd::getegid().as_raw(), 0o600));
        drop(private);
        let rights = SocketRights { owner: Some(NOBODY), group: Some(NOBODY - 1), mode: 0o660 };
        let listener = listen(&path, rights).unwrap();
        assert_eq!(rights_of(&path), (NOBODY, NOBODY - 1, 0o660));
        UnixStream::connect(&path).unwrap();
        // Whose it is does not keep the next one from taking it back.
        drop(listener);
        let _again = listen(&path, SocketRights { group: Some(NOBODY), ..rights }).unwrap();
        assert_eq!(rights_of(&path), (NOBODY, NOBODY, 0o660));
    }

    /// What another user may do to a directory of sockets must not lead to other files.
    #[test]
    fn only_a_socket_of_ours_is_given_away() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("a.sock"), folder.path().join("other"));
        std::fs::write(&other, "").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        let rights = SocketRights { owner: None, group: None, mode: 0o666 };
        let refused = give(&path, rights).unwrap_err();
        assert!(matches!(refused, EngineError::SocketTaken { .. }), "{refused}");
        assert_ne!(rights_of(&other).2, 0o666);
    }
}
