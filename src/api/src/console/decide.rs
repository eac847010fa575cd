//! The pages about requests for access: the pending requests, one request, approve and deny, and the latest decisions.
//!
//! Mitigations: M27, M30 of `THREAT_MODEL.md`.

use axum::http::StatusCode;

use keybroker_broker::{AccessCursor, AccessDenial, AccessPage, AdministratorApproval};
use keybroker_core::{
    call::Timestamp,
    error::{Error, Reason},
    key::AccessRequestId,
};

use super::{
    Context, answer,
    answer::Failure,
    pages::{self, Refused},
    sign_in,
    views::AccessRequest,
    visit::{Answer, Visit},
};

/// Highest number of decisions on the page.
const DECISIONS_MAX: u32 = 50;
/// Longest word that an approver can type, in bytes.
const WORD_BYTES_MAX: usize = 32;
/// The fields of the two words.
const WORDS: [&str; 2] = ["word-1", "word-2"];

/// Lists the pending requests.
pub(super) async fn pending(context: &Context, visit: &Visit) -> Answer {
    let wanted = AccessPage {
        after: cursor(visit.fields.value("after")),
        ..AccessPage::from(false)
    };
    let listed = context
        .broker
        .list_access_requests(visit.principal(), &visit.call, wanted);
    let list = listed.await.map_err(|error| visit.failure(&error))?;
    let page = pages::Pending {
        frame: visit.frame("/"),
        requests: list.requests.iter().map(AccessRequest::from).collect(),
        damaged: list.damaged.len(),
        next: list.next.map(|(at, id)| format!("{}.{id}", at.micros())),
    };
    Ok(answer::page(StatusCode::OK, &page))
}

/// Reads the cursor after which a page begins. Without a valid cursor, the first page is shown.
fn cursor(text: &str) -> Option<AccessCursor> {
    let (at, id) = text.split_once('.')?;
    let at = Timestamp::from_micros(at.parse().ok()?);
    Some((at, AccessRequestId::from_hex(id)?))
}

/// Lists the latest decisions about requests of the covered members.
pub(super) async fn decisions(context: &Context, visit: &Visit) -> Answer {
    let listed =
        context
            .broker
            .list_access_decisions(visit.principal(), &visit.call, DECISIONS_MAX);
    let list = listed.await.map_err(|error| visit.failure(&error))?;
    let page = pages::Decisions {
        frame: visit.frame("/decisions"),
        requests: list.requests.iter().map(AccessRequest::from).collect(),
        damaged: list.damaged.len(),
        max: DECISIONS_MAX,
    };
    Ok(answer::page(StatusCode::OK, &page))
}

/// Shows one request.
pub(super) async fn request(context: &Context, visit: &Visit, id: AccessRequestId) -> Answer {
    show(context, visit, id, StatusCode::OK, Refused::default()).await
}

async fn show(
    context: &Context,
    visit: &Visit,
    id: AccessRequestId,
    status: StatusCode,
    refused: Refused,
) -> Answer {
    let request = found(context, visit, id).await?;
    let first = request.first_approver.as_deref();
    let page = pages::Request {
        frame: visit.frame(""),
        is_first_approver: first == Some(visit.principal().name()),
        approve: visit
            .is_recent(context)
            .then(|| visit.session.token(&purpose_of_approval(id))),
        request,
        refused,
    };
    Ok(answer::page(status, &page))
}

async fn found(
    context: &Context,
    visit: &Visit,
    id: AccessRequestId,
) -> Result<AccessRequest, Box<Failure>> {
    let found = context
        .broker
        .access_request(visit.principal(), &visit.call, id);
    let view = found.await.map_err(|error| visit.failure(&error))?;
    Ok(AccessRequest::from(&view))
}

fn purpose_of_approval(id: AccessRequestId) -> String {
    format!("approve {id}")
}

fn purpose_of_denial(id: AccessRequestId) -> String {
    format!("deny {id}")
}

fn purpose_of_withdrawal(id: AccessRequestId) -> String {
    format!("withdraw {id}")
}

