//! Signing in at the provider, and signing out.
//!
//! Mitigation: M30 of `THREAT_MODEL.md`.

use std::{sync::Arc, time::Instant};

use axum::http::{StatusCode, header, request::Parts};

use keybroker_broker::limits;
use keybroker_core::{
    call::{Call, caller::Caller},
    error::{Error, Reason},
    key::AccessRequestId,
    principal::{Action, Principal, Role},
    sign_in::Answer as ProviderAnswer,
};

use super::{
    Context, answer,
    answer::Failure,
    cookies::Cookie,
    forms::Fields,
    logins::Login,
    pages,
    sessions::{Session, is_authenticated_within},
    visit::{Answer, Visit},
};

/// Longest code that is sent to the provider, in bytes.
const CODE_BYTES_MAX: usize = 4 * 1_024;

/// The address at which a sign-in begins, which leads back to a request.
pub(super) fn address(request: Option<AccessRequestId>) -> String {
    match request {
        Some(id) => format!("/sign-in?request={id}"),
        None => "/sign-in".to_owned(),
    }
}

/// Sends the browser to the provider. With a session, the provider must ask for the credentials again.
pub(super) async fn begin(
    context: &Context,
    head: &Parts,
    session: Option<Session>,
    caller: &Caller,
    call: &Call,
) -> Answer {
    // The session exists, so an error means that the approver has reached a limit.
    if session.is_some()
        && let Err(error) = caller.principal()
    {
        return Err(Failure::of(error, call.id));
    }
    let fields = query(head);
    let max_age = session
        .is_some()
        .then_some(context.settings.reauthentication);
    let begun = context.provider.begin(max_age).await;
    let begun = begun.map_err(|error| refused(context, caller, call, &error))?;
    let url = begun.url.clone();
    let login = Login {
        begun,
        max_age,
        request: AccessRequestId::from_hex(fields.value("request")),
        replaces: session.map(|session| session.digest()),
        network: limits::network(caller.peer().ip()),
        started: Instant::now(),
    };
    let cookie = context.logins.keep(login);
    let cookie = cookie.map_err(|error| refused(context, caller, call, &error))?;
    let mut response = answer::see_other(&url);
    let headers = response.headers_mut();
    headers.append(header::SET_COOKIE, Cookie::Login.set(&cookie));
    Ok(response)
}

/// Ends the sign-in with the answer that the browser brings from the provider.
pub(super) async fn finish(
    context: &Context,
    head: &Parts,
    caller: &Caller,
    call: &Call,
) -> Answer {
    let fields = query(head);
    let Some(login) = context.logins.take(&head.headers, fields.value("state")) else {
        return Err(without_login(context, caller, call));
    };
    if !fields.value("error").is_empty() || fields.value("code").is_empty() {
        let error = Error::new(
            Reason::Credential,
            "sign-in: the provider answered with an error",
        );
        refused(context, caller, call, &error);
        return Err(again("The provider did not sign you in."));
    }
    let principal = signed_in(context, &login, &fields).await;
    let principal = principal.map_err(|error| {
        let failure = refused(context, caller, call, &error);
        if error.reason() == Reason::Credential {
            return again("The broker does not accept the answer of the provider. The operator finds the reason in the broker's log.");
        }
        // The code of this sign-in is gone, so the browser must begin again and not repeat the address.
        failure.with_link(address(login.request), "Sign in again")
    })?;
    // A sign-in is a call of this person. A person without the role has no session whose requests are counted, and each
    // refusal below has an audit entry.
    let counted = context.limits.take_calls(&principal, 1);
    counted.map_err(|error| refused(context, caller, call, &error))?;
    check_role(context, &principal, call).await?;
    if let Some(replaced) = &login.replaces {
        context.sessions.end(replaced);
    }
    let started = context.sessions.start(Arc::clone(&principal));
    let cookie = started.map_err(|error| Failure::of(&error, call.id))?;
    tracing::info!(principal = %principal, peer = %caller.peer(), "an approver signed in to the page");
    let to = login
        .request
        .map_or_else(|| "/".to_owned(), |id| format!("/requests/{id}"));
    let mut response = answer::page(StatusCode::OK, &pages::Continue { to });
    let headers = response.headers_mut();
    headers.append(header::SET_COOKIE, Cookie::Session.set(&cookie));
    headers.append(header::SET_COOKIE, Cookie::Login.clear());
    Ok(response)
}

