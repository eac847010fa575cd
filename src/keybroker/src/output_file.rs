//! Output files that hold no secret. In a directory such as `/tmp`, another user could have created a symbolic link under the same
//! name, through which a process of root would overwrite any file.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::Path,
};

/// Replaces a file atomically. The temporary file is always created, never opened, and a symbolic link at `path` is replaced and not
/// followed.
pub(crate) fn replace(path: &Path, text: &str) -> io::Result<()> {
    let partial = path.with_extension("partial");
    match fs::remove_file(&partial) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = File::create_new(&partial)?;
    file.write_all(text.as_bytes())?;
    fs::rename(&partial, path)
}

/// The same, but fails if `path` exists and is not a regular file: `/dev/stdout` must not be replaced.
pub(crate) fn replace_regular(path: &Path, text: &str) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.is_file() => Err(io::Error::other(
            "it is not a regular file; name a file, and use `--output json` for standard output",
        )),
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => replace(path, text),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_ready_file_is_not_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (ready, victim) = (folder.path().join("ready"), folder.path().join("victim"));
        fs::write(&victim, "content").unwrap();
        symlink(&victim, folder.path().join("ready.partial")).unwrap();
        symlink(&victim, &ready).unwrap();
        for text in ["first", "second"] {
            replace(&ready, text).unwrap();
            assert_eq!(fs::read_to_string(&ready).unwrap(), text);
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "content");
    }

    #[test]
    fn a_result_file_is_not_written_through_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let (path, victim) = (
            folder.path().join("result.json"),
            folder.path().join("victim"),
        );
        fs::write(&victim, "content").unwrap();
        symlink(&victim, &path).unwrap();
        symlink(&victim, folder.path().join("result.partial")).unwrap();
        let refused = replace_regular(&path, "{}").unwrap_err().to_string();
        assert!(refused.contains("not a regular file"), "{refused}");
        assert_eq!(fs::read_to_string(&victim).unwrap(), "content");
        fs::remove_file(&path).unwrap();
        for text in ["{}", "[]"] {
            replace_regular(&path, text).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "content");
    }
}
