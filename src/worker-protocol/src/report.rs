//! The report about a token, which `keybroker token report` publishes. A worker creates the report,
//! and the command displays and compares it.

use serde::{Deserialize, Serialize};

/// Version of the report's format.
pub const FORMAT: u32 = 1;

/// Name of the test that shows whether the test keys were removed from the token.
pub const REMOVED: &str = "removed";

/// The complete report, which contains no PIN, no key and no label.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The version of the format: [`FORMAT`].
    pub format: u32,
    /// Version of the program that made the report.
    pub keybroker: String,
    /// The conclusion about the token.
    pub verdict: Verdict,
    /// Module and token.
    pub identity: Identity,
    /// Tests of sessions and login.
    pub sessions: Vec<Answer>,
    /// The attributes of the key templates.
    pub templates: Vec<Attribute>,
    /// Tests of functions that must work.
    pub positive: Vec<Answer>,
    /// Tests of functions that must not work.
    pub negative: Vec<NegativeAnswer>,
    /// Whether the token can do sealed releases. Absent in reports of earlier releases, and if the token lacks an
    /// operation that every release needs.
    #[serde(default)]
    pub sealed: Option<SealedRelease>,
    /// The token's answers to invalid input.
    pub errors: Vec<Answer>,
    /// Tests with keys that stay on the token. Empty without `--write`.
    pub token_objects: Vec<Answer>,
    /// The measured rates. The comparison with an earlier report ignores the rates, because other
    /// work of the machine may have affected the measurement.
    pub rates: Vec<Rate>,
    /// Whether the token's work uses CPU time of this machine; absent if the CPU time could not be
    /// measured.
    pub token_cpu_is_local: Option<bool>,
}

/// The conclusion about the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The overall result.
    pub result: Outcome,
    /// The reasons why the token cannot be used or, if the token can be used with attribute
    /// exceptions, the risk of each exception.
    pub reasons: Vec<String>,
    /// The attributes to list in `token.attribute_exceptions`.
    pub attribute_exceptions: Vec<String>,
    /// Whether RSA-OAEP works only with SHA-1 on this token.
    pub allow_oaep_sha1: bool,
    /// Lines for the section `[token]`; empty if the token cannot be used.
    pub settings: Vec<String>,
}

/// The results of a report, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The token works without exceptions.
    Works,
    /// The token works with the exceptions that the verdict lists.
    WorksWithExceptions,
    /// The token cannot be used.
    Refused,
}

/// Module and token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Path of the module.
    pub module: String,
    /// SHA-256 of the module's file, in hexadecimal.
    pub module_sha256: String,
    /// Length of the module's file, in bytes.
    pub module_bytes: u64,
    /// Version of PKCS#11 that the module implements.
    pub cryptoki_version: String,
    /// Manufacturer, description and version of the module.
    pub library: String,
    /// Manufacturer of the token.
    pub manufacturer: String,
    /// Model of the token.
    pub model: String,
    /// Version of the hardware.
    pub hardware_version: String,
    /// Version of the firmware.
    pub firmware_version: String,
    /// Serial number, if the user requested it.
    pub serial: Option<String>,
    /// Whether the token has a serial number. The report contains no digest of the serial number,
    /// because reports are published and a short number could be guessed from its digest.
    pub has_serial: bool,
    /// Whether another token of the module has the same label.
    pub label_is_shared: bool,
    /// Whether the text fields of the token are padded with NUL instead of blanks.
    pub padded_with_nul: bool,
    /// The state of the token's clock: `none`, `valid`, or the text that the token returns instead
    /// of a valid time.
    pub clock: String,
    /// Flags of the token, in hexadecimal.
    pub flags: String,
    /// Length of the shortest and of the longest PIN, in bytes.
    pub pin_bytes: [u64; 2],
    /// Largest numbers of sessions and of read-write sessions according to the token. The value 0
    /// means that there is no limit. The value is absent if the token reports no number.
    pub sessions_max: [Option<u64>; 2],
}

/// A test with its result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The name of the test.
    pub name: String,
    /// The result: `works`, a return code, or a description of the problem.
    pub result: String,
}

/// An attribute of a key template, with the token's answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    /// The object: `RSA private key` or `integrity key`.
    pub object: String,
    /// The attribute's name in the PKCS#11 standard.
    pub attribute: String,
    /// The token's answer to the attribute in a template: `accepted`, `ignored`, or a return code.
    pub in_template: String,
    /// The value that the token returns for the attribute.
    pub read: String,
    /// The token's answer to a query for the attribute's length.
    pub length_query: String,
}

/// The result of a test of a function that must not work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NegativeAnswer {
    /// Name of the test.
    pub name: String,
    /// The consequence for the broker if the token performs the function.
    pub meaning: String,
    /// The result: `refused`, `SUCCEEDED`, `not made` or `not answered`.
    pub result: String,
    /// The return code, if any.
    pub code: Option<String>,
    /// Whether the session of the test was usable after the test.
    pub session_is_usable: bool,
}

