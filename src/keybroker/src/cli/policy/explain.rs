//! `keybroker policy explain`: shows the decision on an example request.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use keybroker_core::{
    key::{Fingerprint, KeyName, Tenant, UserId},
    principal::Action,
};
use keybroker_policy::{
    Applies, Case, Explanation, Policy, PolicyView, Problems, Release, Resource,
};

use super::{
    super::{
        Context,
        exit::{Exit, Failure},
        output::Field,
    },
    Source,
    describe::Who,
    refused,
};

#[derive(Args, Debug)]
pub(in crate::cli) struct Arguments {
    #[command(flatten)]
    who: Who,
    /// Name of the requested action in the audit log, such as `user_key.unwrap`
    #[arg(long, value_parser = action)]
    action: Action,
    /// User whose key, list of keys or devices are requested [default for lists: all users]
    #[arg(long)]
    user: Option<UserId>,
    /// Principal that made the request for access
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    requested_by: String,
    /// Type of the device that requests access
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "",
        hide_default_value = true
    )]
    device_type: String,
    /// Address from which the request for access came
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    request_peer: IpAddr,
    /// Name of the network from which the request for access came [default: the `[[network]]` that contains --request-peer]
    #[arg(long, value_name = "NETWORK")]
    request_place: Option<String>,
    /// Name of the requested key
    #[arg(long)]
    key_name: Option<KeyName>,
    /// Fingerprint of the recipient of a sealed release, 64 hexadecimal digits [default: a plain release]
    #[arg(long, value_name = "SHA256", value_parser = recipient)]
    recipient: Option<Fingerprint>,
    /// Expected decision; the command fails with exit code 12 if the decision differs
    #[arg(long)]
    expect: Option<Expected>,
    #[command(flatten)]
    source: Source,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Expected {
    /// The request is permitted
    Allow,
    /// The request is denied
    Deny,
}

impl Expected {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        }
    }
}

pub(super) fn run(arguments: &Arguments, context: &Context) -> Result<(), Failure> {
    let settings = arguments.source.settings(context)?;
    let networks = Source::networks(context);
    let policy = Policy::load(&settings, networks.clone())
        .map_err(|Problems(problems)| refused(settings.directory.as_deref(), &problems))?;
    let described = arguments.who.describe(context)?;
    let place = |known: &Option<String>, peer| {
        let known = known.clone();
        known.unwrap_or_else(|| networks.place_of(peer).to_owned())
    };
    let request_place = place(&arguments.request_place, arguments.request_peer);
    let explanation = policy.explain(&Case {
        identity: &described.identity,
        action: arguments.action,
        resource: arguments.resource(&described.identity.tenant, &request_place)?,
        release: arguments.recipient.map_or(Release::Plain, Release::Sealed),
        peer: described.peer,
        place: &place(&described.place, described.peer),
        at: described.at,
    });
    let decision = if explanation.verdict.allowed {
        Expected::Allow
    } else {
        Expected::Deny
    };
    show(&explanation, decision, context)?;
    match arguments.expect {
        Some(expected) if expected != decision => Err(Failure::new(
            Exit::Verification,
            format!(
                "the expected decision is {}, but the decision is {} (policy `{}`)",
                expected.as_str(),
                decision.as_str(),
                explanation.verdict.policy
            ),
        )),
        _ => Ok(()),
    }
}

fn recipient(text: &str) -> Result<Fingerprint, &'static str> {
    Fingerprint::from_hex(text).ok_or("64 hexadecimal digits")
}

impl Arguments {
    fn resource<'a>(
        &'a self,
        tenant: &'a Tenant,
        request_place: &'a str,
    ) -> Result<Resource<'a>, Failure> {
        let name = self.action.as_str();
        let (user, key_name) = (self.user.as_ref(), self.key_name.as_ref());
        if self.action == Action::List {
            return Ok(Resource::UserKeys { tenant, user });
        }
        if name.starts_with("device.") || name.starts_with("access_request.") {
            return self.resource_of_devices(tenant, request_place);
        }
        match (name.starts_with("user_key."), user, key_name) {
            (true, Some(user), Some(name)) => Ok(Resource::UserKey { tenant, user, name }),
            (true, ..) => Err(Failure::new(
                Exit::Usage,
                format!("{name} applies to one key: pass --user and --key-name"),
            )),
            (false, None, None) => Ok(Resource::Broker),
            (false, ..) => Err(Failure::new(
                Exit::Usage,
                format!("{name} does not apply to a user key: omit --user and --key-name"),
            )),
        }
    }
}

