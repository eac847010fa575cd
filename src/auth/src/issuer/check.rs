//! Checks the settings of issuers. The checks of this module run after the names and types of the
//! settings were checked.

use std::{collections::HashSet, ops::RangeInclusive};

use keybroker_core::{key::KeyName, principal::Kind, trusted_file};

use super::{KeySource, Settings, mapping, url_problem};

/// Longest `issuer`, in bytes.
const ISSUER_BYTES_MAX: usize = 1_024;
/// Claims that a provider may change for a user, or assign to another user later. OpenID Connect Core section 5.7 forbids
/// their use as identifiers. `upn` and `unique_name` are claims of Microsoft.
const REASSIGNED: [&str; 8] = [
    "email",
    "name",
    "nickname",
    "phone_number",
    "preferred_username",
    "unique_name",
    "upn",
    "username",
];

/// Returns the problems of each issuer and of the combination of all issuers, each with its remedy.
pub fn problems(issuers: &[Settings]) -> Vec<String> {
    let mut problems: Vec<String> = issuers.iter().flat_map(Settings::problems).collect();
    let (mut names, mut seen) = (HashSet::new(), HashSet::new());
    for issuer in issuers {
        if !names.insert(&issuer.name) {
            problems.push(format!("issuer {:?} is configured twice", issuer.name));
        }
        if !seen.insert(&issuer.issuer) {
            problems.push(format!(
                "issuer {:?}: another [[issuer]] has the same `issuer`, but the `iss` claim of an access token must \
                 identify exactly one [[issuer]]",
                issuer.name
            ));
        }
    }
    for (at, issuer) in issuers.iter().enumerate() {
        for other in &issuers[at + 1..] {
            let (tenants, others) = (issuer.user_tenants(), other.user_tenants());
            if issuer.shared_users && other.shared_users {
                continue;
            }
            for tenant in tenants.intersection(&others) {
                problems.push(format!(
                    "issuers {:?} and {:?} both identify users of the tenant `{}`: each issuer could issue an access \
                     token for any user of the other issuer; set a different `tenant` for each issuer, or `shared_users \
                     = true` for both",
                    issuer.name, other.name, tenant
                ));
            }
        }
    }
    problems
}

/// Returns remarks about settings that are probably not what the operator means.
pub fn remarks(issuers: &[Settings]) -> Vec<String> {
    let of_issuer = |issuer: &Settings| -> Vec<String> {
        let name = &issuer.name;
        mapping::remarks(&issuer.mappings)
            .map(|remark| format!("[[issuer]] {name}: {remark}"))
            .collect()
    };
    issuers.iter().flat_map(of_issuer).collect()
}

