//! Remedies for a file or directory to which the operating system denies access.

use std::{
    fs,
    io::{self, ErrorKind},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

/// Returns the remedy for a failed access to `path`, as a clause. Returns `None` if the text of the error is sufficient.
pub fn remedy(path: &Path, error: &io::Error) -> Option<String> {
    let shown = path.display();
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            Some(format!("free space on the file system of {shown}"))
        }
        ErrorKind::ReadOnlyFilesystem => Some(format!(
            "the file system of {shown} is mounted read-only: mount it read-write, or configure another path"
        )),
        ErrorKind::PermissionDenied => denied(path),
        _ => None,
    }
}

/// Returns a remedy that contains the owner of the path, or of the deepest parent directory that
/// this process can examine.
fn denied(path: &Path) -> Option<String> {
    let ours = rustix::process::geteuid().as_raw();
    let (at, owner) = path
        .ancestors()
        .find_map(|at| Some((at, fs::symlink_metadata(at).ok()?.uid())))?;
    let shown = at.display();
    Some(if owner == ours {
        format!("change the mode of {shown}, which belongs to this user")
    } else {
        format!(
            "{shown} belongs to user {owner}, and this process runs as user {ours}; run the command as user {owner}"
        )
    })
}

/// The error with its remedy, as one string.
pub fn with_remedy(path: &Path, error: &io::Error) -> String {
    match remedy(path, error) {
        Some(remedy) => format!("{error}; {remedy}"),
        None => error.to_string(),
    }
}

/// The error with its remedy, as an error of the same kind. Use this function for an error that is the last source in a
/// chain of errors.
pub fn explained(path: &Path, error: io::Error) -> io::Error {
    match remedy(path, &error) {
        Some(remedy) => io::Error::new(error.kind(), format!("{error}; {remedy}")),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_refusal_has_its_remedy() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("directory/file");
        for (kind, words) in [
            (ErrorKind::StorageFull, "free space"),
            (ErrorKind::QuotaExceeded, "free space"),
            (ErrorKind::ReadOnlyFilesystem, "mounted read-only"),
            (ErrorKind::PermissionDenied, folder.path().to_str().unwrap()),
        ] {
            let remedy = remedy(&missing, &io::Error::from(kind)).unwrap();
            assert!(remedy.contains(words), "{kind:?}: {remedy}");
        }
        assert_eq!(remedy(&missing, &ErrorKind::NotFound.into()), None);
    }

    #[test]
    fn a_denied_access_names_the_user_to_be() {
        let ours = rustix::process::geteuid().as_raw();
        let remedy = remedy(
            Path::new("/proc/1/root"),
            &ErrorKind::PermissionDenied.into(),
        )
        .unwrap();
        let expected = if ours == 0 {
            "belongs to this user"
        } else {
            "run the command as user 0"
        };
        assert!(remedy.contains(expected), "{remedy}");
    }
}
