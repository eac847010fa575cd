//! Describes an example principal for `keybroker policy explain`. The description combines an entry
//! of the configuration, a file and options. Options take precedence over the file, and the file
//! takes precedence over the configuration.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use clap::Args;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use keybroker_auth as auth;
use keybroker_core::{
    call::Timestamp,
    key::{KeyName, Tenant, UserId},
    principal::{Claims, Credential, Grant, Identity, Kind, Reach, Role},
};

use super::super::{
    Context,
    exit::{Exit, Failure},
};

/// Options that describe the principal, the address and the time of a request.
#[derive(Args, Debug)]
pub(super) struct Who {
    /// Describe the `[[principal]]` that has this `san` in the configuration; the other options
    /// override its values
    #[arg(long, value_name = "SAN")]
    principal: Option<String>,
    /// JSON file that describes a principal; the names of its fields are the names of the options,
    /// in the plural for options that may be repeated
    #[arg(long, value_name = "FILE")]
    principal_file: Option<PathBuf>,
    /// Kind of principal: "user" or "service" [default: "user" with --subject, otherwise "service"]
    #[arg(long, value_parser = word::<Kind>)]
    kind: Option<Kind>,
    /// Name of the principal, as in the audit log
    #[arg(long)]
    name: Option<String>,
    /// Tenant whose records the principal can reach
    #[arg(long)]
    tenant: Option<Tenant>,
    /// Role of a service; may be repeated
    #[arg(long = "role", value_parser = word::<Role>)]
    roles: Vec<Role>,
    /// User whose keys the service may release; may be repeated [default: all users]
    #[arg(long = "release-user", value_name = "USER")]
    users: Vec<String>,
    /// Name of a key that the service may release; may be repeated [default: all key names]
    #[arg(long = "release-key-name", value_name = "KEY_NAME")]
    key_names: Vec<String>,
    /// Subject of the user; the user's own keys are the keys whose user id is this subject
    #[arg(long)]
    subject: Option<String>,
    /// Name of the `[[issuer.mapping]]` that gives the principal its roles
    #[arg(long)]
    mapping: Option<String>,
    /// Authentication method of the user (`amr`), such as `mfa`; may be repeated
    #[arg(long)]
    amr: Vec<String>,
    /// Authentication context class of the user (`acr`)
    #[arg(long)]
    acr: Option<String>,
    /// Seconds since the user authenticated
    #[arg(long, value_name = "SECONDS")]
    auth_age_seconds: Option<u32>,
    /// Device identifier in the user's credential
    #[arg(long)]
    device: Option<String>,
    /// Organisation of the user; may be repeated
    #[arg(long = "organisation")]
    organisations: Vec<String>,
    /// Attribute of the principal that the setting `attributes` of an `[[issuer]]` derives from a
    /// claim; may be repeated
    #[arg(long = "attribute", value_name = "NAME=VALUE")]
    attributes: Vec<String>,
    /// IP address of the caller [default: 127.0.0.1]
    #[arg(long)]
    peer: Option<IpAddr>,
    /// Name of the network of the caller [default: the `[[network]]` that contains --peer]
    #[arg(long, value_name = "NETWORK")]
    place: Option<String>,
    /// Time of the call, such as 2026-11-21T23:00:00Z [default: now]
    #[arg(long)]
    time: Option<String>,
}

/// A description of a principal. A field that is `None` gets its default.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Description {
    kind: Option<Kind>,
    name: Option<String>,
    tenant: Option<Tenant>,
    roles: Option<BTreeSet<Role>>,
    release_users: Option<Reach<UserId>>,
    release_key_names: Option<Reach<KeyName>>,
    subject: Option<String>,
    mapping: Option<String>,
    amr: Option<BTreeSet<String>>,
    acr: Option<String>,
    auth_age_seconds: Option<u32>,
    device: Option<String>,
    organisations: Option<BTreeSet<String>>,
    attributes: Option<BTreeMap<String, BTreeSet<String>>>,
    peer: Option<IpAddr>,
    place: Option<String>,
    time: Option<String>,
}

/// A principal, with the address and the time of the request.
#[derive(Debug)]
pub(super) struct Described {
    pub(super) identity: Identity,
    pub(super) peer: IpAddr,
    /// The place of the address, if it is described.
    pub(super) place: Option<String>,
    pub(super) at: Timestamp,
}

impl Who {
    pub(super) fn describe(&self, context: &Context) -> Result<Described, Failure> {
        let mut description = Description::default();
        if let Some(san) = &self.principal {
            description = description.and(from_configuration(san, context)?);
        }
        if let Some(path) = &self.principal_file {
            description = description.and(from_file(path)?);
        }
        description.and(self.options()?).finish()
    }

    fn options(&self) -> Result<Description, Failure> {
        let mut attributes = BTreeMap::<String, BTreeSet<String>>::new();
        for attribute in &self.attributes {
            let (name, value) = attribute
                .split_once('=')
                .ok_or_else(|| usage(format!("--attribute {attribute:?} is not NAME=VALUE")))?;
            attributes
                .entry(name.to_owned())
                .or_default()
                .insert(value.to_owned());
        }
        Ok(Description {
            kind: self.kind,
            name: self.name.clone(),
            tenant: self.tenant.clone(),
            roles: some(&self.roles),
            release_users: reach(&self.users)?,
            release_key_names: reach(&self.key_names)?,
            subject: self.subject.clone(),
            mapping: self.mapping.clone(),
            amr: some(&self.amr),
            acr: self.acr.clone(),
            auth_age_seconds: self.auth_age_seconds,
            device: self.device.clone(),
            organisations: some(&self.organisations),
            attributes: (!attributes.is_empty()).then_some(attributes),
            peer: self.peer,
            place: self.place.clone(),
            time: self.time.clone(),
        })
    }
}

