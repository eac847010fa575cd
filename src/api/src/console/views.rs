//! What the pages show of requests and devices.

use keybroker_broker::{AccessView, DeviceView};
use keybroker_core::{
    call::Timestamp,
    device::{AccessApprover, AccessState, DeviceState},
};

const MICROS_PER_SECOND: i64 = 1_000_000;

/// A time, for people and for programs.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    /// `2026-11-30 20:05 UTC`.
    pub(super) text: String,
    /// RFC 3339 in whole seconds.
    pub(super) machine: String,
    /// Seconds since 1970.
    pub(super) seconds: i64,
}

impl From<Timestamp> for Moment {
    fn from(at: Timestamp) -> Self {
        let full = at.to_string();
        let minutes = full.get(..16).unwrap_or(&full).replace('T', " ");
        let seconds = full.get(..19).unwrap_or(&full);
        Self {
            text: format!("{minutes} UTC"),
            machine: format!("{seconds}Z"),
            seconds: at.micros().div_euclid(MICROS_PER_SECOND),
        }
    }
}

/// A word of the phrase.
#[derive(Clone, Debug)]
pub(super) struct Word {
    /// The place in the phrase, from 1.
    pub(super) number: usize,
    /// The word; `None` if the approver must hear it from the member.
    pub(super) text: Option<&'static str>,
}

/// A request for access.
#[derive(Clone, Debug)]
pub(super) struct AccessRequest {
    pub(super) id: String,
    pub(super) member: String,
    pub(super) device: String,
    pub(super) kind: String,
    pub(super) key_name: String,
    pub(super) asked_by: String,
    pub(super) address: String,
    /// The configured name of the network of the address; empty if it has none.
    pub(super) place: String,
    pub(super) asked: Moment,
    pub(super) expires: Moment,
    pub(super) state: AccessState,
    pub(super) words: Vec<Word>,
    /// The approver who decided, and when.
    pub(super) decision: Option<(String, Moment)>,
    /// The first of two approvers.
    pub(super) first_approver: Option<String>,
    /// Whether an administrator is asked.
    pub(super) is_for_administrator: bool,
    pub(super) is_verified: bool,
    pub(super) is_altered: bool,
}

impl From<&AccessView> for AccessRequest {
    fn from(view: &AccessView) -> Self {
        let row = &view.row;
        let words = (1..).zip(view.phrase.words);
        Self {
            id: row.id.to_string(),
            member: row.device.address.user.as_str().to_owned(),
            device: row.device.name.clone(),
            kind: row.device.kind.clone(),
            key_name: row.key_name.as_str().to_owned(),
            asked_by: row.requested_by.clone(),
            address: row.peer.clone(),
            place: view.place.clone(),
            asked: row.requested.into(),
            expires: row.expires.into(),
            state: view.state,
            words: words.map(|(number, text)| Word { number, text }).collect(),
            decision: row
                .decision
                .as_ref()
                .map(|decision| (decision.by.clone(), decision.at.into())),
            first_approver: row.first_approved_by.clone(),
            is_for_administrator: row.approver == AccessApprover::Administrator,
            is_verified: view.is_verified,
            is_altered: view.is_altered,
        }
    }
}

impl AccessRequest {
    pub(super) fn is_pending(&self) -> bool {
        self.state == AccessState::Pending
    }

    /// Whether a denial changes the state: of a pending request, or of an approval, also after its answer was consumed.
    pub(super) fn is_deniable(&self) -> bool {
        let may_become = |state| self.state.may_become(state);
        may_become(AccessState::Denied) || may_become(AccessState::Revoked)
    }

    /// Whether the request, or the answer, can still expire.
    pub(super) fn can_expire(&self) -> bool {
        self.state.is_open()
    }

    /// The words that the approver types.
    pub(super) fn blanks(&self) -> impl Iterator<Item = &Word> {
        self.words.iter().filter(|word| word.text.is_none())
    }
}

/// A device of a member.
#[derive(Clone, Debug)]
pub(super) struct Device {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) state: DeviceState,
    pub(super) trusted: Moment,
    pub(super) used: Option<Moment>,
    pub(super) lost: Option<Moment>,
    pub(super) is_altered: bool,
}

impl From<&DeviceView> for Device {
    fn from(view: &DeviceView) -> Self {
        let row = &view.row;
        Self {
            id: row.address.device.to_string(),
            name: row.name.clone(),
            kind: row.kind.clone(),
            state: row.state,
            trusted: row.trusted.into(),
            used: row.used.map(Moment::from),
            lost: row.lost.map(Moment::from),
            is_altered: view.is_altered,
        }
    }
}

impl Device {
    pub(super) fn is_trusted(&self) -> bool {
        self.state == DeviceState::Trusted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_moment_is_readable() {
        for micros in [1_764_533_103_000_000, 1_764_533_103_250_000] {
            let moment = Moment::from(Timestamp::from_micros(micros));
            assert_eq!(moment.text, "2025-11-30 20:05 UTC");
            assert_eq!(moment.machine, "2025-11-30T20:05:03Z");
            assert_eq!(moment.seconds, 1_764_533_103);
        }
    }
}
