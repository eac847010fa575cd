//! The calls of the admin API that change wrapping keys.

use std::{sync::Arc, time::Duration};

use tonic::{Request, Response, Status};

use keybroker_broker::{Broker, KeyChange, Rotation, Wait};
use keybroker_core::{
    error::Error,
    key::{KeyName, Purpose, WrappingKeyId},
    principal::Action,
};
use keybroker_proto as proto;

use super::{AuthenticatedCall, convert::wrapping_key};

/// Length of a new key, in bits, if the caller specifies no length.
const BITS_DEFAULT: u32 = 3_072;
const BITS: [u32; 3] = [2_048, 3_072, 4_096];
const HOURS_PER_DAY: u64 = 24;
/// The longest age that a caller can specify, in days: about a hundred years.
const DAYS_MAX: u32 = 36_500;
/// The longest waiting time of a destruction, in days: about ten years.
const WAIT_DAYS_MAX: u32 = 3_650;
/// The word with which a caller asks for a destruction without a waiting time.
const NOW: &str = "irreversibly";

pub(super) async fn rotate(
    broker: &Arc<Broker>,
    request: Request<proto::RotateWrappingKeyRequest>,
) -> Result<Response<proto::RotateWrappingKeyResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let rotation = rotation(request.get_ref());
    let rotation = entered.parsed(broker, Action::RotateKey, rotation).await?;
    let rotated = broker
        .rotate_key(&entered.principal, &entered.call, rotation)
        .await
        .map_err(|error| entered.status(&error))?;
    let previous = rotated.previous.map(|id| id.as_bytes().to_vec());
    Ok(Response::new(proto::RotateWrappingKeyResponse {
        wrapping_key: Some(wrapping_key(&rotated.key)),
        previous_id: previous.unwrap_or_default(),
        changed: rotated.is_changed,
    }))
}

fn rotation(request: &proto::RotateWrappingKeyRequest) -> Result<Rotation, Error> {
    let proto::RotateWrappingKeyRequest {
        modulus_bits,
        if_older_than_days,
        without_backup,
        back,
        ref token,
        purpose,
    } = *request;
    let has_others = modulus_bits != 0 || if_older_than_days != 0 || without_backup;
    if back && (has_others || !token.is_empty() || purpose != 0) {
        return Err(Error::violation("back", "unset if another field is set"));
    }
    if !token.is_empty() && KeyName::parse(token).is_err() {
        return Err(Error::violation("token", "1 to 64 bytes of [a-z0-9._-]"));
    }
    let modulus_bits = match modulus_bits {
        0 => BITS_DEFAULT,
        bits if BITS.contains(&bits) => bits,
        _ => return Err(Error::violation("modulus_bits", "0, 2048, 3072 or 4096")),
    };
    if if_older_than_days > DAYS_MAX {
        return Err(Error::violation("if_older_than_days", "at most 36,500"));
    }
    let hours = u64::from(if_older_than_days) * HOURS_PER_DAY;
    Ok(Rotation {
        modulus_bits,
        if_older_than: (hours > 0).then(|| Duration::from_hours(hours)),
        single: without_backup,
        back,
        purpose: match proto::WrappingKeyPurpose::try_from(purpose) {
            Ok(proto::WrappingKeyPurpose::Unspecified) => None,
            Ok(proto::WrappingKeyPurpose::Plain) => Some(Purpose::Plain),
            Ok(proto::WrappingKeyPurpose::Sealed) => Some(Purpose::Sealed),
            Err(_) => return Err(Error::violation("purpose", "a purpose of the definition")),
        },
        token: (!token.is_empty()).then(|| token.clone()),
    })
}

pub(super) async fn change(
    broker: &Arc<Broker>,
    request: Request<proto::ChangeWrappingKeyStateRequest>,
) -> Result<Response<proto::ChangeWrappingKeyStateResponse>, Status> {
    let entered = AuthenticatedCall::of(&request)?;
    let change = key_change(request.get_ref());
    let action = change
        .as_ref()
        .map_or(Action::ActivateKey, |change| change.action());
    let parsed = change.and_then(|change| {
        let id = WrappingKeyId::from_slice(&request.get_ref().id)
            .ok_or_else(|| Error::violation("id", "16 bytes"))?;
        Ok((id, change))
    });
    let (id, change) = entered.parsed(broker, action, parsed).await?;
    let view = broker
        .change_key_state(&entered.principal, &entered.call, id, change)
        .await
        .map_err(|error| entered.status(&error))?;
    Ok(Response::new(proto::ChangeWrappingKeyStateResponse {
        wrapping_key: Some(wrapping_key(&view)),
    }))
}