impl Description {
    /// Merges two descriptions. The fields of `more` take precedence.
    fn and(self, more: Self) -> Self {
        Self {
            kind: more.kind.or(self.kind),
            name: more.name.or(self.name),
            tenant: more.tenant.or(self.tenant),
            roles: more.roles.or(self.roles),
            release_users: more.release_users.or(self.release_users),
            release_key_names: more.release_key_names.or(self.release_key_names),
            subject: more.subject.or(self.subject),
            mapping: more.mapping.or(self.mapping),
            amr: more.amr.or(self.amr),
            acr: more.acr.or(self.acr),
            auth_age_seconds: more.auth_age_seconds.or(self.auth_age_seconds),
            device: more.device.or(self.device),
            organisations: more.organisations.or(self.organisations),
            attributes: more.attributes.or(self.attributes),
            peer: more.peer.or(self.peer),
            place: more.place.or(self.place),
            time: more.time.or(self.time),
        }
    }

    fn finish(self) -> Result<Described, Failure> {
        let at = match &self.time {
            Some(text) => moment(text)?,
            None => Timestamp::now(),
        };
        let subject = self.subject.as_deref().map(UserId::parse).transpose();
        let subject = subject.map_err(|error| usage(format!("the subject: {}", error.detail())))?;
        let kind = self.kind.unwrap_or(if subject.is_some() {
            Kind::User
        } else {
            Kind::Service
        });
        let roles = self.roles.unwrap_or_default();
        if kind == Kind::User && !roles.is_empty() {
            return Err(usage(
                "a user has no roles; pass `--kind service`, or omit the roles",
            ));
        }
        let grant = Grant {
            tenant: self.tenant.unwrap_or_default(),
            roles,
            users: self.release_users,
            key_names: self.release_key_names,
        };
        let name = self.name.unwrap_or_else(|| "described".to_owned());
        let age = self
            .auth_age_seconds
            .map(|seconds| i64::from(seconds) * 1_000_000);
        let identity = Identity {
            credential: credential(&name, kind),
            kind,
            users: grant.users(),
            key_names: grant.key_names(),
            tenant: grant.tenant,
            roles: grant.roles,
            subject,
            mapping: self.mapping,
            claims: Claims {
                amr: self.amr.unwrap_or_default(),
                acr: self.acr,
                authenticated: age
                    .map(|age| Timestamp::from_micros(at.micros().saturating_sub(age))),
                device: self.device,
                organisations: self.organisations.unwrap_or_default(),
                attributes: self.attributes.unwrap_or_default(),
                expires: None,
            },
            name,
        };
        Ok(Described {
            identity,
            peer: self.peer.unwrap_or(Ipv4Addr::LOCALHOST.into()),
            place: self.place,
            at,
        })
    }
}

fn from_configuration(san: &str, context: &Context) -> Result<Description, Failure> {
    let principals = context.config()?.principals;
    let known = principals
        .into_iter()
        .find(|principal| principal.san == san);
    let auth::Settings { san, tenant, roles, users, key_names } = known.ok_or_else(|| {
        usage(format!("there is no [[principal]] with the san {san:?}")).hint(
            "`keybroker config show` lists every [[principal]]; use options to describe a user, an API client or a \
             service with an access token",
        )
    })?;
    Ok(Description {
        kind: Some(Kind::Service),
        attributes: Some(BTreeMap::from([(
            "san".to_owned(),
            BTreeSet::from([san.clone()]),
        )])),
        name: Some(san),
        tenant: Some(tenant),
        roles: Some(roles),
        release_users: users,
        release_key_names: key_names,
        ..Description::default()
    })
}

fn from_file(path: &Path) -> Result<Description, Failure> {
    let shown = path.display();
    let text =
        fs::read_to_string(path).map_err(|error| usage(format!("cannot read {shown}: {error}")))?;
    serde_json::from_str(&text).map_err(|error| usage(format!("{shown}: {error}")))
}

/// Derives the type of the credential from the prefix of the principal's name.
fn credential(name: &str, kind: Kind) -> Credential {
    match name.split(':').next() {
        Some("URI" | "DNS") => Credential::Certificate,
        Some("client") => Credential::ClientSecret,
        Some("token") => Credential::Token,
        _ if kind == Kind::User => Credential::Token,
        _ => Credential::Certificate,
    }
}

fn moment(text: &str) -> Result<Timestamp, Failure> {
    let at = OffsetDateTime::parse(text, &Rfc3339)
        .map_err(|error| usage(format!("the time {text:?} is not RFC 3339: {error}")))?;
    let micros = i64::try_from(at.unix_timestamp_nanos() / 1_000);
    micros
        .map(Timestamp::from_micros)
        .map_err(|_| usage(format!("the time {text:?} is out of range")))
}

/// Parses a value that is spelled as in the configuration.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(json!(text)).map_err(|error| error.to_string())
}

fn some<T: Clone + Ord>(values: &[T]) -> Option<BTreeSet<T>> {
    (!values.is_empty()).then(|| values.iter().cloned().collect())
}

fn reach<T>(values: &[String]) -> Result<Option<Reach<T>>, Failure>
where
    T: Ord,
    Reach<T>: DeserializeOwned,
{
    let named = (!values.is_empty()).then(|| serde_json::from_value(json!(values)));
    named.transpose().map_err(|error| usage(error.to_string()))
}

fn usage(what: impl Into<String>) -> Failure {
    Failure::new(Exit::Usage, what)
}
