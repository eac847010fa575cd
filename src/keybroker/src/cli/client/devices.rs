//! `keybroker device`: lists devices and requests for access, decides about requests, and ends the trust of devices through a running broker.

use clap::{ArgGroup, Args, Subcommand};
use keybroker_client::{DeviceId, Reason, UserId, proto};
use serde_json::{Value, json};

use crate::cli::{
    exit::Failure,
    output::{Field, printable},
};

use super::{Caller, arguments, refusal::failure, show};

mod decisions;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List the requests of new devices for access that wait for a decision
    ///
    /// A member sees the requests of the own devices with the whole phrase. An approver sees the requests of the users whom the
    /// configuration names, with three of the five words: the member says the other two.
    Requests {
        /// Also list requests that were decided, consumed or not used in time
        #[arg(long)]
        all: bool,
    },
    /// Approve the requests of members (for the role `approver`)
    ///
    /// The command shows each request with three of the five words of its phrase, and asks for the other two: the member reads them from
    /// the new device. The token then encrypts the member's user key to the new device. You do not receive the user key. With several
    /// requests, the command shows a result for each, and fails if one of them was not approved.
    Approve(decisions::ApproveArguments),
    /// Deny requests for access, or withdraw approvals and end the trust that followed from them
    ///
    /// With several requests, the command shows a result for each, and fails if one of them was not denied.
    Deny(decisions::DenyArguments),
    /// List the devices of a member
    List {
        /// The member, for a caller with the role `approver`; without it, the caller's own devices
        #[arg(long, value_parser = arguments::user)]
        user: Option<UserId>,
    },
    /// End the trust of a member's devices, and remove their encrypted keys (for the role `approver`)
    ///
    /// With `--all`, the broker also removes the rows of the member's devices that cannot be read or verified.
    /// The user key of the member is not changed. While the member has a trusted device, a device whose trust was ended needs its
    /// signature, or an approved request for access. Without a trusted device, an access token of the member is sufficient.
    Untrust(UntrustArguments),
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("which").required(true).args(["device", "all"])))]
pub(super) struct UntrustArguments {
    /// The member
    #[arg(long, value_parser = arguments::user)]
    user: UserId,
    /// Id of a device, 32 hexadecimal digits; can be repeated
    #[arg(long, value_parser = arguments::device_id)]
    device: Vec<DeviceId>,
    /// End the trust of all devices of the member
    #[arg(long)]
    all: bool,
    /// Record that the devices were lost
    #[arg(long)]
    lost: bool,
}

impl Caller {
    pub(super) async fn devices(&self, command: Command) -> Result<(), Failure> {
        match command {
            Command::Requests { all } => self.access_requests(all).await,
            Command::Approve(arguments) => self.approve_for_members(arguments).await,
            Command::Deny(arguments) => self.deny_requests(arguments).await,
            Command::List { user } => self.list_devices(user.as_ref()).await,
            Command::Untrust(arguments) => self.untrust(arguments).await,
        }
    }

    async fn access_requests(&self, all: bool) -> Result<(), Failure> {
        let listed = self.all_access_requests(all).await?;
        let json = self.output.is_json();
        let requests = listed.access_requests.iter();
        let rows: Vec<_> = requests
            .map(|request| request_fields(request, json))
            .collect();
        let when_empty = if all {
            "no requests for access"
        } else {
            "no pending requests for access"
        };
        self.output.list(rows, when_empty)?;
        let is_altered = listed.access_requests.iter().any(|request| request.altered);
        self.warn(is_altered || !listed.damaged_access_request_ids.is_empty());
        Ok(())
    }

    /// Reads all pages of the requests for access.
    async fn all_access_requests(
        &self,
        all: bool,
    ) -> Result<proto::ListAccessRequestsResponse, Failure> {
        let mut listed = proto::ListAccessRequestsResponse::default();
        loop {
            let page = self
                .client
                .list_access_requests(all, listed.next_page_token.as_str())
                .await;
            let page = page.map_err(|error| failure(&error))?;
            listed.access_requests.extend(page.access_requests);
            let damaged = page.damaged_access_request_ids;
            listed.damaged_access_request_ids.extend(damaged);
            listed.next_page_token = page.next_page_token;
            if listed.next_page_token.is_empty() {
                return Ok(listed);
            }
        }
    }

    async fn list_devices(&self, user: Option<&UserId>) -> Result<(), Failure> {
        let listed = self.client.list_devices(user).await;
        let listed = listed.map_err(|error| without_user(failure(&error), user))?;
        self.output
            .list(self.device_rows(&listed.devices), "no devices")?;
        let is_altered = listed.devices.iter().any(|device| device.altered);
        self.warn(is_altered || !listed.damaged_device_ids.is_empty());
        Ok(())
    }

    async fn untrust(&self, arguments: UntrustArguments) -> Result<(), Failure> {
        let ids = arguments.device.iter().map(|id| id.as_bytes().to_vec());
        let ended = self
            .client
            .untrust_devices(proto::UntrustDevicesRequest {
                device_ids: ids.collect(),
                all: arguments.all,
                lost: arguments.lost,
                user: arguments.user.as_str().to_owned(),
                signature: None,
            })
            .await;
        let ended = ended.map_err(|error| failure(&error))?;
        self.output.list(self.device_rows(&ended), "no devices")
    }

    fn device_rows(&self, devices: &[proto::Device]) -> Vec<Vec<Field>> {
        let json = self.output.is_json();
        let rows = devices.iter().map(|device| device_fields(device, json));
        rows.collect()
    }

