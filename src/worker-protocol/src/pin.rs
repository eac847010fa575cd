//! The user PIN, which comes from a file that only its owner can read, from a descriptor, or from a
//! terminal. A PIN never comes from an argument or an environment variable.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use zeroize::{Zeroize as _, Zeroizing};

use keybroker_core::trusted_file::{self, Purpose};

use crate::wire::{self, pin_source::Source};

/// Longest PIN, in bytes.
const PIN_BYTES_MAX: usize = 255;

const UTF8_MARK: &str = "\u{feff}";
const PIN_FILE: Purpose = Purpose::secret("PIN");

/// The reason why a PIN cannot be read or is refused. No error message contains any part of the
/// PIN.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// The text begins with a byte order mark, which some editors write.
    #[error(
        "the PIN begins with a UTF-8 byte order mark, which is not part of a PIN; save the file without a byte order mark"
    )]
    ByteOrderMark,
    /// The text begins or ends with a space or a tab.
    #[error(
        "the PIN begins or ends with a blank; if this blank is a mistake, the login would use up an attempt: remove the blank, or change the PIN of the token to a PIN without a blank"
    )]
    Blank,
    /// The text is empty, or consists only of a line end.
    #[error("the PIN is empty")]
    Empty,
    /// The text has more than one line.
    #[error(
        "the PIN has more than one line, but a PIN is one line: write the PIN with `printf '%s' PIN > FILE`"
    )]
    Lines,
    /// The text contains a control character.
    #[error(
        "the PIN contains a control character, such as a NUL byte, which is not part of a PIN; write the PIN with \
         `printf '%s' PIN > FILE`"
    )]
    ControlCharacter,
    /// The text is longer than the longest permitted PIN.
    #[error(
        "the PIN is longer than {PIN_BYTES_MAX} bytes, which is too long; check that this is the right file"
    )]
    TooLong,
    /// The PIN cannot be read.
    #[error("{}", describe_read(.0))]
    Read(#[from] io::Error),
    /// The file is missing, or other users can read or change it.
    #[error("the PIN file: {0}")]
    File(#[from] trusted_file::Error),
    /// An error, and the file or descriptor that caused the error.
    #[error("{place}: {source}")]
    In {
        /// The file or descriptor.
        place: String,
        /// The error.
        source: Box<PinError>,
    },
}

fn describe_read(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::InvalidData => {
            "the PIN is not UTF-8 text; an editor may have saved the file as UTF-16 or Latin-1: save the file as \
             UTF-8".to_owned()
        }
        _ => format!("cannot read the PIN: {error}"),
    }
}

/// The PIN of a token.
pub struct Pin(Zeroizing<String>);

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pin(redacted)")
    }
}

impl Pin {
    /// Creates a PIN from text. One LF or CRLF at the end is not part of the PIN. Invisible
    /// characters that editors add are refused, because a wrong PIN would use up one of the token's
    /// few login attempts.
    pub fn from_text(text: String) -> Result<Self, PinError> {
        let text = Zeroizing::new(text);
        let pin = text.strip_suffix('\n').unwrap_or(&text);
        let pin = pin.strip_suffix('\r').unwrap_or(pin);
        if pin.starts_with(UTF8_MARK) {
            return Err(PinError::ByteOrderMark);
        }
        if pin.starts_with(char::is_whitespace) || pin.ends_with(char::is_whitespace) {
            return Err(PinError::Blank);
        }
        if pin.is_empty() {
            return Err(PinError::Empty);
        }
        if pin.contains(['\n', '\r']) {
            return Err(PinError::Lines);
        }
        if pin.chars().any(char::is_control) {
            return Err(PinError::ControlCharacter);
        }
        if pin.len() > PIN_BYTES_MAX {
            return Err(PinError::TooLong);
        }
        Ok(Self(Zeroizing::new(pin.to_owned())))
    }

    /// Reads a PIN from a file. The file must belong to the user of this process and be readable
    /// only by this user. Alternatively, the file may belong to root, and then a group may also
    /// read the file.
    pub fn from_file(path: &Path) -> Result<Self, PinError> {
        let path = resolve(path)?;
        let file = trusted_file::open(&path, PIN_FILE)?;
        Self::from_reader(&file).map_err(|error| PinError::In {
            place: format!("the PIN file {}", path.display()),
            source: Box::new(error),
        })
    }

    /// Checks whether a PIN may be read from the file. The function reads nothing from the file, because only the
    /// worker of a command reads the PIN.
    pub fn check_file(path: &Path) -> Result<(), trusted_file::Error> {
        trusted_file::open(path, PIN_FILE).map(drop)
    }