fn key_change(request: &proto::ChangeWrappingKeyStateRequest) -> Result<KeyChange, Error> {
    let is_about_backup = request.backup_confirmed || request.without_backup;
    let is_about_wait = request.destroy_after_days != 0 || !request.destroy_now.is_empty();
    let is_about_destruction = is_about_wait || request.confirm_schedule;
    if is_about_destruction && request.change() != proto::WrappingKeyChange::Destroy {
        let what = "WRAPPING_KEY_CHANGE_DESTROY if `destroy_after_days`, `destroy_now` or `confirm_schedule` is set";
        return Err(Error::violation("change", what));
    }
    if request.confirm_schedule && is_about_wait {
        let what = "unset if `destroy_after_days` or `destroy_now` is set";
        return Err(Error::violation("confirm_schedule", what));
    }
    let change = match request.change() {
        proto::WrappingKeyChange::Activate => {
            if request.backup_confirmed && request.without_backup {
                let what = "unset if `backup_confirmed` is set";
                return Err(Error::violation("without_backup", what));
            }
            return Ok(KeyChange::Activate {
                backup_confirmed: request.backup_confirmed,
                without_backup: request.without_backup,
            });
        }
        proto::WrappingKeyChange::Suspend => KeyChange::Suspend,
        proto::WrappingKeyChange::Resume => KeyChange::Resume,
        proto::WrappingKeyChange::Deactivate => KeyChange::Deactivate,
        proto::WrappingKeyChange::Compromise => KeyChange::Compromise,
        proto::WrappingKeyChange::Lose => KeyChange::Lose,
        proto::WrappingKeyChange::Destroy if request.confirm_schedule => {
            KeyChange::ConfirmDestruction
        }
        proto::WrappingKeyChange::Destroy => KeyChange::Destroy(wait(request)?),
        proto::WrappingKeyChange::Keep => KeyChange::Keep,
        proto::WrappingKeyChange::FindCopies => KeyChange::FindCopies,
        proto::WrappingKeyChange::Unspecified => {
            return Err(Error::violation("change", "a known change"));
        }
    };
    if is_about_backup {
        let what = "WRAPPING_KEY_CHANGE_ACTIVATE if `backup_confirmed` or `without_backup` is set";
        return Err(Error::violation("change", what));
    }
    Ok(change)
}

