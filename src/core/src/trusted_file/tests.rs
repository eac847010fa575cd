//! Tests with files and directories of other users. A test that changes an owner needs root.

use std::{
    fs::{self, DirBuilder, Permissions},
    os::unix::{
        fs::{PermissionsExt as _, chown, lchown, symlink},
        net::UnixListener,
    },
};

use tempfile::TempDir;

use rustix::fs::{CWD, Mode};

use super::{
    mount::{FuseServer, server_in},
    *,
};

#[path = "../../../../tests/support/src/skip.rs"]
#[allow(
    unreachable_pub,
    reason = "other packages use it as a part of a library"
)]
mod skip;

use skip::{is_root, skip_outside_ci};

const TRUST: Purpose = Purpose::trust("other users could do harm");
const SECRET: Purpose = Purpose::secret("PIN");
const LIMIT: u64 = 1_000;
const OTHER_USER: u32 = 65_534;

/// A folder below the sticky `/tmp`. In production no file is below a sticky directory.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn file(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, "content").unwrap();
        set_mode(&path, mode);
        path
    }

    fn directory(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.at(name);
        DirBuilder::new().create(&path).unwrap();
        set_mode(&path, mode);
        path
    }
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
}

fn accepted(path: &Path, purpose: Purpose) {
    let bytes = read(path, LIMIT, purpose).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(*bytes, b"content");
}

/// The text of the refusal, which contains the invalid component.
#[track_caller]
fn refused(path: &Path, purpose: Purpose, component: &Path, words: &str) -> String {
    let error = read(path, LIMIT, purpose).expect_err("it was accepted");
    assert_eq!(*error.component, *component, "{error}");
    let text = error.to_string();
    assert!(text.contains(words), "{words:?}: {text}");
    assert!(text.contains(component.to_str().unwrap()), "{text}");
    text
}

#[test]
fn a_file_that_others_can_write_decides_nothing() {
    let folder = Folder::new();
    let path = folder.file("file", 0o600);
    for mode in [0o400, 0o444, 0o600, 0o644, 0o755] {
        set_mode(&path, mode);
        accepted(&path, TRUST);
    }
    for mode in [0o620, 0o602, 0o664, 0o646, 0o666] {
        set_mode(&path, mode);
        let text = refused(&path, TRUST, &path, "chmod go-w");
        assert!(text.contains("other users could do harm"), "{text}");
    }
}

#[test]
fn a_secret_that_others_can_read_is_refused() {
    let folder = Folder::new();
    let path = folder.file("file", 0o600);
    for mode in [0o400, 0o600, 0o700] {
        set_mode(&path, mode);
        accepted(&path, SECRET);
    }
    for mode in [0o604, 0o644, 0o620, 0o602, 0o610] {
        set_mode(&path, mode);
        let text = refused(&path, SECRET, &path, "chmod 600");
        assert!(text.contains("change the PIN"), "{text}");
    }
}

#[test]
fn only_root_may_let_a_group_read_a_secret() {
    if !is_root("a secret of root with a group") {
        return;
    }
    let folder = Folder::new();
    let path = folder.file("file", 0o640);
    chown(&path, Some(0), Some(OTHER_USER)).unwrap();
    for mode in [0o440, 0o640] {
        set_mode(&path, mode);
        accepted(&path, SECRET);
        assert_eq!(reading_group(&path), Some(OTHER_USER));
    }
    set_mode(&path, 0o660);
    refused(&path, SECRET, &path, "chmod 600");
    chown(&path, Some(OTHER_USER), None).unwrap();
    for (mode, words) in [
        (0o440, "other users can read it"),
        (0o400, "belongs to user 65534"),
    ] {
        set_mode(&path, mode);
        refused(&path, SECRET, &path, words);
    }
    assert_eq!(reading_group(&path), None);
}

#[test]
fn what_belongs_to_another_user_is_refused_wherever_it_stands_on_the_way() {
    if !is_root("files of another user") {
        return;
    }
    let folder = Folder::new();
    let outer = folder.directory("outer", 0o755);
    let inner = folder.directory("outer/inner", 0o755);
    let file = folder.file("outer/inner/file", 0o600);
    for component in [&file, &inner, &outer] {
        chown(component, Some(OTHER_USER), None).unwrap();
        for purpose in [TRUST, SECRET] {
            let text = refused(&file, purpose, component, "belongs to user 65534");
            assert!(text.contains("chown root"), "{text}");
        }
        chown(component, Some(0), None).unwrap();
        accepted(&file, TRUST);
    }
}

