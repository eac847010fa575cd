//! The configuration file.

use keybroker::config::Config;

pub(crate) const WORDS: &[&str] = &[
    "[token]",
    "[store]",
    "[[listener]]",
    "[[principal]]",
    "[[issuer]]",
    "[limits]",
    "[policy]",
    "[status.remote]",
    " = ",
    "\"",
    "'",
    "[",
    "]",
    "{",
    "}",
    "\n",
    "#",
    "true",
    "-1",
    "1e9",
    "\"30s\"",
    "1979-05-27",
    "sqlite:",
    "postgres://",
    "users = [\"*\"]",
    "\u{feff}",
];

const EXAMPLE: &str = include_str!("../../../../keybroker.example.toml");
/// A secret in a setting that does not exist.
const SECRET: &str = "hunter2-on-its-way";

/// Reads a configuration, and looks for everything that is wrong with it.
///
/// # Panics
/// If an accepted one is not the same once it was written and read again, or a message repeats a secret that has its own line.
pub fn configuration(bytes: &[u8]) -> bool {
    let Ok(text) = str::from_utf8(bytes) else {
        return false;
    };
    match Config::parse(text) {
        Ok(config) => {
            let problems = config.problems();
            let written = toml::to_string(&config).unwrap();
            let again = Config::parse(&written).unwrap();
            assert_eq!(toml::to_string(&again).unwrap(), written);
            assert_eq!(again.problems(), problems);
            true
        }
        Err(error) => {
            if has_secret_line(text) {
                let message = format!("{error} {}", error.hint().unwrap_or_default());
                assert!(!message.contains(SECRET), "{message}");
            }
            false
        }
    }
}

/// Whether the secret is there once, in quotes, as the whole value of a setting `pin`.
fn has_secret_line(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| line.contains(SECRET));
    let line = lines.next().map(str::trim);
    line == Some(&format!("pin = \"{SECRET}\""))
        && lines.next().is_none()
        && !text.contains("'''")
        && !text.contains("\"\"\"")
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    // Without comments an input is a tenth as long, and a change more often meets a setting.
    let lean = |text: &str| {
        let lines = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'));
        lines.collect::<Vec<_>>().join("\n") + "\n"
    };
    vec![
        lean(EXAMPLE).into_bytes(),
        lean(&EXAMPLE.replace("\n#: ", "\n")).into_bytes(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check for a secret in a message looks at something.
    #[test]
    fn a_secret_in_a_setting_that_does_not_exist_is_looked_for() {
        let text = EXAMPLE.replace("[store]", &format!("[store]\n  pin = \"{SECRET}\""));
        assert!(has_secret_line(&text));
        assert!(!configuration(text.as_bytes()));
    }
}
