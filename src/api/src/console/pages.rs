//! The pages. The template library escapes every text that a template inserts, such as the names of devices.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use askama::Template;
use keybroker_core::call::Timestamp;

use super::{
    sessions::Session,
    views::{AccessRequest, Device, Moment},
};

/// The purpose of the token of the form that signs out.
pub(super) const SIGN_OUT: &str = "sign-out";

/// The parts that all pages of a session have.
#[derive(Debug)]
pub(super) struct Frame {
    /// The address of the page in the navigation.
    pub(super) at: &'static str,
    pub(super) person: String,
    pub(super) sign_out: String,
    /// The time of the answer, in seconds since 1970, from which the script counts.
    pub(super) now: i64,
}

impl Frame {
    pub(super) fn new(session: &Session, at: &'static str) -> Self {
        Self {
            at,
            person: session.principal().name().to_owned(),
            sign_out: session.token(SIGN_OUT),
            now: Moment::from(Timestamp::now()).seconds,
        }
    }

    fn is_at(&self, at: &str) -> bool {
        self.at == at
    }
}

/// A link.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) address: String,
    pub(super) text: &'static str,
}

/// A short text instead of a page.
#[derive(Debug, Template)]
#[template(path = "console/message.html")]
pub(super) struct Message {
    pub(super) title: &'static str,
    pub(super) texts: Vec<String>,
    /// The id of the call for the operator; empty if there is none.
    pub(super) call: String,
    pub(super) link: Link,
}

impl Message {
    pub(super) fn new(title: &'static str, text: &str) -> Self {
        Self {
            title,
            texts: vec![text.to_owned()],
            call: String::new(),
            link: Link {
                address: "/".to_owned(),
                text: "Go to the requests",
            },
        }
    }
}

/// The page for a browser without a session.
#[derive(Debug, Template)]
#[template(path = "console/sign_in.html")]
pub(super) struct SignIn {
    pub(super) link: String,
}

/// The page that leads from the provider to the requests. Browsers send the session cookie only with a request from a page of this
/// site, so the answer to the provider's redirect must be a page and not another redirect.
#[derive(Debug, Template)]
#[template(path = "console/continue.html")]
pub(super) struct Continue {
    pub(super) to: String,
}

/// The pending requests.
#[derive(Debug, Template)]
#[template(path = "console/pending.html")]
pub(super) struct Pending {
    pub(super) frame: Frame,
    pub(super) requests: Vec<AccessRequest>,
    pub(super) damaged: usize,
    /// The place after which the next page begins, as a part of an address.
    pub(super) next: Option<String>,
}

/// The input of a form that was refused.
#[derive(Debug, Default)]
pub(super) struct Refused {
    /// What is wrong with the words.
    pub(super) words: Option<String>,
    /// What is wrong with the confirmation.
    pub(super) spoken: Option<&'static str>,
}

impl Refused {
    fn is_any(&self) -> bool {
        self.words.is_some() || self.spoken.is_some()
    }
}

/// One request.
#[derive(Debug, Template)]
#[template(path = "console/request.html")]
#[expect(clippy::struct_field_names, reason = "the name in the template")]
pub(super) struct Request {
    pub(super) frame: Frame,
    pub(super) request: AccessRequest,
    /// The token of the form; `None` if the approver must sign in again first.
    pub(super) approve: Option<String>,
    /// Whether this approver was the first of two.
    pub(super) is_first_approver: bool,
    pub(super) refused: Refused,
}

/// The confirmation of a denial.
#[derive(Debug, Template)]
#[template(path = "console/deny.html")]
pub(super) struct Deny {
    pub(super) frame: Frame,
    pub(super) request: AccessRequest,
    pub(super) token: String,
}

/// The devices of a member.
#[derive(Debug, Template)]
#[template(path = "console/devices.html")]
#[expect(clippy::struct_field_names, reason = "the name in the template")]
pub(super) struct Devices {
    pub(super) frame: Frame,
    /// The member; empty before one was chosen.
    pub(super) member: String,
    /// The member as a part of an address.
    pub(super) member_in_address: String,
    pub(super) devices: Vec<Device>,
    pub(super) damaged: usize,
    /// What is wrong with the input.
    pub(super) refused: Option<String>,
}

impl Devices {
    fn has_trusted(&self) -> bool {
        self.devices.iter().any(Device::is_trusted)
    }
}

/// The confirmation of the end of trust.
#[derive(Debug, Template)]
#[template(path = "console/end_trust.html")]
pub(super) struct EndTrust {
    pub(super) frame: Frame,
    pub(super) member: String,
    pub(super) member_in_address: String,
    /// The device; `None` for all devices.
    pub(super) device: Option<Device>,
    pub(super) token: String,
    pub(super) refused: Option<&'static str>,
}

/// The latest decisions.
#[derive(Debug, Template)]
#[template(path = "console/decisions.html")]
pub(super) struct Decisions {
    pub(super) frame: Frame,
    pub(super) requests: Vec<AccessRequest>,
    pub(super) damaged: usize,
    pub(super) max: u32,
}
