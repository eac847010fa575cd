//! Reads passwords, access tokens and keys from files, descriptors or a prompt. A secret is never a command-line
//! argument.

use std::{
    fs::File,
    io::{self, IsTerminal as _, Read as _},
    mem,
    path::Path,
};

use base64ct::{Base64, Encoding as _};
use zeroize::Zeroizing;

use keybroker_core::trusted_file::{self, Purpose};

use super::exit::{Exit, Failure};

/// Maximum length of a secret that a command reads from a file or a descriptor, in bytes.
const LINE_BYTES_MAX: usize = 32 * 1_024;

/// The source of a secret.
pub(super) struct Source<'a> {
    /// The name of the secret for messages.
    pub(super) what: &'static str,
    pub(super) file: Option<&'a Path>,
    pub(super) descriptor: Option<u32>,
}

impl Source<'_> {
    pub(super) fn is_none(&self) -> bool {
        self.file.is_none() && self.descriptor.is_none()
    }

    /// Reads one line, without the line end.
    pub(super) fn line(&self) -> Result<Zeroizing<String>, Failure> {
        let mut bytes = self.bytes(LINE_BYTES_MAX)?;
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        match String::from_utf8(mem::take(&mut bytes)) {
            Ok(text) if text.starts_with('\u{feff}') => {
                drop(Zeroizing::new(text));
                Err(self.refuse(
                    "the value begins with a UTF-8 byte order mark; save the file without a byte order mark",
                ))
            }
            Ok(text) if text.contains(['\n', '\r']) => {
                drop(Zeroizing::new(text));
                Err(self.refuse("the value has more than one line"))
            }
            Ok(text) => Ok(Zeroizing::new(text)),
            Err(error) => {
                drop(Zeroizing::new(error.into_bytes()));
                Err(self.refuse("the value is not UTF-8"))
            }
        }
    }

    /// Reads one line, with a prompt at the terminal if neither a file nor a descriptor is set.
    pub(super) fn line_or_prompt(&self, prompt: &str) -> Result<Zeroizing<String>, Failure> {
        if !self.is_none() {
            return self.line();
        }
        if !io::stdin().is_terminal() {
            let what = format!("no source specified for {}", self.what);
            return Err(Failure::new(Exit::Usage, what).hint(
                "pass a file or a descriptor, or run the command at a terminal for a prompt",
            ));
        }
        rpassword::prompt_password(prompt)
            .map(Zeroizing::new)
            .map_err(|error| self.refuse(&format!("cannot read the value: {error}")))
    }

    /// Reads a key of the given length, as raw bytes or as a line of base64.
    pub(super) fn key(&self, length: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let bytes = self.bytes(LINE_BYTES_MAX)?;
        if bytes.len() == length {
            return Ok(bytes);
        }
        let decoded = str::from_utf8(&bytes)
            .ok()
            .and_then(|text| Base64::decode_vec(text.trim_end()).ok())
            .map(Zeroizing::new);
        decoded
            .filter(|decoded| decoded.len() == length)
            .ok_or_else(|| {
                self.refuse(&format!(
                    "the content is neither {length} bytes nor the base64 of {length} bytes"
                ))
            })
    }

    fn bytes(&self, max: usize) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let file = match (self.descriptor, self.file) {
            (Some(number), _) => File::open(format!("/proc/self/fd/{number}"))
                .map_err(|error| self.refuse(&format!("cannot read the value: {error}")))?,
            (None, Some(path)) => trusted_file::open(path, Purpose::secret("secret"))
                .map_err(|error| Failure::new(Exit::Usage, format!("{}: {error}", self.what)))?,
            (None, None) => return Err(self.refuse("no source specified")),
        };
        // Allocates the full capacity first, because a growing vector leaves copies in memory that
        // are not overwritten.
        let mut bytes = Zeroizing::new(Vec::with_capacity(max + 1));
        let limit = u64::try_from(max + 1).unwrap_or(u64::MAX);
        file.take(limit)
            .read_to_end(&mut bytes)
            .map_err(|error| self.refuse(&format!("cannot read the value: {error}")))?;
        if bytes.len() > max {
            return Err(self.refuse(&format!("the value is longer than {max} bytes")));
        }
        Ok(bytes)
    }

    fn refuse(&self, why: &str) -> Failure {
        let place = match (self.descriptor, self.file) {
            (Some(number), _) => format!(" (descriptor {number})"),
            (None, Some(path)) => format!(" ({})", path.display()),
            (None, None) => String::new(),
        };
        Failure::new(Exit::Usage, format!("{}{place}: {why}", self.what))
    }
}
