//! The methods of `keybroker.v1.ControlService` for the re-wrap.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use keybroker_broker::{
    Broker, RunState,
    rewrap::{NewRun, Phase, RewrapView, RunView},
};
use keybroker_core::{call::Timestamp, error::Error, key::WrappingKeyId, principal::Action};
use keybroker_proto as proto;

use super::{AuthenticatedCall, convert};

const RATE_MAX: u32 = 1_000_000;

pub(super) async fn start(
    broker: &Arc<Broker>,
    request: Request<proto::StartRewrapRequest>,
) -> Result<Response<proto::StartRewrapResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let request = request.get_ref();
    let parsed = source(&request.source_wrapping_key_id).and_then(|source| {
        if request.from_compromised && source.is_none() {
            let what = "unset, unless `source_wrapping_key_id` is set";
            return Err(Error::violation("from_compromised", what));
        }
        Ok(NewRun {
            from_compromised: request.from_compromised,
            source,
            rate: rate(request.rows_per_second_max)?,
        })
    });
    let new = entered.parsed(broker, Action::Rewrap, parsed).await?;
    let changed = broker
        .start_rewrap(&entered.principal, &entered.call, new)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::StartRewrapResponse {
        rewrap: rewrap(&changed.view),
        started: changed.is_changed,
    }))
}

pub(super) async fn get(
    broker: &Arc<Broker>,
    request: Request<proto::GetRewrapRequest>,
) -> Result<Response<proto::GetRewrapResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let view = broker
        .rewrap(&entered.principal, &entered.call)
        .await
        .map_err(|error| entered.status(&error))?;
    let uses = view.uses.iter().map(|(key, uses)| proto::WrappingKeyUse {
        wrapping_key_id: key.as_bytes().to_vec(),
        revisions: uses.revisions,
        clients: uses.clients,
        request_answers: uses.requests,
        approvals: uses.approvals,
        devices: uses.devices,
        access_requests: uses.access_requests,
    });
    Ok(Response::new(proto::GetRewrapResponse {
        rewrap: rewrap(&view),
        uses: uses.collect(),
    }))
}

pub(super) async fn pause(
    broker: &Arc<Broker>,
    request: Request<proto::PauseRewrapRequest>,
) -> Result<Response<proto::PauseRewrapResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let changed = broker
        .pause_rewrap(&entered.principal, &entered.call)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::PauseRewrapResponse {
        rewrap: rewrap(&changed.view),
        paused: changed.is_changed,
    }))
}

pub(super) async fn resume(
    broker: &Arc<Broker>,
    request: Request<proto::ResumeRewrapRequest>,
) -> Result<Response<proto::ResumeRewrapResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let parsed = request.get_ref().rows_per_second_max.map(rate).transpose();
    let rate = entered.parsed(broker, Action::Rewrap, parsed).await?;
    let changed = broker
        .resume_rewrap(&entered.principal, &entered.call, rate)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::ResumeRewrapResponse {
        rewrap: rewrap(&changed.view),
        resumed: changed.is_changed,
    }))
}

fn source(id: &[u8]) -> Result<Option<WrappingKeyId>, Error> {
    if id.is_empty() {
        return Ok(None);
    }
    WrappingKeyId::from_slice(id)
        .map(Some)
        .ok_or_else(|| Error::violation("source_wrapping_key_id", "16 bytes, or empty"))
}

fn rate(rows_per_second: u32) -> Result<u32, Error> {
    if rows_per_second <= RATE_MAX {
        Ok(rows_per_second)
    } else {
        Err(Error::violation("rows_per_second_max", "at most 1,000,000"))
    }
}