impl Settings {
    /// Returns the problems of a single issuer, without a comparison with other issuers.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        self.check_names(&mut problems);
        self.check_source(&mut problems);
        self.check_numbers(&mut problems);
        self.check_demands(&mut problems);
        self.check_holders(&mut problems);
        self.check_mappings(&mut problems);
        self.check_subject(&mut problems);
        problems
            .into_iter()
            .map(|problem| format!("issuer {:?}: {problem}", self.name))
            .collect()
    }

    fn check_names(&self, problems: &mut Vec<String>) {
        if KeyName::parse(&self.name).is_err() {
            problems.push("`name` must be 1 to 64 bytes of [a-z0-9._-]".to_owned());
        }
        let issuer = &self.issuer;
        if issuer.is_empty() || issuer.len() > ISSUER_BYTES_MAX {
            problems.push(format!(
                "`issuer` must be the `iss` claim of the issuer's access tokens, 1 to {ISSUER_BYTES_MAX} bytes"
            ));
        }
    }

    fn check_source(&self, problems: &mut Vec<String>) {
        let written = [
            self.discovery_url.is_some(),
            self.jwks_url.is_some(),
            self.jwks_file.is_some(),
            self.pem_file.is_some(),
        ];
        if written.iter().filter(|is_written| **is_written).count() > 1 {
            problems.push(
                "set at most one of `discovery_url`, `jwks_url`, `jwks_file` and `pem_file`, so that the issuer's keys \
                 have one source"
                    .to_owned(),
            );
        }
        for (name, path) in [
            ("jwks_file", &self.jwks_file),
            ("pem_file", &self.pem_file),
            ("ca_file", &self.ca_file),
        ] {
            if let Some(path) = path
                && !trusted_file::is_absolute(path)
            {
                problems.push(format!("`{name}` is {}", trusted_file::not_absolute(path)));
            }
        }
        let (name, url) = match self.key_source() {
            KeySource::Discovery(url) if self.discovery_url.is_some() => ("discovery_url", url),
            KeySource::Discovery(url) => ("issuer", url),
            KeySource::Url(url) => ("jwks_url", url),
            KeySource::Set(_) | KeySource::Pem(_) => {
                if self.ca_file.is_some() || self.allow_http {
                    problems.push(
                        "the issuer's keys come from a file: remove `ca_file` and `allow_http`, which would have no effect"
                            .to_owned(),
                    );
                }
                return;
            }
        };
        if let Some(problem) = url_problem(&url, self.allow_http) {
            problems.push(format!(
                "`{name}` makes the broker fetch keys from {url:?}, but {problem}. If the keys are not below the \
                 issuer's URL, \
                 set `discovery_url`, `jwks_url`, `jwks_file` or `pem_file`"
            ));
        }
    }

    fn check_numbers(&self, problems: &mut Vec<String>) {
        let mut range = |name: &str, value: u32, range: RangeInclusive<u32>| {
            if !range.contains(&value) {
                problems.push(format!(
                    "`{name}` is {value}; it must be {} to {}",
                    range.start(),
                    range.end()
                ));
            }
        };
        range("leeway_s", self.leeway_s, 0..=300);
        range("refresh_minutes", self.refresh_minutes, 1..=1_440);
        range("keep_hours", self.keep_hours, 1..=720);
        range(
            "token_lifetime_max_minutes",
            self.token_lifetime_max_minutes,
            1..=43_200,
        );
        if self.refresh_minutes > self.keep_hours.saturating_mul(60) {
            problems.push(
                "`keep_hours` is less than `refresh_minutes`: the issuer's keys would become out of date before they are fetched again"
                    .to_owned(),
            );
        }
    }

    /// A provider issues access tokens for many applications. The settings of the issuer must exclude access tokens
    /// that are meant for other applications.
    fn check_demands(&self, problems: &mut Vec<String>) {
        if self.algorithms.is_empty() {
            problems.push("`algorithms` is empty, so no access token could be verified".to_owned());
        }
        let is_anyones = self.audience.is_empty()
            && self.required_scopes.is_empty()
            && self.required_claims.is_empty();
        if is_anyones {
            problems.push(
                "without `audience`, the broker would accept access tokens that the provider issued for other \
                 applications: set `audience`. If the provider's access tokens have no audience, set \
                 `required_scopes` or `required_claims`"
                    .to_owned(),
            );
        }
    }

    fn check_holders(&self, problems: &mut Vec<String>) {
        match self.kind {
            Kind::Service if self.has_only_mappings() => {}
            Kind::Service => problems.extend(
                self.grant()
                    .problem()
                    .map(|problem| format!("the settings for services of this issuer: {problem}")),
            ),
            Kind::User => {
                let granted =
                    !self.roles.is_empty() || self.users.is_some() || self.key_names.is_some();
                if granted {
                    problems.push(
                        "the issuer's access tokens are for users, who have no role and can release only their own keys: \
                         remove `roles`, `users` and `key_names`, or set `kind = \"service\"`"
                            .to_owned(),
                    );
                }
            }
        }
        self.check_attributes(problems);
    }

    /// Whether services get roles only from mappings.
    fn has_only_mappings(&self) -> bool {
        let grants = !self.roles.is_empty() || self.users.is_some() || self.key_names.is_some();
        !self.mappings.is_empty() && !grants
    }

    fn check_mappings(&self, problems: &mut Vec<String>) {
        if self.mapping_required && self.mappings.is_empty() {
            problems.push(
                "`mapping_required` is true, but there is no [[issuer.mapping]], so every access token would be refused"
                    .to_owned(),
            );
        }
        if self.mapping_required && !self.roles.is_empty() {
            problems.push(
                "`mapping_required` is true, so `roles` of the issuer has no effect: remove one of the two settings"
                    .to_owned(),
            );
        }
        problems.extend(mapping::problems(&self.mappings));
    }

    /// A person who gets the identifier of another person could obtain the keys of that person.
    fn check_subject(&self, problems: &mut Vec<String>) {
        problems.extend(self.subject_claim.problem());
        if let Some(name) = self.subject_claim.only()
            && REASSIGNED.contains(&name)
        {
            problems.push(format!(
                "`subject_claim` is {name:?}, which the provider may change or assign to another person, who could then \
                 obtain the keys of the first person: use a claim with a permanent identifier, such as `sub`, `oid` (Entra \
                 ID) or `uid` (Okta)"
            ));
        }
    }

    fn check_attributes(&self, problems: &mut Vec<String>) {
        let mut taken = HashSet::new();
        for (claim, name) in &self.attributes {
            if KeyName::parse(name).is_err() || name == "san" {
                problems.push(format!(
                    "`attributes` gives the claim {claim:?} the name {name:?}; a name must be 1 to 64 bytes of [a-z0-9._-] and must not be `san`"
                ));
            }
            if !taken.insert(name) {
                problems.push(format!("`attributes` uses the name {name:?} twice"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Algorithm, Subject};
    use super::*;

    const PLAIN: &str = r#"
name = "sso"
issuer = "https://login.example.org"
audience = ["keybroker"]
"#;

    fn parse(text: &str) -> Settings {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn discovery_is_below_the_issuer() {
        for issuer in ["https://login.example.org", "https://login.example.org/"] {
            let settings = parse(&PLAIN.replace("https://login.example.org", issuer));
            assert_eq!(settings.problems(), Vec::<String>::new());
            assert_eq!(
                settings.key_source(),
                KeySource::Discovery(
                    "https://login.example.org/.well-known/openid-configuration".to_owned()
                )
            );
        }
    }

    #[test]
    fn a_profile_fills_in_what_is_not_written() {
        let text =
            "name = \"vault\"\nissuer = \"https://id.example.org\"\nprofile = \"bitwarden\"\n";
        let settings = parse(text);
        assert_eq!(settings.problems(), Vec::<String>::new());
        assert_eq!(settings.subject, Subject::Guid);
        assert_eq!(settings.algorithms, [Algorithm::RS256].into());
        assert!(settings.required_scopes.contains("api"));
        assert!(settings.required_claims["amr"].contains("external"));
        assert_eq!(settings.device_claim.as_deref(), Some("device"));
        let other = parse(&format!(
            "{text}required_scopes = [\"keys\"]\nsubject = \"text\"\n"
        ));
        assert_eq!(other.required_scopes, ["keys".to_owned()].into());
        assert_eq!(other.subject, Subject::Text);
        // The serialised settings can be read again.
        let shown = toml::to_string(&settings).unwrap();
        assert_eq!(parse(&shown), settings);
    }

    #[test]
    fn symmetric_algorithms_and_unknown_fields_do_not_parse() {
        for bad in [
            "algorithms = [\"HS256\"]",
            "algorithms = [\"none\"]",
            "algorithm = [\"RS256\"]",
        ] {
            assert!(toml::from_str::<Settings>(&format!("{PLAIN}{bad}\n")).is_err());
        }
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table")]
    fn each_mistake_has_its_message() {
        for (good, bad, words) in [
            ("name = \"sso\"", "name = \"a:b\"", "`name`"),
            ("https://login.example.org", "", "`issuer`"),
            ("https:", "http:", "allow_http"),
            (
                "https://login.example.org",
                "https://vault.example|login",
                "is not a URL",
            ),
            ("https://", "https://user:secret@", "password"),
            ("audience = [\"keybroker\"]", "", "other applications"),
            (
                "audience",
                "algorithms = []\naudience",
                "no access token could be verified",
            ),
            (
                "audience",
                "jwks_url = \"https://x\"\npem_file = \"/x\"\naudience",
                "at most one",
            ),
            (
                "audience",
                "jwks_url = \"http://x\"\naudience",
                "`jwks_url`",
            ),
            ("audience", "pem_file = \"x\"\naudience", "absolute path"),
            (
                "audience",
                "pem_file = \"/x\"\nca_file = \"/x\"\naudience",
                "would have no effect",
            ),
            ("audience", "leeway_s = 301\naudience", "0 to 300"),
            ("audience", "refresh_minutes = 0\naudience", "1 to 1440"),
            (
                "audience",
                "token_lifetime_max_minutes = 43201\naudience",
                "1 to 43200",
            ),
            (
                "audience",
                "keep_hours = 1\nrefresh_minutes = 61\naudience",
                "out of date",
            ),
            (
                "audience",
                "roles = [\"enrol\"]\naudience",
                "access tokens are for users",
            ),
            ("audience", "kind = \"service\"\naudience", "has no role"),
            (
                "audience",
                "kind = \"service\"\nroles = [\"release\"]\naudience",
                "`users`",
            ),
            (
                "audience",
                "attributes = { a = \"x\", b = \"x\" }\naudience",
                "twice",
            ),
            (
                "audience",
                "attributes = { a = \"X\" }\naudience",
                "[a-z0-9._-]",
            ),
        ] {
            let problems = parse(&PLAIN.replacen(good, bad, 1)).problems();
            assert!(
                problems.iter().any(|problem| problem.contains(words)),
                "{bad:?}: {problems:?}"
            );
        }
    }

    #[test]
    fn issuers_do_not_stand_in_for_each_other() {
        let one = parse(PLAIN);
        let other = Settings {
            name: "other".to_owned(),
            issuer: "https://other.example.org".to_owned(),
            ..one.clone()
        };
        let told = |issuers: &[Settings]| problems(issuers).join("\n");
        assert!(told(&[one.clone(), one.clone()]).contains("configured twice"));
        assert!(told(&[one.clone(), other.clone()]).contains("both identify"));
        let shared = [&one, &other].map(|issuer| Settings {
            shared_users: true,
            ..issuer.clone()
        });
        assert_eq!(told(&shared), "");
    }
}