/// The results of the tests of sealed release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedRelease {
    /// The conclusion.
    pub result: Sealing,
    /// The reason why sealed release is unavailable; otherwise absent.
    pub reason: Option<String>,
    /// Tests of functions that sealed release needs.
    pub positive: Vec<Answer>,
    /// Attempts to read a user key, to wrap it for another recipient, or to make it readable. Each result is `refused`
    /// with the return code, if any, [`SUCCEEDED`], or `not answered`.
    pub forbidden: Vec<Answer>,
}

/// The protection of a user key during a sealed release, from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sealing {
    /// The token makes no readable object with a sealed wrapping key.
    Enforced,
    /// The worker requests an object that is not readable, but the token would also make a readable object.
    Worker,
    /// The token cannot do a sealed release.
    Unavailable,
}

impl Sealing {
    /// Returns the name of the result for the report.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Enforced => "enforced",
            Self::Worker => "worker",
            Self::Unavailable => "unavailable",
        }
    }
}

/// The result of a negative test if the token performed a function that the token must refuse.
pub const SUCCEEDED: &str = "SUCCEEDED";
/// The result of a positive test if the function works.
pub const WORKS: &str = "works";

/// A measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// The name of the measured operation.
    pub name: String,
    /// The value, in operations per second or in milliseconds; the name contains the unit.
    pub value: f64,
}

impl Report {
    /// Lists the results of this report that are worse than in the earlier report `expected` about
    /// the same token. Improvements are not listed. The list is empty if the earlier report refused
    /// the token.
    pub fn worse_than(&self, expected: &Self) -> Vec<String> {
        let mut worse = Vec::new();
        let (now, then) = (&self.verdict, &expected.verdict);
        if then.result == Outcome::Refused {
            return worse;
        }
        if now.result > then.result {
            worse.push(format!(
                "the verdict is {}: {}",
                now.result.as_str(),
                now.reasons.join("; ")
            ));
        }
        for exception in &now.attribute_exceptions {
            if !then.attribute_exceptions.contains(exception) {
                worse.push(format!("the exception {exception} is necessary"));
            }
        }
        if now.allow_oaep_sha1 && !then.allow_oaep_sha1 {
            worse.push("OAEP works only with SHA-1".to_owned());
        }
        let mut compared = vec![(&self.positive, &expected.positive)];
        // A report that was made without `--write` lacks the tests that create keys on the token.
        if !self.token_objects.is_empty() {
            compared.push((&self.token_objects, &expected.token_objects));
        }
        if let (Some(now), Some(then)) = (&self.sealed, &expected.sealed) {
            compared.push((&now.positive, &then.positive));
        }
        for (now, then) in compared {
            for answer in then.iter().filter(|answer| answer.result == WORKS) {
                let found = now.iter().find(|now| now.name == answer.name);
                let result = found.map_or("missing", |now| now.result.as_str());
                if result != WORKS {
                    worse.push(format!(
                        "{}: worked before; the result is now {result}",
                        answer.name
                    ));
                }
            }
        }
        for then in expected
            .negative
            .iter()
            .filter(|test| test.result != SUCCEEDED)
        {
            let found = self.negative.iter().find(|now| now.name == then.name);
            match found.map(|now| now.result.as_str()) {
                Some(result) if result == then.result || result == "refused" => {}
                result => worse.push(format!(
                    "negative test {}: {} before, {} now",
                    then.name,
                    then.result,
                    result.unwrap_or("missing")
                )),
            }
        }
        for now in self.negative.iter().filter(|test| test.result == SUCCEEDED) {
            if !expected.negative.iter().any(|then| then.name == now.name) {
                worse.push(format!("negative test {}: {}", now.name, now.meaning));
            }
        }
        worse.extend(self.refused_templates(expected));
        worse.extend(self.worse_sealing(expected));
        worse
    }

    /// Describes the protection of sealed releases if it is worse than for `expected`.
    fn worse_sealing(&self, expected: &Self) -> Option<String> {
        let then = expected.sealed.as_ref()?.result;
        let now = self
            .sealed
            .as_ref()
            .map_or(Sealing::Unavailable, |sealed| sealed.result);
        (now > then).then(|| {
            format!(
                "sealed release: {} before, {} now",
                then.as_str(),
                now.as_str()
            )
        })
    }