/// Approves a request with the two words that the approver heard from the member.
pub(super) async fn approve(context: &Context, visit: &Visit, id: AccessRequestId) -> Answer {
    visit.check_token(&purpose_of_approval(id))?;
    visit.check_recent(context, &sign_in::address(Some(id)))?;
    let words = WORDS.map(|name| visit.fields.value(name).trim().to_owned());
    let refused = refused_input(visit, &words);
    if refused.words.is_some() || refused.spoken.is_some() {
        return show(context, visit, id, StatusCode::BAD_REQUEST, refused).await;
    }
    let approval = AdministratorApproval { id, words };
    let broker = &context.broker;
    let approved = broker.approve_for_member(visit.principal(), &visit.call, approval);
    match approved.await {
        Ok(_) => Ok(answer::see_other(&format!("/requests/{id}"))),
        Err(error) if is_about_words(&error) => {
            let refused = Refused {
                words: Some(
                    "These are not the hidden words of the phrase. If the member reads other words to you, deny the request."
                        .to_owned(),
                ),
                ..Refused::default()
            };
            show(context, visit, id, StatusCode::BAD_REQUEST, refused).await
        }
        Err(error) => Err(visit
            .failure(&error)
            .with_link(format!("/requests/{id}"), "Go back to the request")),
    }
}

fn refused_input(visit: &Visit, words: &[String; 2]) -> Refused {
    let is_word = |word: &String| (1..=WORD_BYTES_MAX).contains(&word.len());
    let has_spoken = visit.fields.value("spoken") == "yes";
    Refused {
        words: (!words.iter().all(is_word))
            .then(|| "Enter both words, as the member reads them to you.".to_owned()),
        spoken: (!has_spoken).then_some("Confirm that the member read all five words to you."),
    }
}

fn is_about_words(error: &Error) -> bool {
    let mut violations = error.violations().iter();
    error.reason() == Reason::Request && violations.any(|one| one.field == "phrase_words")
}

/// Asks for a confirmation, and then denies a request or withdraws an approval. To withdraw an approval can end the trust of a device,
/// also after the answer was consumed, so it needs a recent sign-in. A denial of a pending request needs none, so that nothing delays
/// it.
pub(super) async fn deny(context: &Context, visit: &Visit, id: AccessRequestId) -> Answer {
    if visit.is_form {
        return send_denial(context, visit, id).await;
    }
    let request = found(context, visit, id).await?;
    let purpose = if request.is_pending() {
        purpose_of_denial(id)
    } else {
        if request.is_deniable() {
            visit.check_recent(context, &sign_in::address(Some(id)))?;
        }
        purpose_of_withdrawal(id)
    };
    let page = pages::Deny {
        frame: visit.frame(""),
        request,
        token: visit.session.token(&purpose),
    };
    Ok(answer::page(StatusCode::OK, &page))
}

async fn send_denial(context: &Context, visit: &Visit, id: AccessRequestId) -> Answer {
    // The token says what the approver confirmed. Another approver can approve the request after the page was shown.
    let only_pending = visit.check_token(&purpose_of_denial(id)).is_ok();
    if !only_pending {
        visit.check_recent(context, &sign_in::address(Some(id)))?;
        visit.check_token(&purpose_of_withdrawal(id))?;
    }
    let denial = AccessDenial {
        only_pending,
        ..AccessDenial::from(id)
    };
    let denied = context
        .broker
        .deny_access(visit.principal(), &visit.call, denial);
    match denied.await {
        Ok(_) => Ok(answer::see_other(&format!("/requests/{id}"))),
        Err(error) => Err(visit
            .failure(&error)
            .with_link(format!("/requests/{id}"), "Go back to the request")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_is_written() {
        let id = AccessRequestId::from_bytes([7; 16]);
        let at = Timestamp::from_micros(1_764_533_103_000_001);
        assert_eq!(cursor(&format!("{}.{id}", at.micros())), Some((at, id)));
        for bad in [
            "",
            ".",
            "1",
            "1.",
            "x.07",
            &format!("1.{id}0"),
            &format!("{id}.1"),
        ] {
            assert_eq!(cursor(bad), None, "{bad}");
        }
    }
}