    /// Reads a PIN from an open descriptor of this process.
    pub fn from_descriptor(number: u32) -> Result<Self, PinError> {
        let read = || Self::from_reader(fs::File::open(format!("/proc/self/fd/{number}"))?);
        read().map_err(|error| PinError::In {
            place: format!("descriptor {number}"),
            source: Box::new(error),
        })
    }

    fn from_reader(reader: impl Read) -> Result<Self, PinError> {
        // The full capacity is allocated first, because a growing string leaves copies that are not
        // overwritten.
        let mut text = Zeroizing::new(String::with_capacity(PIN_BYTES_MAX + 2));
        let limit = u64::try_from(PIN_BYTES_MAX + 2).expect("a small number");
        reader.take(limit).read_to_string(&mut text)?;
        Self::from_text(std::mem::take(&mut text))
    }

    /// The PIN, for the module and for hashing.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// The source of a PIN for a worker.
#[derive(Debug)]
pub enum PinSource {
    /// A file that the worker reads itself, so that the PIN is never in the process that starts the
    /// worker.
    File(PathBuf),
    /// A PIN that was typed at a terminal or read from a descriptor.
    Text(Pin),
    /// No PIN is needed, because the token is used without a login.
    NotNeeded,
}

impl PinSource {
    /// Returns the message that is sent to the worker. The path is resolved here, because the
    /// worker does not have the environment of this process.
    pub fn to_wire(&self) -> Result<wire::PinSource, PinError> {
        let source = match self {
            Self::File(path) => Some(Source::File(resolve(path)?.to_string_lossy().into_owned())),
            Self::Text(pin) => Some(Source::Text(pin.expose().to_owned())),
            Self::NotNeeded => None,
        };
        Ok(wire::PinSource { source })
    }
}

impl wire::PinSource {
    /// Reads the PIN from the text or the file. Returns `None` for a token that is used without a login.
    pub fn read(&self) -> Result<Option<Pin>, PinError> {
        match &self.source {
            Some(Source::File(path)) => Pin::from_file(Path::new(path)).map(Some),
            Some(Source::Text(text)) => Pin::from_text(text.clone()).map(Some),
            None => Ok(None),
        }
    }
}

impl Drop for wire::PinSource {
    /// Overwrites a PIN that was sent as text.
    fn drop(&mut self) {
        if let Some(Source::Text(text)) = &mut self.source {
            text.zeroize();
        }
    }
}

/// Replaces `$CREDENTIALS_DIRECTORY/` at the beginning of a path with the directory that systemd passes.
pub fn resolve(path: &Path) -> Result<PathBuf, PinError> {
    Ok(trusted_file::expand(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn file(mode: u32, content: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pin");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (directory, path)
    }

    #[test]
    fn one_line_end_is_not_part_of_the_pin() {
        let (_directory, path) = file(0o600, "1234\n");
        assert_eq!(Pin::from_file(&path).unwrap().0.as_str(), "1234");
    }

    #[test]
    fn what_an_editor_leaves_costs_no_login_try() {
        for content in ["1234\r\n", "1234\r"] {
            let (_directory, path) = file(0o600, content);
            assert_eq!(Pin::from_file(&path).unwrap().0.as_str(), "1234");
        }
        for (content, word) in [
            ("\u{feff}1234\n", "byte order mark"),
            ("1234 \n", "blank"),
            (" 1234", "blank"),
            ("1234\t\n", "blank"),
        ] {
            let (_directory, path) = file(0o600, content);
            let message = Pin::from_file(&path).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
            assert!(!message.contains("1234"), "{message}");
        }
        let (_directory, path) = file(0o600, "");
        fs::write(&path, b"\xff\xfe1\x002\x00").unwrap();
        Pin::from_file(&path).unwrap_err();
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o644, 0o604, 0o620] {
            let (_directory, path) = file(mode, "1234");
            let message = Pin::from_file(&path).unwrap_err().to_string();
            assert!(message.contains("chmod 600"), "{message}");
            assert!(!message.contains("1234"), "{message}");
        }
    }

    #[test]
    fn empty_long_and_odd_pins_are_refused() {
        for content in ["", "\n", "12\n34\n", &"x".repeat(256)] {
            let (_directory, path) = file(0o600, content);
            assert!(Pin::from_file(&path).is_err(), "{content:?}");
        }
    }

    #[test]
    fn debug_shows_nothing() {
        let pin = Pin::from_text("1234".to_owned()).unwrap();
        assert_eq!(format!("{pin:?}"), "Pin(redacted)");
    }
}