async fn signed_in(
    context: &Context,
    login: &Login,
    fields: &Fields,
) -> Result<Arc<Principal>, Error> {
    let code = fields.value("code");
    if code.len() > CODE_BYTES_MAX {
        return Err(Error::new(
            Reason::Credential,
            "sign-in: the code is too long",
        ));
    }
    let issuer = fields.value("iss");
    let answer = ProviderAnswer {
        code: code.to_owned(),
        issuer: (!issuer.is_empty()).then(|| issuer.to_owned()),
        nonce: login.begun.nonce.clone(),
        verifier: login.begun.verifier.clone(),
    };
    // The place stays taken until the ID token is verified.
    let _place = context.logins.exchange(login).await?;
    let principal = context.provider.finish(answer).await?;
    // A provider that ignores the request to authenticate again must not let an old session approve.
    match login.max_age {
        Some(max_age) if !is_authenticated_within(&principal, max_age) => Err(Error::new(
            Reason::Credential,
            "sign-in: the provider was asked to authenticate the person again, but the `auth_time` is missing or too old",
        )),
        _ => Ok(principal),
    }
}

/// Refuses a person who is not an approver. The audit log has an entry for the refusal.
async fn check_role(
    context: &Context,
    principal: &Principal,
    call: &Call,
) -> Result<(), Box<Failure>> {
    if principal.has(Role::Approver) {
        return Ok(());
    }
    let error = Error::new(
        Reason::Policy,
        "sign-in to the page without the role `approver`",
    );
    let action = Action::ListAccess;
    let error = context
        .broker
        .unserved(principal, call, action, error)
        .await;
    if error.reason() != Reason::Policy {
        return Err(Failure::of(&error, call.id));
    }
    let text = "The provider signed you in, but you do not have the role of an approver. Ask the operator of Keybroker for the \
                role.";
    let failure = Failure::new(StatusCode::FORBIDDEN, "You are not an approver", text);
    Err(failure.with_link(address(None), "Sign in as another person"))
}

/// Ends the session.
pub(super) fn sign_out(context: &Context, visit: &Visit) -> Answer {
    visit.check_token(pages::SIGN_OUT)?;
    context.sessions.end(&visit.session.digest());
    tracing::info!(principal = %visit.principal(), "an approver signed out of the page");
    let mut message = pages::Message::new(
        "You are signed out",
        "You can still be signed in at the provider. On a computer that other people use, sign out there, too.",
    );
    message.link = pages::Link {
        address: address(None),
        text: "Sign in",
    };
    let mut response = answer::page(StatusCode::OK, &message);
    let headers = response.headers_mut();
    headers.append(header::SET_COOKIE, Cookie::Session.clear());
    Ok(response)
}

fn query(head: &Parts) -> Fields {
    Fields::parse(head.uri.query().unwrap_or_default().as_bytes())
}

/// Refuses an answer that is not of a sign-in of this browser. Only such answers are refused if the address has reached the limit of
/// failed attempts: otherwise, a caller could prevent the sign-ins of approvers who have the same address.
fn without_login(context: &Context, caller: &Caller, call: &Call) -> Box<Failure> {
    if let Err(error) = context.limits.check_address(caller.peer().ip()) {
        return refused(context, caller, call, &error);
    }
    let error = Error::new(
        Reason::Credential,
        "sign-in: the answer is not of a sign-in that this browser began, or the sign-in has expired",
    );
    refused(context, caller, call, &error);
    again("The sign-in has expired, or was begun in another browser or tab.")
}

/// Counts and logs the refusal of a browser without a session.
fn refused(context: &Context, caller: &Caller, call: &Call, error: &Error) -> Box<Failure> {
    let peer = caller.peer();
    context
        .broker
        .refuse_unauthenticated(peer, peer.ip(), error, call.id);
    if error.is_failed_attempt() {
        // The call is refused already. The limit takes effect on later calls.
        context.limits.fail_address(peer.ip()).ok();
    }
    Failure::of(error, call.id).with_link(address(None), "Sign in again")
}

fn again(text: &str) -> Box<Failure> {
    let failure = Failure::new(StatusCode::FORBIDDEN, "You are not signed in", text);
    failure.with_link(address(None), "Sign in again")
}