/// How long the destruction of a key waits.
fn wait(request: &proto::ChangeWrappingKeyStateRequest) -> Result<Wait, Error> {
    match (request.destroy_after_days, request.destroy_now.as_str()) {
        (0, "") => Ok(Wait::Configured),
        (days, "") if days <= WAIT_DAYS_MAX => Ok(Wait::Days(days)),
        (_, "") => Err(Error::violation("destroy_after_days", "at most 3,650")),
        (0, NOW) => Ok(Wait::None),
        (0, _) => Err(Error::violation("destroy_now", "empty or \"irreversibly\"")),
        _ => Err(Error::violation(
            "destroy_now",
            "unset if `destroy_after_days` is set",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field<T>(result: Result<T, Error>) -> Option<&'static str> {
        Some(result.err()?.violations()[0].field)
    }

    #[test]
    fn a_rotation_is_parsed_with_its_limits() {
        let parsed = |modulus_bits, if_older_than_days, without_backup, back| {
            rotation(&proto::RotateWrappingKeyRequest {
                modulus_bits,
                if_older_than_days,
                without_backup,
                back,
                token: String::new(),
                purpose: 0,
            })
        };
        let plain = parsed(0, 0, false, false).unwrap();
        assert_eq!((plain.modulus_bits, plain.if_older_than), (3_072, None));
        let limited = parsed(2_048, 36_500, true, false).unwrap();
        assert_eq!(limited.if_older_than, Some(Duration::from_hours(876_000)));
        assert!(limited.single && parsed(0, 0, false, true).unwrap().back);
        assert_eq!(field(parsed(1_024, 0, false, false)), Some("modulus_bits"));
        assert_eq!(
            field(parsed(0, 36_501, false, false)),
            Some("if_older_than_days")
        );
        let on = |token: &str, back| {
            rotation(&proto::RotateWrappingKeyRequest {
                token: token.to_owned(),
                back,
                ..Default::default()
            })
        };
        assert_eq!(plain.token, None);
        assert_eq!(on("hsm-b", false).unwrap().token.as_deref(), Some("hsm-b"));
        assert_eq!(field(on("hsm b", false)), Some("token"));
        assert_eq!(field(on("hsm-b", true)), Some("back"));
        for (bits, days, single) in [(2_048, 0, false), (0, 1, false), (0, 0, true)] {
            assert_eq!(field(parsed(bits, days, single, true)), Some("back"));
        }
    }

    #[test]
    fn each_change_is_parsed_and_only_an_activation_mentions_a_backup() {
        use proto::WrappingKeyChange as Wire;
        let parsed = |change: i32, backup_confirmed, without_backup| {
            key_change(&proto::ChangeWrappingKeyStateRequest {
                id: Vec::new(),
                change,
                backup_confirmed,
                without_backup,
                ..Default::default()
            })
        };
        for (wire, change) in [
            (Wire::Suspend, KeyChange::Suspend),
            (Wire::Resume, KeyChange::Resume),
            (Wire::Deactivate, KeyChange::Deactivate),
            (Wire::Compromise, KeyChange::Compromise),
            (Wire::Lose, KeyChange::Lose),
            (Wire::Destroy, KeyChange::Destroy(Wait::Configured)),
            (Wire::Keep, KeyChange::Keep),
            (Wire::FindCopies, KeyChange::FindCopies),
        ] {
            assert_eq!(parsed(wire.into(), false, false).unwrap(), change);
            assert_eq!(field(parsed(wire.into(), true, false)), Some("change"));
        }
        let activate: i32 = Wire::Activate.into();
        assert_eq!(field(parsed(activate, true, true)), Some("without_backup"));
        assert!(parsed(activate, true, false).is_ok());
        for unknown in [0, 10, -1] {
            assert_eq!(field(parsed(unknown, false, false)), Some("change"));
        }
    }

    #[test]
    fn a_destruction_waits_unless_the_caller_says_the_word() {
        use proto::WrappingKeyChange as Wire;
        let parsed = |change: Wire, destroy_after_days, destroy_now: &str| {
            key_change(&proto::ChangeWrappingKeyStateRequest {
                change: change.into(),
                destroy_after_days,
                destroy_now: destroy_now.to_owned(),
                ..Default::default()
            })
        };
        let destroy = |days, now| parsed(Wire::Destroy, days, now);
        assert_eq!(
            destroy(3_650, "").unwrap(),
            KeyChange::Destroy(Wait::Days(3_650))
        );
        let now = destroy(0, "irreversibly").unwrap();
        assert_eq!(now, KeyChange::Destroy(Wait::None));
        assert_eq!(now.action(), Action::DestroyKeyNow);
        assert_eq!(field(destroy(3_651, "")), Some("destroy_after_days"));
        assert_eq!(field(destroy(0, "yes")), Some("destroy_now"));
        assert_eq!(field(destroy(1, "irreversibly")), Some("destroy_now"));
        assert_eq!(field(parsed(Wire::Keep, 1, "")), Some("change"));
        let confirmed = |change: Wire, destroy_after_days| {
            key_change(&proto::ChangeWrappingKeyStateRequest {
                change: change.into(),
                destroy_after_days,
                confirm_schedule: true,
                ..Default::default()
            })
        };
        let confirmation = confirmed(Wire::Destroy, 0).unwrap();
        assert_eq!(confirmation, KeyChange::ConfirmDestruction);
        assert_eq!(confirmation.action(), Action::DestroyKey);
        assert_eq!(field(confirmed(Wire::Destroy, 1)), Some("confirm_schedule"));
        assert_eq!(field(confirmed(Wire::Keep, 0)), Some("change"));
        assert_eq!(field(parsed(Wire::Lose, 0, "irreversibly")), Some("change"));
    }
}
