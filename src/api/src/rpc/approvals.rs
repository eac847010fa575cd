//! The calls of the admin API for changes that a second person must approve.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use keybroker_broker::{ApprovalView, Broker, Decided, Verdict};
use keybroker_core::{approval::ApprovalState, error::Error, key::ApprovalId, principal::Action};
use keybroker_proto as proto;

use super::{
    AuthenticatedCall,
    convert::{bounded, timestamp},
};

pub(super) async fn list(
    broker: &Arc<Broker>,
    request: Request<proto::ListApprovalsRequest>,
) -> Result<Response<proto::ListApprovalsResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let message = request.get_ref();
    let parsed = optional_id(&message.id);
    let one = entered
        .parsed(broker, Action::ListApprovals, parsed)
        .await?;
    let listed = broker
        .approvals(&entered.principal, &entered.call, message.show_all, one)
        .await
        .map_err(|error| entered.status(&error))?;
    let damaged = listed.damaged.iter().map(|row| proto::DamagedApproval {
        id: row.id.map_or_else(Vec::new, |id| id.as_bytes().to_vec()),
    });
    Ok(Response::new(proto::ListApprovalsResponse {
        approvals: listed.approvals.iter().map(approval).collect(),
        damaged: damaged.collect(),
    }))
}

pub(super) async fn approve(
    broker: &Arc<Broker>,
    request: Request<proto::ApproveChangeRequest>,
) -> Result<Response<proto::ApproveChangeResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let message = request.get_ref();
    let parsed = id(&message.id).and_then(|id| Ok((id, digest(&message.digest)?)));
    let (id, digest) = entered.parsed(broker, Action::Approve, parsed).await?;
    let verdict = Verdict::Approve { digest };
    let approved = broker
        .decide_approval(&entered.principal, &entered.call, id, verdict)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::ApproveChangeResponse {
        approval: match &approved {
            Decided::Changed(view) => Some(approval(view)),
            Decided::Removed(_) => None,
        },
    }))
}

pub(super) async fn reject(
    broker: &Arc<Broker>,
    request: Request<proto::RejectChangeRequest>,
) -> Result<Response<proto::RejectChangeResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let parsed = id(&request.get_ref().id);
    let id = entered
        .parsed(broker, Action::RejectApproval, parsed)
        .await?;
    let rejected = broker
        .decide_approval(&entered.principal, &entered.call, id, Verdict::Reject)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(match &rejected {
        Decided::Changed(view) => proto::RejectChangeResponse {
            approval: Some(approval(view)),
            ..proto::RejectChangeResponse::default()
        },
        Decided::Removed(why) => proto::RejectChangeResponse {
            removal_cause: why.to_string(),
            ..proto::RejectChangeResponse::default()
        },
    }))
}

fn id(bytes: &[u8]) -> Result<ApprovalId, Error> {
    ApprovalId::from_slice(bytes).ok_or_else(|| Error::violation("id", "16 bytes"))
}

fn optional_id(bytes: &[u8]) -> Result<Option<ApprovalId>, Error> {
    if bytes.is_empty() {
        return Ok(None);
    }
    id(bytes).map(Some)
}

fn digest(bytes: &[u8]) -> Result<[u8; 32], Error> {
    let digest = bytes.try_into();
    digest.map_err(|_| Error::violation("digest", "32 bytes"))
}

const fn state(state: ApprovalState) -> proto::ApprovalState {
    match state {
        ApprovalState::Pending => proto::ApprovalState::Pending,
        ApprovalState::Approved => proto::ApprovalState::Approved,
        ApprovalState::Rejected => proto::ApprovalState::Rejected,
        ApprovalState::Used => proto::ApprovalState::Used,
        ApprovalState::Expired => proto::ApprovalState::Expired,
    }
}

fn approval(view: &ApprovalView) -> proto::Approval {
    let row = &view.row;
    let decision = row.decision.as_ref();
    let decided_by = decision.map(|decision| decision.by.clone());
    let (person, principal) = decided_by.map(|by| (by.person, by.principal)).unzip();
    proto::Approval {
        id: row.id.as_bytes().to_vec(),
        state: state(view.state).into(),
        action: row.action.clone(),
        change: String::from_utf8_lossy(&row.document).into_owned(),
        // In an altered row, the change and the digest may belong to different requests. An approval needs the digest. Without a
        // digest, a person cannot approve another change than the shown one.
        digest: if view.is_verified {
            row.digest.to_vec()
        } else {
            Vec::new()
        },
        requested_by: row.requested_by.principal.clone(),
        requested_by_person: row.requested_by.person.clone(),
        request_time: Some(timestamp(row.requested)),
        expire_time: Some(timestamp(row.expires)),
        decided_by: principal.unwrap_or_default(),
        decided_by_person: person.unwrap_or_default(),
        decide_time: decision.map(|decision| timestamp(decision.at)),
        use_time: row.used.map(timestamp),
        verified: view.is_verified,
        problem: bounded(view.problem.as_deref().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_digests_have_exactly_their_length() {
        for length in [0, 15, 17] {
            assert_eq!(
                id(&vec![1; length]).unwrap_err().violations()[0].field,
                "id"
            );
        }
        for length in [0, 31, 33] {
            let refused = digest(&vec![1; length]).unwrap_err();
            assert_eq!(refused.violations()[0].field, "digest");
        }
        assert_eq!(optional_id(&[]).unwrap(), None);
        assert!(optional_id(&[1; 15]).is_err() && optional_id(&[1; 16]).unwrap().is_some());
        assert!(id(&[1; 16]).is_ok() && digest(&[1; 32]).is_ok());
    }
}
