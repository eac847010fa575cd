//! `keybroker approval`: lists the changes that a second person must approve, and approves or rejects them through the admin API.

use clap::Subcommand;
use keybroker_client::{ApprovalId, Error, Reason, proto};
use serde_json::{Value, json};

use crate::cli::{
    confirm,
    exit::{Exit, Failure},
    output::{Field, printable},
};

use super::{Caller, arguments, refusal, show};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the changes that wait for the approval of a second person, or that were approved and not made yet
    List {
        /// Also list requests that were rejected, used or not used in time
        #[arg(long)]
        all: bool,
    },
    /// Approve the change that another person requested
    ///
    /// The command shows the change with all its parameters and asks for the id of the request again. The approval permits the
    /// change once: the person who requested it runs the same command again. Until then, `approval reject` withdraws the approval.
    Approve {
        /// Id of the request, 32 hexadecimal digits
        #[arg(value_parser = arguments::approval_id)]
        id: ApprovalId,
        /// Approve the change without asking for the id again
        #[arg(long)]
        yes: bool,
    },
    /// Reject a requested change, also a request of your own or an approved change that was not made yet
    ///
    /// The command removes a request that was altered in the database, or that cannot be verified any more because of the state of
    /// its wrapping key.
    Reject {
        /// Id of the request, 32 hexadecimal digits
        #[arg(value_parser = arguments::approval_id)]
        id: ApprovalId,
    },
}

impl Caller {
    pub(super) async fn approvals(&self, command: Command) -> Result<(), Failure> {
        match command {
            Command::List { all } => self.list_approvals(all).await,
            Command::Approve { id, yes } => self.approve(id, yes).await,
            Command::Reject { id } => self.reject(id).await,
        }
    }

    async fn list_approvals(&self, all: bool) -> Result<(), Failure> {
        let listed = self.client.list_approvals(all).await;
        let listed = listed.map_err(|error| failure(&error))?;
        let json = self.output.is_json();
        let mut rows: Vec<_> = listed
            .approvals
            .iter()
            .map(|request| fields(request, json))
            .collect();
        rows.extend(listed.damaged.iter().map(damaged_fields));
        let when_empty = if all {
            "no requests for approval"
        } else {
            "no open requests for approval"
        };
        self.output.list(rows, when_empty)?;
        let has_problem = |request: &proto::Approval| !request.problem.is_empty();
        if !listed.damaged.is_empty() || listed.approvals.iter().any(has_problem) {
            self.output.note(
                "warning: a request was altered in the database: find out who can write to the database, then remove the request with \
                 `keybroker approval reject ID`",
            );
        }
        Ok(())
    }

    async fn approve(&self, id: ApprovalId, yes: bool) -> Result<(), Failure> {
        let request = self.request(id).await?;
        check_verified(&request)?;
        if !yes {
            for (name, value) in fields(&request, false) {
                if let Some(text) = shown(&value) {
                    self.output.note(&format!("{name}: {text}"));
                }
            }
        }
        let warning = format!(
            "Your approval lets {} make this change once; until then, `keybroker approval reject` withdraws it",
            printable(&request.requested_by_person)
        );
        confirm::typed_id(self.output, yes, &id.to_string(), "request", &warning)?;
        let digest = request.digest.as_slice().try_into().map_err(|_| {
            let what = "the broker's answer is not valid: the digest of the request does not have 32 bytes";
            Failure::new(Exit::Refused, what)
        })?;
        let approved = self.client.approve_change(id, digest).await;
        let approved = approved.map_err(|error| failure(&error))?;
        self.output
            .fields(fields(&approved, self.output.is_json()))?;
        let until = show::time(approved.expire_time.as_ref());
        self.output.note(&format!(
            "{} can make the change once with the same command as before, until {}",
            printable(&approved.requested_by_person),
            until.as_str().unwrap_or("the request expires")
        ));
        Ok(())
    }

    /// Returns the request that a person is asked to approve, also if a list would not show it, because a list has a limited length.
    async fn request(&self, id: ApprovalId) -> Result<proto::Approval, Failure> {
        let found = self.client.get_approval(id).await;
        found.map_err(|error| failure(&error))?.ok_or_else(|| {
            let what = format!("the broker has no readable request for approval {id}");
            Failure::new(Exit::Refused, what).hint(HINT)
        })
    }

