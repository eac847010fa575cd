//! Whether the file system of an entry prevents other users from changing the entry.

use std::{
    env,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{FsWord, Stat, StatVfsMountFlags, fstatfs, fstatvfs, major, minor};

/// The file system type of every FUSE mount.
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;
/// This directory exists only where systemd runs; see `sd_booted(3)`.
const SYSTEMD: &str = "/run/systemd/system";
/// systemd sets this variable for each service, even for a service that does not see `/run` of the host; see `systemd.exec(5)`.
const SERVICE_VARIABLE: &str = "INVOCATION_ID";
pub(super) const MOUNTS: &str = "/proc/self/mountinfo";

/// Whether an entry is in a file system that is mounted read-only into a container and is not the file system of the
/// root directory. A FUSE file system is always changeable, because the process that serves it can change the content.
/// If the mount cannot be examined, the entry is assumed to be changeable.
pub(super) fn is_unchangeable(fd: impl AsFd + Copy, stat: &Stat) -> bool {
    fstatvfs(fd).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY))
        && !is_fuse(fd)
        && is_apart_from_root(stat.st_dev)
        && read_only_mounts_count()
}

/// Set by [`ignore_read_only_mounts`].
static IGNORES_READ_ONLY_MOUNTS: AtomicBool = AtomicBool::new(false);

/// Whether files in a read-only mount are exempt from the checks of owner and mode. If systemd runs on the machine, no
/// files are exempt, because other processes may have write access to the same file systems.
pub fn read_only_mounts_count() -> bool {
    // If the directory cannot be examined, assume that systemd runs, so that the ordinary rules apply.
    let is_beside_systemd =
        Path::new(SYSTEMD).try_exists().unwrap_or(true) || env::var_os(SERVICE_VARIABLE).is_some();
    !is_beside_systemd && !IGNORES_READ_ONLY_MOUNTS.load(Ordering::Relaxed)
}

/// From now on, this process applies the ordinary rules in read-only mounts. Call this function in a process with a
/// cleared environment if its parent process has detected systemd. The process itself may be unable to detect systemd.
pub fn ignore_read_only_mounts() {
    IGNORES_READ_ONLY_MOUNTS.store(true, Ordering::Relaxed);
}

pub(super) fn is_fuse(fd: impl AsFd) -> bool {
    fstatfs(fd).is_ok_and(|system| system.f_type == FUSE_SUPER_MAGIC)
}

/// The user or the hypervisor that controls the content of a FUSE file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FuseServer {
    /// virtiofs: the file system has the type of FUSE, but the host of this virtual machine serves it.
    Hypervisor,
    /// The user who mounted the file system.
    User(u32),
}

/// Returns the user or the hypervisor that serves the FUSE file system of an entry. Returns `None` if the mount table
/// cannot be read or does not contain the user.
pub(super) fn fuse_server(stat: &Stat) -> Option<FuseServer> {
    let mounts = std::fs::read_to_string(MOUNTS).ok()?;
    server_in(&mounts, (major(stat.st_dev), minor(stat.st_dev)))
}

/// Returns the user or the hypervisor that serves the FUSE file system with this device number, according to a mount
/// table in the format of proc(5).
pub(super) fn server_in(mounts: &str, (major, minor): (u32, u32)) -> Option<FuseServer> {
    let device = format!("{major}:{minor}");
    let mount = mounts
        .lines()
        .find(|mount| mount.split(' ').nth(2) == Some(&device))?;
    let (_, system) = mount.split_once(" - ")?;
    if system.split(' ').next() == Some("virtiofs") {
        return Some(FuseServer::Hypervisor);
    }
    let options = system.rsplit(' ').next()?;
    let mut options = options.split(',');
    let user = options.find_map(|option| option.strip_prefix("user_id=")?.parse().ok())?;
    Some(FuseServer::User(user))
}

/// Whether a device differs from the device of the root directory. If the device of the root directory is unknown, the
/// result is false.
fn is_apart_from_root(device: u64) -> bool {
    rustix::fs::stat("/").is_ok_and(|root| root.st_dev != device)
}