impl Arguments {
    fn resource_of_devices<'a>(
        &'a self,
        tenant: &'a Tenant,
        request_place: &'a str,
    ) -> Result<Resource<'a>, Failure> {
        let name = self.action.as_str();
        let user = self.user.as_ref();
        if self.key_name.is_some() {
            let what = format!("{name} does not apply to one key: omit --key-name");
            return Err(Failure::new(Exit::Usage, what));
        }
        if !matches!(
            self.action,
            Action::ApproveAccess | Action::ApproveForMember | Action::DenyAccess
        ) {
            return Ok(Resource::Devices { tenant, user });
        }
        let user = user.ok_or_else(|| {
            let what = format!("{name} applies to the request of one user: pass --user");
            Failure::new(Exit::Usage, what)
        })?;
        Ok(Resource::AccessRequest {
            tenant,
            user,
            requested_by: &self.requested_by,
            device_type: &self.device_type,
            peer: self.request_peer,
            place: request_place,
        })
    }
}

fn show(explanation: &Explanation, decision: Expected, context: &Context) -> Result<(), Failure> {
    let Explanation { verdict, policies } = explanation;
    let deciding: Vec<&str> = verdict.deciding.iter().map(AsRef::as_ref).collect();
    let mut fields = vec![
        ("decision", json!(decision.as_str())),
        ("policy", json!(&*verdict.policy)),
        ("why", json!(why(explanation))),
    ];
    if context.output.is_json() {
        let rows: Vec<Value> = policies
            .iter()
            .map(|view| {
                Value::Object(
                    row(view)
                        .into_iter()
                        .map(|(k, v)| (k.to_owned(), v))
                        .collect(),
                )
            })
            .collect();
        fields.push(("deciding", json!(deciding)));
        fields.push(("policies", json!(rows)));
        return context.output.fields(fields);
    }
    fields.push((
        "deciding",
        json!(if deciding.is_empty() {
            "-".to_owned()
        } else {
            deciding.join(", ")
        }),
    ));
    context.output.fields(fields)?;
    if policies.is_empty() {
        return Ok(());
    }
    let about: Vec<Vec<Field>> = policies
        .iter()
        .filter(|view| view.is_about)
        .map(row)
        .collect();
    let others = policies.len() - about.len();
    context.output.text("")?;
    context
        .output
        .list(about, "no policy applies to this action")?;
    if others > 0 {
        context
            .output
            .note(&format!("{others} policies apply to other actions"));
    }
    Ok(())
}

/// The reason for the decision, in one sentence.
fn why(Explanation { verdict, policies }: &Explanation) -> String {
    let policy = &verdict.policy;
    let failed = policies
        .iter()
        .any(|view| view.id == *policy && matches!(view.applies, Applies::Failed(_)));
    match &**policy {
        "default-deny" => "no permit applies".to_owned(),
        "separation-of-duties" => {
            "the principal has roles that exclude each other; policies are not evaluated".to_owned()
        }
        "own-tenant" => "the key belongs to another tenant; policies are not evaluated".to_owned(),
        _ if failed => {
            format!("the forbid policy `{policy}` could not be evaluated, so the request is denied")
        }
        _ if verdict.allowed => {
            format!("the permit policy `{policy}` applies, and no forbid policy applies")
        }
        _ => format!(
            "the forbid policy `{policy}` applies, and a forbid policy overrides every permit policy"
        ),
    }
}

fn row(view: &PolicyView) -> Vec<Field> {
    let (applies, why) = match &view.applies {
        Applies::Yes => ("yes", Value::Null),
        Applies::No(why) => ("no", json!(why)),
        Applies::Failed(why) => ("error", json!(why)),
    };
    vec![
        ("id", json!(&*view.id)),
        ("effect", json!(view.effect)),
        ("file", json!(&*view.file)),
        ("applies", json!(applies)),
        ("why_not", why),
    ]
}

fn action(text: &str) -> Result<Action, String> {
    let names = || Action::ALL.map(Action::as_str).join(", ");
    Action::ALL
        .into_iter()
        .find(|action| action.as_str() == text)
        .ok_or_else(|| format!("actions are {}", names()))
}