#[test]
fn a_directory_that_others_can_write_is_refused_wherever_it_stands_on_the_way() {
    let folder = Folder::new();
    let outer = folder.directory("outer", 0o755);
    let inner = folder.directory("outer/inner", 0o755);
    let file = folder.file("outer/inner/file", 0o600);
    for directory in [&inner, &outer] {
        for mode in [0o775, 0o757, 0o777, 0o2775] {
            set_mode(directory, mode);
            for purpose in [TRUST, SECRET] {
                refused(&file, purpose, directory, "chmod go-w");
            }
            check_directory(&inner, TRUST).unwrap_err();
        }
        set_mode(directory, 0o711);
        accepted(&file, SECRET);
        check_directory(&inner, TRUST).unwrap();
    }
}

#[test]
fn a_link_is_followed_only_through_directories_that_others_cannot_write() {
    let folder = Folder::new();
    let open = folder.directory("open", 0o777);
    let closed = folder.directory("closed", 0o755);
    let target = folder.file("closed/file", 0o600);
    // A link in a directory that others can write to, a link to this link, and a link whose target leads through the
    // directory.
    symlink(&target, open.join("link")).unwrap();
    symlink("../open/link", closed.join("first")).unwrap();
    symlink("../open/../closed/file", closed.join("second")).unwrap();
    symlink("file", closed.join("good")).unwrap();
    symlink(closed.join("good"), folder.at("absolute")).unwrap();
    for name in ["open/link", "closed/first", "closed/second"] {
        refused(&folder.at(name), TRUST, &open, "chmod go-w");
    }
    for name in ["closed/good", "absolute", "closed/../closed/./good"] {
        accepted(&folder.at(name), TRUST);
    }
    symlink("loop", folder.at("loop")).unwrap();
    let error = read(&folder.at("loop"), LIMIT, TRUST).unwrap_err();
    assert!(error.to_string().contains("loop"), "{error}");
}

/// In `/tmp` and in Secrets as Kubernetes mounts them, every user may add entries, but cannot change the entries of
/// others.
#[test]
fn in_a_sticky_directory_only_entries_of_root_and_of_this_user_count() {
    let folder = Folder::new();
    let sticky = folder.directory("sticky", 0o1777);
    folder.directory("sticky/..2026_11_21", 0o755);
    folder.file("sticky/..2026_11_21/tls.crt", 0o644);
    symlink("..2026_11_21", sticky.join("..data")).unwrap();
    symlink("..data/tls.crt", sticky.join("tls.crt")).unwrap();
    let path = sticky.join("tls.crt");
    accepted(&path, TRUST);
    set_mode(&sticky, 0o3777);
    accepted(&path, TRUST);
    fs::hard_link(
        folder.at("sticky/..2026_11_21/tls.crt"),
        sticky.join("linked"),
    )
    .unwrap();
    refused(
        &sticky.join("linked"),
        TRUST,
        &sticky.join("linked"),
        "hard link",
    );
    accepted(&path, TRUST);
    // Every user can add entries to a sticky directory, so it is refused as a directory of configuration.
    let error = check_directory(&sticky, TRUST).unwrap_err();
    assert_eq!(*error.component, sticky);
    if !is_root("entries of another user in a sticky directory") {
        return;
    }
    let link = sticky.join("..data");
    lchown(&link, Some(OTHER_USER), None).unwrap();
    refused(&path, TRUST, &link, "the symbolic link");
    lchown(&link, Some(0), None).unwrap();
    accepted(&path, TRUST);
    chown(&sticky, Some(OTHER_USER), None).unwrap();
    refused(&path, TRUST, &sticky, "belongs to user 65534");
}

