//! Key material on its way in and out: files, descriptors and pipes. Never an argument, never a terminal unasked.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IsTerminal as _, Read, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use aws_lc_rs::rand;
use clap::Args;
use zeroize::Zeroizing;

use crate::cli::exit::{Exit, Failure};
use keybroker_client::{KeyMaterial, KeyName};
use keybroker_core::secret::KEY_MATERIAL_BYTES_MAX;

/// Name and length of the key that Bitwarden's clients ask for over REST, which refuses to hand out any other length.
const BITWARDEN: (&str, usize) = ("bitwarden", 32);

/// Where new key material comes from.
#[derive(Args, Clone, Debug)]
#[group(skip)]
pub(super) struct Source {
    /// File with the key material, 1 to 190 bytes; `-` is standard input
    #[arg(
        long, value_name = "FILE", required_unless_present_any = ["material_fd", "generate"],
        conflicts_with_all = ["material_fd", "generate"]
    )]
    material_file: Option<PathBuf>,
    /// Number of an open file descriptor to read the key material from
    #[arg(long, value_name = "N", conflicts_with = "generate")]
    material_fd: Option<u32>,
    /// Generate this many random bytes, 1 to 190, and write them to the file of --out
    #[arg(
        long, value_name = "BYTES", requires = "out",
        value_parser = clap::value_parser!(u16).range(1..=190)
    )]
    generate: Option<u16>,
    /// New file for the generated key material, mode 0600
    #[arg(long, value_name = "FILE", conflicts_with_all = ["material_file", "material_fd"])]
    out: Option<PathBuf>,
}

impl Source {
    /// Reads or generates the material for a key of this name.
    pub(super) fn read_for(&self, key_name: &KeyName) -> Result<KeyMaterial, Failure> {
        let key_name = key_name.as_str();
        let (name, length) = BITWARDEN;
        let odd = |found: usize| {
            let what = format!("a key named {name} has {length} bytes, and this one has {found}");
            Failure::new(Exit::Usage, what)
                .hint("the file has the raw bytes: no base64, no end of line")
        };
        match self.generate.map(usize::from) {
            Some(planned) if key_name == name && planned != length => return Err(odd(planned)),
            _ => {}
        }
        let material = self.read()?;
        if key_name == name && material.len() != length {
            return Err(odd(material.len()));
        }
        let what = if material.is_empty() {
            "the key material is empty"
        } else {
            "the key material is longer than 190 bytes"
        };
        KeyMaterial::new(material.to_vec())
            .map_err(|_| Failure::new(Exit::Usage, what).hint("key material is 1 to 190 raw bytes"))
    }

    /// The bytes; generated ones are on disk before they are sent.
    fn read(&self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        if let (Some(length), Some(path)) = (self.generate, &self.out) {
            let mut material = Zeroizing::new(vec![0; usize::from(length)]);
            rand::fill(&mut material)
                .map_err(|_| Failure::new(Exit::Internal, "the system gives no random bytes"))?;
            write_secret(path, &material)?;
            return Ok(material);
        }
        let path = match (self.material_fd, &self.material_file) {
            (Some(number), _) => PathBuf::from(format!("/proc/self/fd/{number}")),
            (None, Some(path)) if path != Path::new("-") => path.clone(),
            _ => return read(io::stdin().lock(), "standard input"),
        };
        let shown = path.display().to_string();
        let file = File::open(&path).map_err(|error| unreadable(&shown, &error))?;
        read(file, &shown)
    }

    /// Removes generated material after the broker certainly refused it, so that it is not used as a key.
    pub(super) fn discard(&self) {
        if let (Some(_), Some(path)) = (self.generate, &self.out)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::error!(%error, file = %path.display(), "generated material that was not stored is still there");
        }
    }
}

/// Reads at most one byte more than is permitted, so that longer material is noticed.
fn read(from: impl Read, shown: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
    // The whole capacity at once: a vector that grows leaves copies that are not overwritten.
    let mut material = Zeroizing::new(Vec::with_capacity(KEY_MATERIAL_BYTES_MAX + 1));
    let limit = u64::try_from(KEY_MATERIAL_BYTES_MAX + 1).unwrap_or(u64::MAX);
    from.take(limit)
        .read_to_end(&mut material)
        .map_err(|error| unreadable(shown, &error))?;
    Ok(material)
}

fn unreadable(shown: &str, error: &io::Error) -> Failure {
    let what = format!("cannot read the key material from {shown}: {error}");
    Failure::new(Exit::Usage, what)
}

/// Refuses to show key material on a terminal, where scroll-back and recordings keep it, unless asked to.
pub(in crate::cli) fn keep_off_terminal(force: bool) -> Result<(), Failure> {
    if force || !io::stdout().is_terminal() {
        return Ok(());
    }
    let what = "key material does not belong on a terminal";
    Err(Failure::new(Exit::Usage, what).hint("use --out FILE or a pipe, or --force to see it"))
}

