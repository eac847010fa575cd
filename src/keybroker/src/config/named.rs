//! Finds principals that occur in policies, but that the configuration does not define. A policy
//! for an undefined principal is valid but has no effect. For example, a `forbid` policy with a
//! misspelled principal forbids nothing.

use keybroker_core::{key::ClientId, principal::Kind};
use keybroker_policy::{NamedPrincipal, Problems};

use super::Config;

/// Minimum Jaro-Winkler similarity between an unknown name and the name to suggest.
const SIMILAR: f64 = 0.9;

impl Config {
    /// Returns a remark for each principal that occurs in a policy, but that the configuration does
    /// not define. Fails if the policies cannot be loaded.
    pub fn unknown_principals(&self) -> Result<Vec<String>, Problems> {
        let named = self.policy.named_principals()?;
        let unknown = named.iter().filter(|named| !self.is_known(named));
        Ok(unknown.map(|named| self.remark(named)).collect())
    }

    fn is_known(&self, named: &NamedPrincipal) -> bool {
        let name = named.name.as_str();
        if let Some(id) = name.strip_prefix("client:") {
            // API clients are in the database instead of the configuration.
            return named.kind == Kind::Service && ClientId::from_hex(id).is_some();
        }
        if let Some(rest) = name.strip_prefix("token:") {
            let issuer = rest.split_once(':').map_or(rest, |(issuer, _)| issuer);
            return self
                .issuers
                .iter()
                .any(|one| one.name == issuer && one.can_identify(named.kind));
        }
        named.kind == Kind::Service && self.principals.iter().any(|one| one.san == name)
    }

    fn remark(&self, named: &NamedPrincipal) -> String {
        let NamedPrincipal {
            kind,
            name,
            policy,
            file,
        } = named;
        let kind = match kind {
            Kind::User => "User",
            Kind::Service => "Service",
        };
        let nearest = self
            .principals
            .iter()
            .map(|one| (strsim::jaro_winkler(name, &one.san), one.san.as_str()))
            .filter(|(similarity, _)| *similarity >= SIMILAR)
            .max_by(|(one, _), (other, _)| one.total_cmp(other));
        let advice = match nearest {
            Some((_, san)) if kind == "Service" => format!("did you mean {san:?}?"),
            _ => "the name of a principal is the `san` of a [[principal]], `client:ID` for an API client, or \
                  `token:ISSUER:SUBJECT` for an [[issuer]] of this kind"
                .to_owned(),
        };
        format!(
            "[policy]: {file}: policy `{policy}` refers to {kind}::{name:?}, which the configuration does not define, \
             so the policy never applies; {advice}"
        )
    }
}
