//! What the file system that an entry is in says about who can change the entry.

use std::{
    env,
    os::fd::AsFd,
    path::Path,
    sync::atomic::{AtomicBool, Ordering},
};

use rustix::fs::{FsWord, Stat, StatVfsMountFlags, fstatfs, fstatvfs, major, minor};

/// The file system type of every FUSE mount.
const FUSE_SUPER_MAGIC: FsWord = 0x6573_5546;
/// Exists where systemd runs: `sd_booted(3)`.
const SYSTEMD: &str = "/run/systemd/system";
/// systemd sets it for each service, also for one that does not see `/run` of the host; `systemd.exec(5)`.
const SERVICE_VARIABLE: &str = "INVOCATION_ID";
pub(super) const MOUNTS: &str = "/proc/self/mountinfo";

/// Whether an entry is in a file system that is mounted read-only into a container and is not that of the root directory. FUSE is served
/// by a process that can change what is read however it is mounted. Unknown counts as changeable.
pub(super) fn is_unchangeable(fd: impl AsFd + Copy, stat: &Stat) -> bool {
    fstatvfs(fd).is_ok_and(|system| system.f_flag.contains(StatVfsMountFlags::RDONLY))
        && !is_fuse(fd)
        && is_apart_from_root(stat.st_dev)
        && read_only_mounts_count()
}

/// Set by [`ignore_read_only_mounts`].
static IGNORES_READ_ONLY_MOUNTS: AtomicBool = AtomicBool::new(false);

/// Whether a read-only mount excuses owner and mode of what is in it. It does not where systemd runs: other processes may see the same
/// file systems without the read-only mounts of this one.
pub fn read_only_mounts_count() -> bool {
    // Unknown is taken as yes: then the ordinary rules apply.
    let is_beside_systemd =
        Path::new(SYSTEMD).try_exists().unwrap_or(true) || env::var_os(SERVICE_VARIABLE).is_some();
    !is_beside_systemd && !IGNORES_READ_ONLY_MOUNTS.load(Ordering::Relaxed)
}

/// Applies the ordinary rules in read-only mounts, for the rest of this process. For a process whose environment was cleared, so that it
/// cannot see what the process that started it knows.
pub fn ignore_read_only_mounts() {
    IGNORES_READ_ONLY_MOUNTS.store(true, Ordering::Relaxed);
}

pub(super) fn is_fuse(fd: impl AsFd) -> bool {
    fstatfs(fd).is_ok_and(|system| system.f_type == FUSE_SUPER_MAGIC)
}

/// Who decides what a FUSE file system shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FuseServer {
    /// virtiofs: it has the type of FUSE, and the host of this virtual machine serves it.
    Hypervisor,
    /// The user who mounted it.
    User(u32),
}

/// Who serves the FUSE file system that an entry is in. Absent if the mount table cannot be read or does not say.
pub(super) fn fuse_server(stat: &Stat) -> Option<FuseServer> {
    let mounts = std::fs::read_to_string(MOUNTS).ok()?;
    server_in(&mounts, (major(stat.st_dev), minor(stat.st_dev)))
}

/// The same for the file system with this device number, in a mount table in the form of proc(5).
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

/// Whether a device is another one than that of the root directory. Unknown counts as the same.
fn is_apart_from_root(device: u64) -> bool {
    rustix::fs::stat("/").is_ok_and(|root| root.st_dev != device)
}
