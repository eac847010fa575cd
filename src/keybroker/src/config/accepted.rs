//! Describes the risks of a token that the operator accepts with settings in `[token]`.
//!
//! Mitigation: M16 of `THREAT_MODEL.md`.

use std::fmt;

use keybroker_hsm as hsm;
use keybroker_pkcs11::attribute_check;
use keybroker_worker_protocol::AccessControl;

/// A setting that weakens the checks of the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AcceptedRisk {
    /// The setting in `[token]`, such as `attribute_exceptions`.
    pub(crate) setting: &'static str,
    /// The effect of the setting, as a sentence without a full stop.
    pub(crate) what: String,
    /// The risk; `None` if `what` already describes the risk.
    pub(crate) gives_away: Option<&'static str>,
}

impl fmt::Display for AcceptedRisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (`token.{}`)", self.what, self.setting)?;
        match self.gives_away {
            Some(gives_away) => write!(f, "; the accepted risk: {gives_away}"),
            None => Ok(()),
        }
    }
}

/// All accepted risks of a token.
pub(crate) fn risks(token: &hsm::Settings) -> Vec<AcceptedRisk> {
    let exceptions = attribute_check::exceptions_in_use(&token.attribute_exceptions);
    let mut risks: Vec<AcceptedRisk> = exceptions
        .map(|exception| AcceptedRisk {
            setting: "attribute_exceptions",
            what: format!("{} is excepted", exception.attribute),
            gives_away: Some(exception.gives_away),
        })
        .collect();
    if token.access_control == AccessControl::OutsidePkcs11 {
        risks.push(AcceptedRisk {
            setting: "access_control",
            what: "access to the keys is controlled outside PKCS#11".to_owned(),
            gives_away: Some(attribute_check::ACCESS_OUTSIDE_PKCS11),
        });
    }
    if token.permits_integrity_key_in_worker() {
        risks.push(AcceptedRisk {
            setting: "integrity_key",
            what: integrity_keys_in_workers(token),
            gives_away: Some(attribute_check::INTEGRITY_KEY_IN_WORKER),
        });
    }
    risks.extend(token.spared_tests.iter().map(|test| AcceptedRisk {
        setting: "spared_tests",
        what: format!("the negative test {test} is not run"),
        gives_away: None,
    }));
    risks
}

/// Describes the permitted integrity key files with their digests, so that the audit log shows when
/// a digest changes.
fn integrity_keys_in_workers(token: &hsm::Settings) -> String {
    let what = "integrity keys are in the memory of the workers";
    let digests = &token.integrity_key_digests;
    if digests.is_empty() {
        return what.to_owned();
    }
    let files: Vec<String> = digests
        .iter()
        .map(|(id, digest)| format!("{id} has {digest}"))
        .collect();
    format!("{what} (SHA-256 of the files: {})", files.join(", "))
}
