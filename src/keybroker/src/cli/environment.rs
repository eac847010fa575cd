//! The environment of a command that loads the vendor's module: what `serve` gives its workers, and the few variables that
//! keybroker itself reads. A module that finds its token here finds it in `serve`, too.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use std::{collections::BTreeMap, ffi::OsString};

use crate::config::Config;

use super::exit::Failure;

/// Names of variables that were set and not handed on, for the message when no token is found. Names only: values may be
/// secrets.
const WITHHELD: &str = "KEYBROKER_WITHHELD_VARIABLES";

/// What keybroker reads itself: its options, log filter, credentials, terminal, language and time zone.
const OURS: &[&str] = &[
    "CREDENTIALS_DIRECTORY",
    "RUST_LOG",
    "TERM",
    "COLUMNS",
    "LINES",
    "NO_COLOR",
    "LANG",
    "TZ",
];
const OURS_PREFIXES: &[&str] = &["KEYBROKER_", "LC_"];

/// Parts of names that modules read: their own, and those of the dynamic linker.
const OF_MODULES: &[&str] = &[
    "PKCS11",
    "P11",
    "HSM",
    "TPM2",
    "NSS",
    "NFAST",
    "CHRYSTOKI",
    "CKNFAST",
    "KMS",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
];
const OF_MODULES_SUFFIXES: &[&str] = &["_CONF", "_CONFIG", "_CFG", "_INI"];

/// Variables by name.
pub(super) type Environment = BTreeMap<OsString, OsString>;

/// The environment that the command must have, if it is another one than `now`.
pub(super) fn wanted(now: &Environment, config: &Config) -> Option<Environment> {
    let password = config.store.password_variable.as_deref();
    let is_ours = |name: &str| {
        OURS.contains(&name)
            || OURS_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
            || password == Some(name)
    };
    let mut wanted: Environment = now
        .iter()
        .filter(|(name, _)| name.to_str().is_some_and(is_ours))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect();
    for (name, value) in &config.token.environment {
        wanted.insert(name.into(), value.into());
    }
    let withheld: Vec<&str> = now
        .keys()
        .filter(|name| !wanted.contains_key(*name))
        .filter_map(|name| name.to_str())
        .filter(|name| is_of_a_module(name))
        .collect();
    if !withheld.is_empty() {
        wanted.insert(WITHHELD.into(), withheld.join(",").into());
    }
    (wanted != *now).then_some(wanted)
}

fn is_of_a_module(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    OF_MODULES.iter().any(|part| name.contains(part))
        || OF_MODULES_SUFFIXES
            .iter()
            .any(|suffix| name.ends_with(suffix))
}

/// Says which variables the module did not see, when it does not show its token.
pub(super) fn explain(failure: Failure) -> Failure {
    match withheld() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// The hint about variables that were not handed on; absent when there was none.
pub(super) fn withheld() -> Option<String> {
    let names = std::env::var(WITHHELD).ok()?;
    Some(format!(
        "set in this shell but not handed on to the module, here and in `serve`: {}. If the module needs them, add them to \
         [token.environment]",
        names.replace(',', ", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(lines: &str) -> Config {
        let text = include_str!("../../../../keybroker.example.toml");
        let text = text.replace(
            "[token.environment]\n",
            &format!("[token.environment]\n{lines}\n"),
        );
        toml::from_str(&text).unwrap()
    }

    fn environment(variables: &[(&str, &str)]) -> Environment {
        variables
            .iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect()
    }

    #[test]
    fn a_module_sees_what_is_configured_and_nothing_else() {
        let config = config("YUBIHSM_PKCS11_CONF = \"/etc/yubihsm.conf\"");
        let now = environment(&[
            ("SOFTHSM2_CONF", "/tmp/other.conf"),
            ("LD_PRELOAD", "/tmp/evil.so"),
            ("HOME", "/root"),
            ("PATH", "/bin"),
            ("NSS_LIB_PARAMS", "x"),
            ("KEYBROKER_CONFIG", "/etc/k.toml"),
            ("LC_ALL", "C"),
        ]);
        let first = wanted(&now, &config).unwrap();
        let expected = environment(&[
            ("SOFTHSM2_CONF", "/etc/keybroker/softhsm2.conf"),
            ("YUBIHSM_PKCS11_CONF", "/etc/yubihsm.conf"),
            ("KEYBROKER_CONFIG", "/etc/k.toml"),
            ("LC_ALL", "C"),
            (WITHHELD, "LD_PRELOAD,NSS_LIB_PARAMS"),
        ]);
        assert_eq!(first, expected);
        // The command begins again once, not for ever.
        assert_eq!(wanted(&first, &config), None);
    }
}