    /// Lists the attributes that the token accepted in a template for `expected`, and that it no longer accepts.
    fn refused_templates(&self, expected: &Self) -> Vec<String> {
        let mut worse = Vec::new();
        for then in &expected.templates {
            let found = self
                .templates
                .iter()
                .find(|now| (&now.object, &now.attribute) == (&then.object, &then.attribute));
            let result = found.map_or("missing", |now| now.in_template.as_str());
            if then.in_template == "accepted" && result != "accepted" {
                worse.push(format!(
                    "{} in the template of the {}: accepted before; the result is now {result}",
                    then.attribute, then.object
                ));
            }
        }
        worse
    }
}

impl Outcome {
    /// Returns the name of the result for the report.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Works => "works",
            Self::WorksWithExceptions => "works with exceptions",
            Self::Refused => "refused",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let answer = |name: &str, result: &str| Answer {
            name: name.to_owned(),
            result: result.to_owned(),
        };
        Report {
            format: FORMAT,
            keybroker: "0".to_owned(),
            verdict: Verdict {
                result: Outcome::Works,
                reasons: Vec::new(),
                attribute_exceptions: Vec::new(),
                allow_oaep_sha1: false,
                settings: Vec::new(),
            },
            identity: Identity {
                module: String::new(),
                module_sha256: String::new(),
                module_bytes: 0,
                cryptoki_version: String::new(),
                library: String::new(),
                manufacturer: String::new(),
                model: String::new(),
                hardware_version: String::new(),
                firmware_version: String::new(),
                serial: None,
                has_serial: true,
                label_is_shared: false,
                padded_with_nul: false,
                clock: String::new(),
                flags: String::new(),
                pin_bytes: [4, 8],
                sessions_max: [None, None],
            },
            sessions: Vec::new(),
            templates: vec![Attribute {
                object: "integrity key".to_owned(),
                attribute: "CKA_COPYABLE".to_owned(),
                in_template: "accepted".to_owned(),
                read: "as asked".to_owned(),
                length_query: WORKS.to_owned(),
            }],
            positive: vec![answer("C_Verify", WORKS)],
            negative: vec![NegativeAnswer {
                name: "sign".to_owned(),
                meaning: "it signs".to_owned(),
                result: "refused".to_owned(),
                code: None,
                session_is_usable: true,
            }],
            sealed: Some(SealedRelease {
                result: Sealing::Enforced,
                reason: None,
                positive: vec![answer("a sealed wrapping key", WORKS)],
                forbidden: Vec::new(),
            }),
            errors: Vec::new(),
            token_objects: vec![answer("found by another session", WORKS)],
            rates: Vec::new(),
            token_cpu_is_local: None,
        }
    }

    #[test]
    fn a_report_of_an_earlier_release_can_be_read() {
        let mut value = serde_json::to_value(report()).unwrap();
        value.as_object_mut().unwrap().remove("sealed").unwrap();
        let earlier: Report = serde_json::from_value(value).unwrap();
        assert_eq!(earlier.sealed, None);
        assert_eq!(report().worse_than(&earlier), Vec::<String>::new());
    }

    /// Each result that became worse is listed once. A result that became better is not listed.
    #[test]
    fn only_what_is_worse_is_named() {
        type Change = (&'static str, fn(&mut Report));
        let changes: [Change; 11] = [
            ("verdict", |report| {
                report.verdict.result = Outcome::Refused;
            }),
            ("exception", |report| {
                report.verdict.attribute_exceptions = vec!["CKA_COPYABLE".to_owned()];
            }),
            ("SHA-1", |report| report.verdict.allow_oaep_sha1 = true),
            ("C_Verify", |report| {
                report.positive[0].result = "CKR_X".to_owned();
            }),
            ("missing", |report| report.positive.clear()),
            ("negative test sign", |report| {
                report.negative[0].result = SUCCEEDED.to_owned();
            }),
            ("CKA_COPYABLE in the template", |report| {
                report.templates[0].in_template = "ignored".to_owned();
            }),
            ("another session", |report| {
                report.token_objects[0].result = "CKR_X".to_owned();
            }),
            ("enforced before, worker now", |report| {
                report.sealed.as_mut().unwrap().result = Sealing::Worker;
            }),
            ("enforced before, unavailable now", |report| {
                report.sealed = None;
            }),
            ("a sealed wrapping key", |report| {
                report.sealed.as_mut().unwrap().positive.clear();
            }),
        ];
        assert_eq!(report().worse_than(&report()), Vec::<String>::new());
        let mut refused = report();
        refused.verdict.result = Outcome::Refused;
        refused.negative[0].result = SUCCEEDED.to_owned();
        assert_eq!(refused.worse_than(&refused), Vec::<String>::new());
        for (word, change) in changes {
            let mut changed = report();
            change(&mut changed);
            let worse = changed.worse_than(&report());
            assert_eq!(worse.len(), 1, "{word}: {worse:?}");
            assert!(worse[0].contains(word), "{word}: {worse:?}");
            assert_eq!(
                report().worse_than(&changed),
                Vec::<String>::new(),
                "{word}"
            );
        }
    }
}