    async fn reject(&self, id: ApprovalId) -> Result<(), Failure> {
        let answer = self.client.reject_change(id).await;
        let answer = answer.map_err(|error| failure(&error))?;
        match &answer.approval {
            Some(rejected) => self.output.fields(fields(rejected, self.output.is_json())),
            None => self.output.sentence(
                "removed",
                &format!(
                    "the request {id} was removed: {}",
                    printable(&answer.removal_cause)
                ),
            ),
        }
    }
}

/// Refuses a request that the token did not verify: the shown change may be another one than the change that would be approved.
fn check_verified(request: &proto::Approval) -> Result<(), Failure> {
    if !request.problem.is_empty() {
        let reason = Reason::RecordDamaged.to_string();
        return Err(Failure {
            reason: Some(reason.clone()),
            ..Failure::new(
                Exit::Refused,
                format!("{reason}: {}", printable(&request.problem)),
            )
            .hint(HINT)
        });
    }
    if request.verified {
        return Ok(());
    }
    let what = format!(
        "the token did not verify the request {}, so the change in the list may not be the change that {:?} requested; nothing was \
         approved",
        hex::encode(&request.id),
        request.requested_by_person
    );
    let hint = "repeat the command when the token is available; if the state of the wrapping key that authenticates the request forbids \
                its use, the other person has to request the change again";
    Err(Failure::new(Exit::Refused, what).hint(hint))
}

const HINT: &str = "`keybroker approval list --all` shows the requests";

/// The failure of a call about requests for approval. The general hints are about user keys.
fn failure(error: &Error) -> Failure {
    let failure = refusal::failure(error);
    match error.reason() {
        Some(Reason::KeyNotFound | Reason::RecordDamaged) => failure.hint(HINT),
        _ => failure,
    }
}

fn state(state: proto::ApprovalState) -> &'static str {
    match state {
        proto::ApprovalState::Pending => "pending",
        proto::ApprovalState::Approved => "approved",
        proto::ApprovalState::Rejected => "rejected",
        proto::ApprovalState::Used => "used",
        proto::ApprovalState::Expired => "expired",
        proto::ApprovalState::Unspecified => "unknown",
    }
}

/// The fields of a request. For a person, texts of other persons are escaped.
fn fields(request: &proto::Approval, json: bool) -> Vec<Field> {
    let mut fields = unescaped(request, json);
    if !json {
        for (_, value) in &mut fields {
            if let Value::String(text) = value {
                *text = printable(text);
            }
        }
    }
    fields
}

fn unescaped(request: &proto::Approval, json: bool) -> Vec<Field> {
    let text = |text: &str| {
        if text.is_empty() {
            Value::Null
        } else {
            json!(text)
        }
    };
    vec![
        ("id", json!(hex::encode(&request.id))),
        ("state", json!(state(request.state()))),
        ("action", json!(request.action)),
        ("change", change(&request.change, json)),
        ("digest", text(&hex::encode(&request.digest))),
        ("requested_by", json!(request.requested_by_person)),
        ("requested_by_principal", json!(request.requested_by)),
        ("requested", show::time(request.request_time.as_ref())),
        ("expires", show::time(request.expire_time.as_ref())),
        ("decided_by", text(&request.decided_by_person)),
        ("decided_by_principal", text(&request.decided_by)),
        ("decided", show::time(request.decide_time.as_ref())),
        ("used", show::time(request.use_time.as_ref())),
        ("verified", json!(request.verified)),
        ("problem", text(&request.problem)),
    ]
}

/// Returns the same columns as [`fields`] for a row that the broker could not read.
fn damaged_fields(row: &proto::DamagedApproval) -> Vec<Field> {
    let unreadable = proto::Approval::default();
    let mut fields = fields(&unreadable, false);
    for (name, value) in &mut fields {
        *value = match *name {
            "id" if !row.id.is_empty() => json!(hex::encode(&row.id)),
            "state" => json!("unreadable"),
            "verified" => json!(false),
            "problem" => json!("the row cannot be read"),
            _ => Value::Null,
        };
    }
    fields
}

/// The requested change: as an object, or as one line with the parameters that are set.
fn change(text: &str, json: bool) -> Value {
    let Ok(Value::Object(parameters)) = serde_json::from_str::<Value>(text) else {
        return json!(text);
    };
    if json {
        return Value::Object(parameters);
    }
    let words: Vec<String> = parameters
        .iter()
        .filter_map(|(name, value)| Some(format!("{} {}", word(name), parameter(name, value)?)))
        .collect();
    json!(words.join(", "))
}

