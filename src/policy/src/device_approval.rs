//! Decides which requests of new devices of a Bitwarden organisation are approved without a person. A request that no policy
//! permits, or that a policy forbids, waits for a person. No policy denies a request for good.

use std::{net::IpAddr, path::Path, str::FromStr as _, sync::LazyLock};

use cedar_policy::{
    AuthorizationError, Authorizer, Context, Decision, Entities, EntityId, EntityTypeName,
    EntityUid, PolicyId, PolicySet, Request, RestrictedExpression as Value, Schema, ValidationMode,
    Validator, ffi::DetailedError,
};

use keybroker_core::{
    call::Timestamp,
    error::chain,
    organization::Guid,
    trusted_file::{self, Purpose},
};

use super::{
    DEFAULT_DENY, UNASKED,
    error::Error,
    files::FILE_BYTES_MAX,
    problem::{Problem, Problems, Source},
    shape,
    vocabulary::{age_seconds, datetime, text, texts},
};

const SCHEMA: &str = include_str!("device_approval.cedarschema");
const POLICY: Purpose =
    Purpose::trust("other users could decide which devices receive the keys of members");
/// Largest number of policies in the file.
const POLICIES_MAX: usize = 100;
const ID_ANNOTATION: &str = "id";

static VOCABULARY: LazyLock<Schema> = LazyLock::new(|| {
    let (schema, _) =
        Schema::from_cedarschema_str(SCHEMA).expect("the shipped schema is valid: a test loads it");
    schema
});

/// A request of a new device, and what is known about it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceRequest<'a> {
    /// The organisation.
    pub organization: Guid,
    /// The member.
    pub member: Guid,
    /// The e-mail address of the member.
    pub email: &'a str,
    /// The identifier of the device.
    pub device: &'a str,
    /// The kind of device.
    pub device_type: &'a str,
    /// The address from which the request came.
    pub address: Option<IpAddr>,
    /// The country of the address.
    pub country: Option<&'a str>,
    /// The configured networks to which the address belongs.
    pub networks: &'a [String],
    /// Whether the inventory lists the device for the member.
    pub is_in_inventory: bool,
    /// When the member's wrapped key was pinned.
    pub key_pinned: Timestamp,
    /// Number of pending requests of the member.
    pub pending_of_member: u32,
    /// When the request was made.
    pub created: Timestamp,
    /// The time of the decision.
    pub at: Timestamp,
}

/// The decision about a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceVerdict {
    /// Whether the request is approved. Otherwise, it waits for a person.
    pub approves: bool,
    /// The id of the policy that decided, or `default-deny`.
    pub policy: String,
    /// The policies that could not be evaluated, each with the error.
    pub errors: Vec<(String, String)>,
}

/// The policies of one file.
#[derive(Clone, Debug)]
pub struct DeviceApprovalPolicy {
    policies: PolicySet,
}

impl DeviceApprovalPolicy {
    /// Reads and validates a file.
    pub fn load(path: &Path) -> Result<Self, Problems> {
        let name = path.display().to_string();
        let bytes = trusted_file::read(path, FILE_BYTES_MAX, POLICY)
            .map_err(|error| Problem::of(error.to_string()))?;
        let text = std::str::from_utf8(&bytes)
            .map_err(|_| Problem::in_file(&name, "the file is not UTF-8; save it as UTF-8"))?;
        Self::parse(&Source {
            name,
            text: text.to_owned(),
        })
    }

    fn parse(source: &Source) -> Result<Self, Problems> {
        if let Some((_, what)) = shape::problem(&source.text) {
            return Err(Problem::in_file(&source.name, what).into());
        }
        let policies = PolicySet::from_str(&source.text).map_err(|errors| {
            let each = errors
                .iter()
                .map(|error| Problem::from_cedar(source, &error.into()));
            Problems(each.collect())
        })?;
        if policies.num_of_templates() > 0 {
            let what =
                "the file has a template (`?principal`, `?resource`), which is not supported";
            return Err(Problem::in_file(&source.name, what).into());
        }
        if policies.num_of_policies() > POLICIES_MAX {
            let what = format!("the file has more than {POLICIES_MAX} policies");
            return Err(Problem::in_file(&source.name, what).into());
        }
        let validated =
            Validator::new(VOCABULARY.clone()).validate(&policies, ValidationMode::Strict);
        let errors = validated.validation_errors().map(DetailedError::from);
        // A policy that can never apply would not be noticed, so Cedar's warnings count as problems.
        let warnings = validated.validation_warnings().map(DetailedError::from);
        let problems: Vec<Problem> = errors
            .chain(warnings)
            .map(|error| Problem::from_cedar(source, &error))
            .collect();
        if problems.is_empty() {
            Ok(Self { policies })
        } else {
            Err(Problems(problems))
        }
    }