fn rewrap(view: &RewrapView) -> Option<proto::Rewrap> {
    let run = view.run.as_ref()?;
    let progress = &run.progress;
    let time =
        |micros: i64| (micros > 0).then(|| convert::timestamp(Timestamp::from_micros(micros)));
    let id = |key: Option<WrappingKeyId>| key.map_or_else(Vec::new, |key| key.as_bytes().to_vec());
    let left = view.left();
    Some(proto::Rewrap {
        state: state(run.state).into(),
        phase: phase(run).into(),
        source_wrapping_key_id: id(run.source),
        target_wrapping_key_id: id(view.target),
        rows_per_second_max: run.rate,
        requested_by: progress.requested_by.clone(),
        start_time: Some(convert::timestamp(run.started)),
        // Until a broker takes the lease of the run, the stored document is from the call that
        // requested the run.
        update_time: if run.holder.is_empty() {
            None
        } else {
            time(progress.updated_us)
        },
        end_time: time(progress.ended_us),
        instance: run.holder.clone(),
        revisions_moved: progress.revisions_moved,
        clients_moved: progress.clients_moved,
        devices_moved: progress.devices_moved,
        changed_meanwhile: progress.changed_meanwhile,
        left,
        failed: progress.failed,
        failures: progress
            .failures
            .iter()
            .map(|row| proto::RewrapFailure {
                id: row.id.clone(),
                revision: row.revision,
                problem: row.problem.clone(),
            })
            .collect(),
        verified: progress.verified,
        rows_per_second: progress.rows_per_second,
        seconds_left: seconds_left(run, left),
        blocked_by: progress.blocked_by.clone(),
    })
}

const fn state(state: RunState) -> proto::RewrapState {
    match state {
        RunState::Running => proto::RewrapState::Running,
        RunState::Paused => proto::RewrapState::Paused,
        RunState::Done => proto::RewrapState::Done,
    }
}

fn phase(run: &RunView) -> proto::RewrapPhase {
    match (run.state, run.progress.phase) {
        (RunState::Done, _) => proto::RewrapPhase::Unspecified,
        (_, Phase::Moving) => proto::RewrapPhase::Moving,
        (_, Phase::Verifying) => proto::RewrapPhase::Verifying,
    }
}

fn seconds_left(run: &RunView, left: u64) -> u64 {
    if run.state != RunState::Running || run.progress.phase != Phase::Moving {
        return 0;
    }
    let to_do = left.saturating_sub(run.progress.failed);
    to_do
        .checked_div(run.progress.rows_per_second)
        .map_or(0, |seconds| seconds.max(1))
}

#[cfg(test)]
mod tests {
    use keybroker_broker::rewrap::Progress;

    use super::*;

    fn run(state: RunState, progress: Progress) -> RunView {
        RunView {
            state,
            source: None,
            rate: 0,
            started: Timestamp::from_micros(1),
            holder: "serve".to_owned(),
            progress,
        }
    }

    #[test]
    fn the_expected_time_needs_a_speed_and_a_running_move() {
        let at = |rows_per_second| Progress {
            rows_per_second,
            failed: 4,
            ..Progress::default()
        };
        let left = |state, progress| seconds_left(&run(state, progress), 1_004);
        assert_eq!(left(RunState::Running, at(100)), 10);
        assert_eq!(left(RunState::Running, at(5_000)), 1);
        assert_eq!(left(RunState::Running, at(0)), 0);
        assert_eq!(left(RunState::Paused, at(100)), 0);
        let verifying = Progress {
            phase: Phase::Verifying,
            ..at(100)
        };
        assert_eq!(left(RunState::Running, verifying), 0);
    }

    #[test]
    fn a_source_has_16_bytes_and_a_rate_has_a_maximum() {
        assert_eq!(source(&[]).unwrap(), None);
        assert!(source(&[1; 16]).unwrap().is_some());
        for bytes in [1, 15, 17] {
            assert_eq!(source(&vec![1; bytes]).unwrap_err().violations().len(), 1);
        }
        assert_eq!(rate(RATE_MAX).unwrap(), RATE_MAX);
        assert!(rate(RATE_MAX + 1).is_err());
    }
}