/// A parameter of a change for a person; `None` for a parameter that is not set. The requesting person chooses the label, so it is
/// always quoted.
fn parameter(name: &str, value: &Value) -> Option<String> {
    match (name, value) {
        ("label", Value::String(label)) => Some(format!("{label:?}")),
        ("secret_days", Value::Null) => Some("never expires".to_owned()),
        (_, Value::String(text)) => Some(word(text)),
        (_, Value::Array(values)) => {
            let words = values.iter().filter_map(|value| parameter("", value));
            Some(words.collect::<Vec<_>>().join(" "))
        }
        _ => shown(value),
    }
}

/// A text of a change. Quoted if it could be read as several words or as another parameter.
fn word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=@%+*".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("{text:?}")
}

/// A value for a person; `None` for a value that is not set.
fn shown(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_one_line_for_a_person_and_an_object_for_a_program() {
        let text = r#"{"after_days":30,"secret_days":null,"users":["a","b"],"wrapping_key":"07"}"#;
        assert_eq!(
            change(text, false),
            json!("after_days 30, secret_days never expires, users a b, wrapping_key 07")
        );
        assert_eq!(change(text, true)["secret_days"], Value::Null);
        let misleading = "{\"label\":\"x, secret_days 1\u{202e}\"}";
        assert_eq!(
            change(misleading, false),
            json!(r#"label "x, secret_days 1\u{202e}""#)
        );
        assert_eq!(change("no json", true), json!("no json"));
    }

    /// Names of users, keys, principals and persons can contain characters that control a terminal or change the direction of the
    /// text, and words that look like another parameter.
    #[test]
    fn no_text_of_another_person_controls_the_terminal() {
        const EVIL: &str = "x\u{1b}[2K\r\n\u{9b}1m\u{202e}\u{2067}\u{200f}\u{7f}";
        let text = || format!("Ada, approved by Bob{EVIL}");
        let change = json!({
            "key_names": ["vault, roles none", EVIL],
            "label": text(),
            "roles": ["admin"],
            "users": ["ada b", "*", EVIL],
            EVIL: {EVIL: [EVIL]},
        });
        let request = proto::Approval {
            action: text(),
            change: change.to_string(),
            requested_by: text(),
            requested_by_person: text(),
            decided_by: text(),
            decided_by_person: text(),
            problem: text(),
            ..proto::Approval::default()
        };
        let no_json = proto::Approval {
            change: text(),
            ..request.clone()
        };
        for request in [&request, &no_json] {
            for (name, value) in fields(request, false) {
                let shown = shown(&value).unwrap_or_default();
                let is_harmless = |c: char| c.is_ascii_graphic() || c == ' ';
                assert!(shown.chars().all(is_harmless), "{name}: {shown:?}");
            }
        }
        let shown = fields(&request, false);
        let line = shown[3].1.as_str().unwrap();
        for part in [
            r#"key_names "vault, roles none" "x\u{1b}"#,
            r#"users "ada b" * "x"#,
        ] {
            assert!(line.contains(part), "{part}: {line}");
        }
        // A program gets the text as it is.
        let of_program = fields(&request, true);
        assert_eq!(of_program[2].1, json!(text()));
        assert_eq!(of_program[3].1, change);
    }

    /// A writer of the database can show another change than the one that would be approved, as long as the row is not verified.
    #[test]
    fn only_a_verified_request_is_approved() {
        let verified = proto::Approval {
            verified: true,
            ..proto::Approval::default()
        };
        assert!(check_verified(&verified).is_ok());
        let unverified = check_verified(&proto::Approval::default()).unwrap_err();
        assert!(unverified.message.contains("nothing was approved"));
        let altered = proto::Approval {
            problem: "was altered".to_owned(),
            ..verified
        };
        let altered = check_verified(&altered).unwrap_err();
        assert_eq!(altered.reason.as_deref(), Some("RECORD_DAMAGED"));
    }

    #[test]
    fn a_row_that_cannot_be_read_has_the_same_columns() {
        let names =
            |fields: Vec<Field>| fields.into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        let row = proto::DamagedApproval { id: vec![7; 16] };
        let damaged = damaged_fields(&row);
        assert_eq!(damaged[0].1, json!("07".repeat(16)));
        assert_eq!(
            names(damaged),
            names(fields(&proto::Approval::default(), true))
        );
    }
}