/// Runs the checks of [`write_secret`] before the key is released.
pub(in crate::cli) fn check_new(path: &Path) -> Result<(), Failure> {
    if path.symlink_metadata().is_ok() {
        return Err(exists(path));
    }
    Ok(())
}

/// Writes a new file that only its owner can read. An existing one is never overwritten.
pub(in crate::cli) fn write_secret(path: &Path, material: &[u8]) -> Result<(), Failure> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    file.and_then(|mut file| file.write_all(material).and_then(|()| file.sync_all()))
        .map_err(|error| {
            if error.kind() == io::ErrorKind::AlreadyExists {
                return exists(path);
            }
            Failure::new(
                Exit::Usage,
                format!("cannot write {}: {error}", path.display()),
            )
        })
}

/// Where a secret goes when not to standard output.
pub(in crate::cli) enum Destination<'a> {
    /// A file that is not there yet.
    NewFile(&'a Path),
    /// An open descriptor.
    Descriptor(u32),
}

impl<'a> Destination<'a> {
    /// What options name, checked before there is a secret to write.
    pub(in crate::cli) fn of(
        file: Option<&'a Path>,
        descriptor: Option<u32>,
    ) -> Result<Option<Self>, Failure> {
        match (descriptor, file) {
            (Some(number), _) => {
                open_descriptor(number)?;
                Ok(Some(Self::Descriptor(number)))
            }
            (None, Some(path)) => check_new(path).map(|()| Some(Self::NewFile(path))),
            (None, None) => Ok(None),
        }
    }

    pub(in crate::cli) fn write(&self, secret: &[u8]) -> Result<(), Failure> {
        match self {
            Self::NewFile(path) => write_secret(path, secret),
            Self::Descriptor(number) => open_descriptor(*number)?
                .write_all(secret)
                .map_err(|error| unwritable(*number, &error.to_string())),
        }
    }
}

fn open_descriptor(number: u32) -> Result<File, Failure> {
    let file = OpenOptions::new()
        .write(true)
        .open(format!("/proc/self/fd/{number}"))
        .map_err(|error| unwritable(number, &error.to_string()))?;
    if file.is_terminal() {
        return Err(unwritable(number, "it is a terminal"));
    }
    Ok(file)
}

fn unwritable(number: u32, why: &str) -> Failure {
    Failure::new(
        Exit::Usage,
        format!("cannot write to descriptor {number}: {why}"),
    )
}

fn exists(path: &Path) -> Failure {
    let what = format!(
        "{} exists, and a secret never overwrites a file",
        path.display()
    );
    Failure::new(Exit::Usage, what).hint("name a new file")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_written_secret_is_its_owners_alone_and_never_overwrites() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        check_new(&path).unwrap();
        write_secret(&path, b"first").unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            write_secret(&path, b"second").unwrap_err().exit,
            Exit::Usage
        );
        assert!(check_new(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"first");
    }

    #[test]
    fn more_than_is_permitted_is_read_no_further_than_one_byte() {
        for (length, read_length) in [(0, 0), (190, 190), (191, 191), (100_000, 191)] {
            let material = read(io::repeat(7).take(length), "here").unwrap();
            assert_eq!(material.len(), read_length);
        }
    }

    #[test]
    fn generated_material_is_in_its_file_until_it_is_discarded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("key");
        let source = Source {
            material_file: None,
            material_fd: None,
            generate: Some(32),
            out: Some(path.clone()),
        };
        let material = source.read().unwrap();
        assert_eq!(fs::read(&path).unwrap(), *material);
        assert_ne!(*material, vec![0; 32]);
        source.discard();
        assert!(!path.exists());
    }

    #[test]
    fn a_key_for_bitwarden_has_32_bytes() {
        let [bitwarden, vault] = ["bitwarden", "vault"].map(|name| KeyName::parse(name).unwrap());
        let folder = tempfile::tempdir().unwrap();
        for (length, is_good) in [(31, false), (32, true), (33, false), (44, false)] {
            let path = folder.path().join(length.to_string());
            fs::write(&path, vec![7; length]).unwrap();
            let mut source = Source {
                material_file: Some(path),
                material_fd: None,
                generate: None,
                out: None,
            };
            assert_eq!(source.read_for(&bitwarden).is_ok(), is_good, "{length}");
            let other = source.read_for(&vault).unwrap();
            assert_eq!(other.expose().len(), length);
            // Refused before it is on disk.
            let made = folder.path().join(format!("made-{length}"));
            source.material_file = None;
            source.generate = Some(u16::try_from(length).unwrap());
            source.out = Some(made.clone());
            assert_eq!(source.read_for(&bitwarden).is_ok(), is_good, "{length}");
            assert_eq!(made.exists(), is_good);
        }
    }
}
