//! Writes output files that contain no secrets. In a directory such as `/tmp`, another user could
//! create a symbolic link with the name of the output file. If root then wrote the output file, the
//! target of the link would be overwritten.

use std::{
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

/// Maximum number of names to try for the temporary file.
const NAMES_MAX: u32 = 16;

/// Replaces a file atomically, so that a reader never sees a partial file. Fails if `path` is a
/// device, a directory, a symbolic link or a file of another user. The temporary file is always a
/// new file. No existing file is removed to make room for the temporary file.
pub(crate) fn replace(path: &Path, text: &str) -> io::Result<()> {
    check_replaceable(path)?;
    let (mut file, partial) = create_beside(path)?;
    let written = file
        .write_all(text.as_bytes())
        .and_then(|()| fs::rename(&partial, path));
    if written.is_err() {
        // Removing the temporary file is safe, because this call created it.
        fs::remove_file(&partial).ok();
    }
    written
}

fn check_replaceable(path: &Path) -> io::Result<()> {
    let refused = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(meta) if !meta.is_file() => {
            "the path exists and is not a regular file; choose another file"
        }
        Ok(meta) if !is_ours(&meta) => {
            "the file exists and belongs to another user; choose another file"
        }
        Ok(_) => return Ok(()),
    };
    Err(io::Error::other(refused))
}

fn is_ours(meta: &Metadata) -> bool {
    meta.uid() == rustix::process::geteuid().as_raw()
}

/// Creates a new file with an unused name: `.NAME.PID-NUMBER.partial`.
fn create_beside(path: &Path) -> io::Result<(File, PathBuf)> {
    let name = path
        .file_name()
        .ok_or_else(|| io::Error::other("the path does not end with a file name"))?;
    for number in 0..NAMES_MAX {
        let mut partial = OsString::from(".");
        partial.push(name);
        partial.push(format!(".{}-{number}.partial", std::process::id()));
        let partial = path.with_file_name(partial);
        match File::create_new(&partial) {
            Ok(file) => return Ok((file, partial)),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::other(
        "all names for the temporary file are in use; remove old files that end with `.partial`",
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    #[test]
    fn an_output_file_is_replaced_as_a_whole_and_leaves_no_temporary_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ready");
        for text in ["first", "second"] {
            replace(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn an_output_file_replaces_nothing_but_a_regular_file_of_the_same_user() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("victim"), "content").unwrap();
        symlink(at("victim"), at("link")).unwrap();
        symlink(at("missing"), at("dangling")).unwrap();
        fs::create_dir(at("directory")).unwrap();
        let _socket = UnixListener::bind(at("socket")).unwrap();
        let device = Path::new("/dev/null").to_owned();
        let kinds = ["link", "dangling", "directory", "socket"].map(at);
        let entries = || fs::read_dir(folder.path()).unwrap().count();
        let before = entries();
        for path in kinds.into_iter().chain([device]) {
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            let refused = replace(&path, "{}").unwrap_err().to_string();
            assert!(refused.contains("not a regular file"), "{refused}");
            assert_eq!(fs::symlink_metadata(&path).unwrap().file_type(), kind);
        }
        assert_eq!(entries(), before);
        assert_eq!(fs::read_to_string(at("victim")).unwrap(), "content");
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(at("victim"), Some(65_533), None).unwrap();
            let refused = replace(&at("victim"), "{}").unwrap_err().to_string();
            assert!(refused.contains("another user"), "{refused}");
            assert_eq!(fs::read_to_string(at("victim")).unwrap(), "content");
        }
    }

    #[test]
    fn an_output_file_deletes_no_file_that_looks_like_a_temporary_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("result.json");
        let first = format!(".result.json.{}-0.partial", std::process::id());
        let foreign = ["result.partial", "result.json.partial", &first];
        for name in foreign {
            fs::write(folder.path().join(name), "content").unwrap();
        }
        replace(&path, "{}").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{}");
        for name in foreign {
            let kept = fs::read_to_string(folder.path().join(name)).unwrap();
            assert_eq!(kept, "content", "{name}");
        }
    }
}