#[test]
fn only_a_regular_file_is_read_and_nothing_waits() {
    let folder = Folder::new();
    let fifo = folder.at("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let socket = folder.at("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    let directory = folder.directory("directory", 0o700);
    for (path, words) in [
        (&fifo, "is a FIFO (named pipe)"),
        (&socket, "is a socket"),
        (&directory, "is a directory"),
        (&PathBuf::from("/dev/null"), "is a character device"),
    ] {
        for purpose in [TRUST, SECRET] {
            refused(path, purpose, path, words);
        }
        // Only a FIFO would block another library.
        assert_eq!(check_if_present(path, TRUST).is_err(), path == &fifo);
    }
    let file = folder.file("file", 0o600);
    refused(
        &file.join("below"),
        TRUST,
        &file,
        ", but must be a directory",
    );
    let error = check_directory(&file, TRUST).unwrap_err();
    assert!(
        error.to_string().contains(", but must be a directory"),
        "{error}"
    );
    // A link to an open descriptor has no path as its target.
    let open = File::open(&file).unwrap();
    let number = std::os::fd::AsRawFd::as_raw_fd(&open);
    let error = read(Path::new(&format!("/proc/self/fd/{number}")), LIMIT, TRUST).unwrap_err();
    assert!(
        error.to_string().contains("open file descriptor"),
        "{error}"
    );
}

#[test]
fn a_missing_file_is_told_from_an_unusable_one() {
    let folder = Folder::new();
    for name in ["missing", "missing/below"] {
        let error = read(&folder.at(name), LIMIT, TRUST).unwrap_err();
        assert!(error.is_missing(), "{error}");
        assert!(error.to_string().contains("No such file"), "{error}");
        check_if_present(&folder.at(name), TRUST).unwrap();
    }
    let file = folder.file("file", 0o646);
    assert!(!read(&file, LIMIT, TRUST).unwrap_err().is_missing());
    check_if_present(&file, TRUST).unwrap_err();
}

#[test]
fn a_file_is_read_whole_or_not_at_all() {
    let folder = Folder::new();
    let path = folder.file("file", 0o600);
    for length in [0, 1, 999, 1_000, 70_000] {
        fs::write(&path, vec![b'x'; length]).unwrap();
        let limit = u64::try_from(length).unwrap();
        assert_eq!(read(&path, limit, TRUST).unwrap().len(), length);
        if length > 0 {
            let error = read(&path, limit - 1, TRUST).unwrap_err();
            assert!(error.to_string().contains("longer than"), "{error}");
        }
    }
}

#[test]
fn a_credential_of_systemd_needs_its_directory() {
    let path = Path::new("$CREDENTIALS_DIRECTORY/pin");
    assert!(is_absolute(path) && is_absolute(Path::new("/pin")));
    assert!(
        !is_absolute(Path::new("pin")) && !is_absolute(Path::new("$CREDENTIALS_DIRECTORYx/pin"))
    );
    let error = read(path, LIMIT, SECRET).unwrap_err();
    assert!(error.to_string().contains("LoadCredential="), "{error}");
}

#[test]
fn a_directory_that_everybody_can_write_to_is_found_above_a_path() {
    let folder = Folder::new();
    let (open, inner) = (folder.at("open"), folder.at("open/inner"));
    let file = inner.join("file");
    fs::create_dir_all(&inner).unwrap();
    fs::write(&file, b"").unwrap();
    for (mode, is_refused) in [
        (0o755, false),
        // The administrator chooses the group of the directory, so the group may write.
        (0o775, false),
        (0o1777, false),
        (0o777, true),
        (0o757, true),
    ] {
        set_mode(&open, mode);
        for path in [&file, &inner, &inner.join("missing")] {
            let checked = check_above(path, TRUST);
            assert_eq!(checked.is_err(), is_refused, "{mode:o} {checked:?}");
            if let Err(error) = checked {
                assert_eq!(*error.component, open, "{error}");
            }
        }
    }
}

/// Root runs commands on files of the service's user, whose directory may be in a sticky directory.
#[test]
fn the_owner_of_a_file_is_trusted_with_the_directories_above_it() {
    let folder = Folder::new();
    let (directory, file) = (folder.directory("of", 0o755), folder.at("of/file"));
    fs::write(&file, b"").unwrap();
    if !is_root("a directory of another user") {
        return;
    }
    chown(&directory, Some(OTHER_USER), None).unwrap();
    chown(&file, Some(OTHER_USER), None).unwrap();
    check_above(&file, TRUST).unwrap();
    chown(&file, Some(0), None).unwrap();
    let refused = check_above(&file, TRUST).unwrap_err();
    assert_eq!(*refused.component, directory, "{refused}");
}

const SERVER: User = User {
    id: OTHER_USER,
    group: Some(OTHER_USER),
};

/// A socket is accepted when it belongs to root, this user or a user of the server, and no other user can replace it.
#[test]
fn a_socket_of_another_user_is_refused_unless_the_user_is_named() {
    let folder = Folder::new();
    let directory = folder.directory("run", 0o755);
    let path = directory.join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    assert!(check_socket(&path, &[], TRUST).is_ok());
    let error = check_socket(&folder.file("file", 0o600), &[], TRUST).unwrap_err();
    assert!(error.to_string().contains("must be a socket"), "{error}");
    let missing = check_socket(&directory.join("missing"), &[], TRUST).unwrap_err();
    assert!(missing.is_missing(), "{missing}");
    // The mode of a socket determines who may connect, and not who may listen.
    set_mode(&path, 0o777);
    assert!(check_socket(&path, &[], TRUST).is_ok());
    set_mode(&directory, 0o777);
    let error = check_socket(&path, &[SERVER], TRUST).unwrap_err();
    assert_eq!(*error.component, directory, "{error}");
    set_mode(&directory, 0o755);
    if !is_root("a socket of another user") {
        return;
    }
    let named = Purpose::trust_with_remedy("other users could do harm", "name it");
    for at_fault in [&path, &directory] {
        chown(at_fault, Some(OTHER_USER), None).unwrap();
        let error = check_socket(&path, &[], named).unwrap_err();
        assert_eq!(*error.component, *at_fault, "{error}");
        let text = error.to_string();
        assert!(text.contains("65534") && text.contains("name it"), "{text}");
        assert!(check_socket(&path, &[SERVER], named).is_ok());
    }
    // The package of a database server creates the directory in this way. The server's own group may write; another
    // group may not.
    chown(&directory, Some(OTHER_USER), Some(OTHER_USER)).unwrap();
    set_mode(&directory, 0o2775);
    assert!(check_socket(&path, &[SERVER], named).is_ok());
    chown(&directory, Some(OTHER_USER), Some(1)).unwrap();
    set_mode(&directory, 0o2775);
    let error = check_socket(&path, &[SERVER], named).unwrap_err();
    assert_eq!(*error.component, directory, "{error}");
}

/// In a sticky directory, any user can create a socket after the server has removed its own. Callers must check the
/// socket again before each use.
#[test]
fn a_socket_below_a_sticky_directory_is_marked() {
    let Some(root) = ["/var/lib", "/root"].into_iter().find(|directory| {
        check_directory(Path::new(directory), TRUST).is_ok()
            && rustix::fs::access(*directory, rustix::fs::Access::WRITE_OK).is_ok()
    }) else {
        skip_outside_ci("no directory that is not below a sticky one");
        return;
    };
    let folder = tempfile::tempdir_in(root).unwrap();
    let place = |mode: u32| {
        set_mode(folder.path(), mode);
        let path = folder.path().join(format!("{mode:o}"));
        let _listener = UnixListener::bind(&path).unwrap();
        check_socket(&path, &[], TRUST).unwrap()
    };
    assert!(!place(0o755).is_shared);
    assert!(place(0o1777).is_shared);
}

#[test]
fn a_user_is_found_by_name_and_by_number() {
    const USERS: &str = "root:x:0:0:root:/root:/bin/sh\npostgres:x:101:104::/var/lib/postgresql:/bin/sh\nbroken:x:\n";
    let user = |id, group| {
        Some(User {
            id,
            group: Some(group),
        })
    };
    let without_group = |id| Some(User { id, group: None });
    for (name, expected) in [
        ("postgres", user(101, 104)),
        ("101", user(101, 104)),
        ("999", without_group(999)),
        ("broken", None),
        ("mysql", None),
        ("", None),
        ("-1", None),
    ] {
        assert_eq!(User::find_in(USERS, name), expected, "{name}");
    }
    assert_eq!(User::find("root").unwrap(), user(0, 0));
}

/// The server of a FUSE mount chooses the owner and mode that its files show.
#[test]
fn the_user_who_mounted_fuse_is_read_from_the_mount_table() {
    const MOUNTS: &str = "22 1 0:20 / / rw - overlay overlay rw,lowerdir=/a\n\
        90 22 0:51 / /mnt/a\\040b ro,nosuid,nodev,relatime shared:1 - fuse.sshfs host: rw,user_id=1000,group_id=1000,allow_other\n\
        91 22 0:52 / /mnt/host rw - virtiofs host rw\n";
    for (minor, expected) in [
        (51, Some(FuseServer::User(1000))),
        (52, Some(FuseServer::Hypervisor)),
        // The user is unknown.
        (20, None),
        (5, None),
    ] {
        assert_eq!(server_in(MOUNTS, (0, minor)), expected, "{minor}");
    }
}
