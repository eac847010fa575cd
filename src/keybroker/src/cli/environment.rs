//! Explains which environment variables the vendor's module did not receive. Workers of `serve` and
//! of commands receive only the variables of `[token.environment]`. Therefore, a module that finds
//! its token in a command also finds the token in `serve`. A hint lists variables that are set in
//! the shell, but that the module does not receive.
//!
//! Mitigation: M15 of `THREAT_MODEL.md`.

use crate::config::Config;
use keybroker_hsm::admin::AdminError;

use super::exit::Failure;

/// Prefix of Keybroker's own environment variables.
const OURS_PREFIX: &str = "KEYBROKER_";

/// Parts of variable names. Substrings in the names of variables that PKCS#11 modules or the
/// dynamic linker may read.
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

/// The names of variables in `set` that a module might read but does not receive. The result does
/// not contain values, because values may be secrets.
fn not_passed_on<'a>(set: impl Iterator<Item = &'a str>, config: &Config) -> Vec<&'a str> {
    let mut names: Vec<&str> = set
        .filter(|name| is_of_a_module(name))
        .filter(|name| !config.token().environment.contains_key(*name))
        .filter(|name| !name.starts_with(OURS_PREFIX))
        .filter(|name| config.store.password_variable.as_deref() != Some(*name))
        .collect();
    names.sort_unstable();
    names
}

fn is_of_a_module(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    OF_MODULES.iter().any(|part| name.contains(part))
        || OF_MODULES_SUFFIXES
            .iter()
            .any(|suffix| name.ends_with(suffix))
}

/// Adds a hint about variables that the module did not receive, if these variables may be the cause
/// of the failure.
pub(super) fn explain(error: AdminError, config: &Config) -> Failure {
    let hint = hint(&error, config);
    let failure = Failure::from(error);
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// The hint about variables that the module did not receive; `None` if the failure has another
/// cause.
pub(super) fn hint(error: &AdminError, config: &Config) -> Option<String> {
    matches!(error, AdminError::NoToken(_))
        .then(|| withheld(config))
        .flatten()
}

/// The hint about variables that the module does not receive; `None` if the module receives all
/// variables.
pub(super) fn withheld(config: &Config) -> Option<String> {
    let set: Vec<String> = std::env::vars_os()
        .filter_map(|(name, _)| name.into_string().ok())
        .collect();
    let names = not_passed_on(set.iter().map(String::as_str), config);
    if names.is_empty() {
        return None;
    }
    Some(format!(
        "neither this command nor `serve` passes these environment variables on to the PKCS#11 module: {}. If the module \
         needs them, add them to [token.environment]",
        names.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_a_module_could_read_are_named_unless_it_is_given_them() {
        let text = include_str!("../../../../keybroker.example.toml");
        let text = text.replace(
            "[token.environment]\n",
            "[token.environment]\nYUBIHSM_PKCS11_CONF = \"/etc/yubihsm.conf\"\n",
        );
        let config: Config = toml::from_str(&text).unwrap();
        let set = [
            "SOFTHSM2_CONF",
            "YUBIHSM_PKCS11_CONF",
            "LD_PRELOAD",
            "HOME",
            "PATH",
            "NSS_LIB_PARAMS",
            "KEYBROKER_CONFIG",
            "KUBECONFIG_CFG",
        ];
        assert_eq!(
            not_passed_on(set.into_iter(), &config),
            ["KUBECONFIG_CFG", "LD_PRELOAD", "NSS_LIB_PARAMS"]
        );
    }
}