    /// Decides about a request. An error in a permit policy permits nothing. A forbid policy that cannot be evaluated makes the
    /// request wait.
    pub fn decide(&self, request: &DeviceRequest<'_>) -> DeviceVerdict {
        match asked(request) {
            Ok(asked) => self.answer(&asked),
            Err(error) => DeviceVerdict {
                approves: false,
                policy: UNASKED.to_owned(),
                errors: vec![(UNASKED.to_owned(), chain(&error))],
            },
        }
    }

    fn answer(&self, asked: &Request) -> DeviceVerdict {
        let response = Authorizer::new().is_authorized(asked, &self.policies, &Entities::empty());
        let errors: Vec<(&PolicyId, String)> = response
            .diagnostics()
            .errors()
            .map(|AuthorizationError::PolicyEvaluationError(error)| {
                (error.policy_id(), error.inner().to_string())
            })
            .collect();
        let broken = errors
            .iter()
            .map(|(id, _)| *id)
            .find(|id| self.policies.policy(id).is_none_or(is_forbid));
        let mut deciding: Vec<String> = response
            .diagnostics()
            .reason()
            .map(|id| self.name(id))
            .collect();
        deciding.sort();
        let policy = match broken {
            Some(id) => self.name(id),
            None => deciding
                .into_iter()
                .next()
                .unwrap_or_else(|| DEFAULT_DENY.to_owned()),
        };
        DeviceVerdict {
            approves: response.decision() == Decision::Allow && broken.is_none(),
            policy,
            errors: errors
                .into_iter()
                .map(|(id, error)| (self.name(id), error))
                .collect(),
        }
    }

    /// The annotation `@id` of a policy, or its position in the file.
    fn name(&self, id: &PolicyId) -> String {
        let annotated = self.policies.annotation(id, ID_ANNOTATION);
        annotated.map_or_else(|| id.to_string(), str::to_owned)
    }
}

fn is_forbid(policy: &cedar_policy::Policy) -> bool {
    policy.effect() == cedar_policy::Effect::Forbid
}

fn asked(request: &DeviceRequest<'_>) -> Result<Request, Error> {
    let uid = |kind: &str, id: &str| {
        let kind = EntityTypeName::from_str(&format!("Bitwarden::{kind}"))
            .expect("an identifier is a name");
        EntityUid::from_type_name_and_id(kind, EntityId::new(id))
    };
    Request::new(
        uid("Member", &request.member.to_string()),
        uid("Action", "approve_device"),
        uid("Organization", &request.organization.to_string()),
        context(request)?,
        Some(&VOCABULARY),
    )
    .map_err(Error::on("create the Cedar request"))
}

fn context(request: &DeviceRequest<'_>) -> Result<Context, Error> {
    let long = |seconds| Value::new_long(seconds);
    let mut pairs = vec![
        ("email", text(request.email)),
        ("device", text(request.device)),
        ("deviceType", text(request.device_type)),
        ("networks", texts(request.networks)),
        ("inInventory", Value::new_bool(request.is_in_inventory)),
        (
            "keyAgeSeconds",
            long(age_seconds(request.at, request.key_pinned)),
        ),
        ("pendingOfMember", long(request.pending_of_member.into())),
        ("ageSeconds", long(age_seconds(request.at, request.created))),
        ("time", Value::new_datetime(datetime(request.at))),
        ("weekday", text(weekday(request.at))),
    ];
    if let Some(address) = request.address {
        let address = address.to_canonical().to_string();
        pairs.push(("address", Value::new_ip(address)));
    }
    if let Some(country) = request.country {
        pairs.push(("country", text(country)));
    }
    let pairs = pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value));
    Context::from_pairs(pairs).map_err(Error::on("describe the request"))
}