    /// Warns about rows that no broker wrote as they are.
    fn warn(&self, has_damage: bool) {
        if has_damage {
            self.output.note(
                "warning: a row was altered in the database or cannot be read: find out who can write to the database, and run \
                 `keybroker store check`",
            );
        }
    }
}

/// Explains the denial of a list without `--user`, which is the list of the own devices. An approver has none.
fn without_user(failure: Failure, user: Option<&UserId>) -> Failure {
    if user.is_none() && failure.reason.as_deref() == Some(Reason::Policy.as_str()) {
        return failure
            .hint("an approver has no devices: pass the member whose devices to list with --user");
    }
    failure
}

fn id(bytes: &[u8]) -> Value {
    if bytes.is_empty() {
        Value::Null
    } else {
        json!(hex::encode(bytes))
    }
}

fn text(text: &str) -> Value {
    if text.is_empty() {
        Value::Null
    } else {
        json!(text)
    }
}

const fn request_state(state: proto::AccessRequestState) -> &'static str {
    match state {
        proto::AccessRequestState::Pending => "pending",
        proto::AccessRequestState::Approved => "approved",
        proto::AccessRequestState::Denied => "denied",
        proto::AccessRequestState::Consumed => "consumed",
        proto::AccessRequestState::Revoked => "revoked",
        proto::AccessRequestState::Expired => "expired",
        proto::AccessRequestState::Unspecified => "unknown",
    }
}

const fn approver(approver: proto::AccessApprover) -> &'static str {
    match approver {
        proto::AccessApprover::Device => "device",
        proto::AccessApprover::Administrator => "administrator",
        proto::AccessApprover::Unspecified => "unknown",
    }
}

const fn device_state(state: proto::DeviceState) -> &'static str {
    match state {
        proto::DeviceState::Trusted => "trusted",
        proto::DeviceState::Untrusted => "untrusted",
        proto::DeviceState::Lost => "lost",
        proto::DeviceState::Unspecified => "unknown",
    }
}

/// The words of a phrase. A hidden word is shown as a blank to fill in.
pub(super) fn phrase(words: &[String]) -> String {
    let shown = words.iter().map(|word| match word.as_str() {
        "" => "____",
        word => word,
    });
    shown.collect::<Vec<_>>().join(" ")
}

/// For a person, texts of other persons are escaped.
fn escaped(mut fields: Vec<Field>, json: bool) -> Vec<Field> {
    for (_, value) in fields.iter_mut().filter(|_| !json) {
        if let Value::String(text) = value {
            *text = printable(text);
        }
    }
    fields
}

/// A request for access.
pub(super) fn request_fields(request: &proto::AccessRequest, json: bool) -> Vec<Field> {
    let fields = vec![
        ("id", id(&request.id)),
        ("state", json!(request_state(request.state()))),
        ("phrase", json!(phrase(&request.phrase))),
        ("user", text(&request.user)),
        ("key_name", text(&request.key_name)),
        ("device", id(&request.device_id)),
        ("device_name", text(&request.device_name)),
        ("device_type", text(&request.device_type)),
        ("requested_by", text(&request.requested_by)),
        ("peer", text(&request.peer)),
        ("place", text(&request.place)),
        ("requested", show::time(request.request_time.as_ref())),
        ("expires", show::time(request.expire_time.as_ref())),
        ("approver", json!(approver(request.approver()))),
        ("public_key_sha256", id(&request.public_key_sha256)),
        ("first_approved_by", text(&request.first_approved_by)),
        ("decided_by", text(&request.decided_by)),
        ("decided_by_device", id(&request.decided_by_device_id)),
        ("decided", show::time(request.decide_time.as_ref())),
        ("verified", json!(request.verified)),
        ("altered", json!(request.altered)),
    ];
    escaped(fields, json)
}

fn device_fields(device: &proto::Device, json: bool) -> Vec<Field> {
    let fields = vec![
        ("id", id(&device.id)),
        ("state", json!(device_state(device.state()))),
        ("name", text(&device.name)),
        ("type", text(&device.r#type)),
        ("key_name", text(&device.key_name)),
        ("revision", json!(device.revision)),
        ("trusted", show::time(device.trust_time.as_ref())),
        ("last_used", show::time(device.last_use_time.as_ref())),
        ("lost", show::time(device.lost_time.as_ref())),
        ("verified", json!(device.verified)),
        ("altered", json!(device.altered)),
    ];
    escaped(fields, json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hidden_words_are_blanks() {
        let words = ["turban", "", "anime", "", "unselfish"].map(str::to_owned);
        assert_eq!(phrase(&words), "turban ____ anime ____ unselfish");
    }

    /// Members choose the names of devices.
    #[test]
    fn no_name_of_a_device_controls_the_terminal() {
        const EVIL: &str = "x\u{1b}[2K\u{9b}1m\u{202e}\u{200f}";
        let device = proto::Device {
            name: EVIL.to_owned(),
            r#type: EVIL.to_owned(),
            ..proto::Device::default()
        };
        let request = proto::AccessRequest {
            device_name: EVIL.to_owned(),
            requested_by: EVIL.to_owned(),
            ..proto::AccessRequest::default()
        };
        let fields = [
            device_fields(&device, false),
            request_fields(&request, false),
        ];
        for (name, value) in fields.concat() {
            let shown = value.as_str().unwrap_or_default();
            let is_harmless = |c: char| c.is_ascii_graphic() || c == ' ';
            assert!(shown.chars().all(is_harmless), "{name}: {shown:?}");
        }
    }
}
