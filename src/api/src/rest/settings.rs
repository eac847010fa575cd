//! The `[rest]` section of the configuration.

use serde::{Deserialize, Serialize};

use super::origins;

/// Longest path prefix, in bytes.
const PREFIX_BYTES_MAX: usize = 128;

/// The `[rest]` section, which applies to every listener with the REST API.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Origins of web vaults whose pages may send requests: scheme, host and port, as a browser sends them.
    pub allowed_origins: Vec<String>,
    /// Path before `/user-keys` in the URL that is configured in Bitwarden, such as `/keys`; may be empty.
    pub path_prefix: String,
}

impl Settings {
    /// Returns the problems of the `[rest]` section, each with its remedy.
    pub fn problems(&self) -> Vec<String> {
        let origins = self.allowed_origins.iter();
        let mut problems: Vec<String> = origins
            .filter(|origin| !origins::is_origin(origin))
            .map(|origin| {
                format!(
                    "[rest]: `allowed_origins` has {origin:?}, which no browser sends: write `https://host` or \
                     `https://host:port` in lower case, without a path and without a slash at the end"
                )
            })
            .collect();
        if !self.path_prefix.is_empty() && !is_prefix(&self.path_prefix) {
            problems.push(format!(
                "[rest]: `path_prefix` is {:?}; it must be empty, or begin with a slash, not end with a slash, and \
                 have only letters, digits, `-`, `_` and `.` between single slashes",
                self.path_prefix
            ));
        }
        problems
    }
}

fn is_prefix(text: &str) -> bool {
    let is_segment = |segment: &str| {
        !segment.is_empty()
            && !matches!(segment, "." | "..")
            && segment
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
    };
    text.len() <= PREFIX_BYTES_MAX
        && text
            .strip_prefix('/')
            .is_some_and(|rest| rest.split('/').all(is_segment))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(origins: &[&str], prefix: &str) -> usize {
        let settings = Settings {
            allowed_origins: origins.iter().map(ToString::to_string).collect(),
            path_prefix: prefix.to_owned(),
        };
        settings.problems().len()
    }

    #[test]
    fn origins_and_prefixes_are_checked() {
        assert_eq!(problems(&["https://vault.example.org"], "/keys/v1"), 0);
        assert_eq!(problems(&[], ""), 0);
        assert_eq!(problems(&["file://", "bw-desktop-file://bundle"], ""), 0);
        assert_eq!(problems(&["file:///", "file://*"], ""), 2);
        assert_eq!(problems(&["*", "https://vault.example.org/"], ""), 2);
        for bad in [
            "/", "keys", "/keys/", "//keys", "/a//b", "/{x}", "/*", "/..", "/a b", "/a%20b", "/ä",
        ] {
            assert_eq!(problems(&[], bad), 1, "{bad}");
        }
    }
}