fn weekday(at: Timestamp) -> &'static str {
    const DAYS: [&str; 7] = [
        "thursday",
        "friday",
        "saturday",
        "sunday",
        "monday",
        "tuesday",
        "wednesday",
    ];
    // 1 January 1970 was a Thursday.
    let days = at.micros().div_euclid(24 * 3_600 * 1_000_000);
    DAYS[usize::try_from(days.rem_euclid(7)).expect("0 to 6")]
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../docs/bitwarden-approvals/automatic.cedar");
    /// Wednesday, 2 December 2026, 10:00 UTC.
    const NOW: i64 = 1_796_205_600;
    const DAY: i64 = 24 * 3_600;

    fn policy(text: &str) -> Result<DeviceApprovalPolicy, Problems> {
        DeviceApprovalPolicy::parse(&Source {
            name: "automatic.cedar".to_owned(),
            text: text.to_owned(),
        })
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_micros(seconds * 1_000_000)
    }

    fn request(networks: &[String]) -> DeviceRequest<'_> {
        DeviceRequest {
            organization: Guid::from_bytes([1; 16]),
            member: Guid::from_bytes([2; 16]),
            email: "ada@example.org",
            device: "f1",
            device_type: "Chrome",
            address: Some(IpAddr::from([192, 0, 2, 7])),
            country: None,
            networks,
            is_in_inventory: true,
            key_pinned: at(NOW - 30 * DAY),
            pending_of_member: 1,
            created: at(NOW - 60),
            at: at(NOW),
        }
    }

    #[test]
    fn days_of_the_week() {
        for (seconds, day) in [
            (0, "thursday"),
            (-1, "wednesday"),
            (NOW, "wednesday"),
            (NOW + 3 * DAY, "saturday"),
        ] {
            assert_eq!(weekday(at(seconds)), day);
        }
    }

    /// Each condition of the example alone makes the request wait.
    #[test]
    fn the_example_approves_only_if_all_its_conditions_hold() {
        let policy = policy(EXAMPLE).unwrap();
        let office = ["office".to_owned()];
        let good = request(&office);
        let verdict = policy.decide(&good);
        assert!(verdict.approves, "{verdict:?}");
        assert_eq!(verdict.policy, "known-device-in-the-office");
        for waits in [
            DeviceRequest {
                networks: &[],
                ..good
            },
            DeviceRequest {
                is_in_inventory: false,
                ..good
            },
            DeviceRequest {
                key_pinned: at(NOW),
                ..good
            },
            DeviceRequest {
                pending_of_member: 2,
                ..good
            },
            DeviceRequest {
                at: at(NOW + 3 * DAY),
                ..good
            },
            DeviceRequest {
                at: at(NOW + DAY / 2),
                ..good
            },
        ] {
            let verdict = policy.decide(&waits);
            assert!(!verdict.approves, "{waits:?}");
            assert_eq!(verdict.errors, []);
        }
    }

    #[test]
    fn a_forbid_that_fails_makes_the_request_wait() {
        let text = "permit (principal, action, resource);
            @id(\"broken\") forbid (principal, action, resource)
            when { context.ageSeconds + 9223372036854775807 > 0 };";
        let verdict = policy(text).unwrap().decide(&request(&[]));
        assert!(!verdict.approves);
        assert_eq!(verdict.policy, "broken");
        assert_eq!(verdict.errors.len(), 1);
        let text = "permit (principal, action, resource) when { context has country };";
        let verdict = policy(text).unwrap().decide(&request(&[]));
        assert_eq!((verdict.approves, &*verdict.policy), (false, DEFAULT_DENY));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("permit (principal, action, resource)", "unexpected"),
            (
                "permit (principal, action, resource) when { context.colour == 1 };",
                "colour",
            ),
            (
                "permit (principal, action, resource) when { context.country == \"x\" };",
                "country",
            ),
            (
                "permit (principal == ?principal, action, resource);",
                "template",
            ),
            (
                "permit (principal, action == Action::\"user_key.unwrap\", resource);",
                "user_key.unwrap",
            ),
        ] {
            let problems = policy(text).unwrap_err().to_string();
            assert!(problems.contains(word), "{text}: {problems}");
        }
        let missing = DeviceApprovalPolicy::load(Path::new("/nonexistent/automatic.cedar"));
        assert!(missing.unwrap_err().to_string().contains("automatic.cedar"));
    }
}
